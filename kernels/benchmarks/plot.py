"""Draw rows that alignment.py has written: time and peak memory against N, one line per implementation.

Example: python kernels/benchmarks/plot.py --rows rows.jsonl --out rows.png
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from implementations import IMPLEMENTATIONS

from laser_dist.errors import UserError

# Told apart by colour and mark; ours are drawn thicker. Okabe and Ito's colours, which colour-blind readers can tell.
STYLES = {
    "eager_fp32": ("#000000", "o"), "eager_bf16": ("#999999", "s"), "compiled": ("#E69F00", "^"),
    "liger": ("#56B4E9", "D"), "all_rows": ("#CC79A7", "v"), "chunked": ("#009E73", "P"), "triton": ("#D55E00", "X"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which rows, and where to."""

    rows: Path
    """JSON lines; of rows measured twice the last is drawn."""
    out: Path
    """PNG to write."""


def require_matplotlib() -> None:
    try:
        import matplotlib
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """One line of panels per (device, dtype, B, D, K), with the backward where there is one."""
    require_matplotlib()
    from matplotlib import pyplot

    latest = {(*_panel(row), row["pass"], row["implementation"], row["N"]): row for row in rows}
    kept = [row for row in latest.values() if "not_run" not in row]
    which = "forward+backward" if any(row["pass"] == "forward+backward" for row in kept) else "forward"
    kept = sorted((row for row in kept if row["pass"] == which), key=lambda row: row["N"])
    panels = list(dict.fromkeys(_panel(row) for row in kept))
    if not panels:
        raise UserError("no row has a measurement: nothing to draw")
    figure, axes = pyplot.subplots(
        len(panels), 2, figsize=(12, 0.9 + 4.1 * len(panels)), squeeze=False, layout="constrained"
    )
    for (left, right), panel in zip(axes, panels, strict=True):
        device, dtype, b, d, k = panel
        # Wall-clock on a CPU says as much about what else it was doing.
        on_cpu = device.startswith("CPU")
        time = "cpu_s" if on_cpu else "p50_s"
        for name, (color, mark) in STYLES.items():
            line = [row for row in kept if _panel(row) == panel and row["implementation"] == name]
            if not line:
                continue
            ours = name in ("chunked", "triton")
            look: dict[str, Any] = {
                "color": color, "marker": mark, "linewidth": 2.6 if ours else 1.3, "zorder": 3 if ours else 2,
            }  # fmt: skip
            n = [row["N"] for row in line]
            label = IMPLEMENTATIONS[name].label.replace("W·B", f"{line[0]['W']}·B")
            left.plot(n, [row[time] * 1e3 for row in line], label=label, **look)
            if not on_cpu:
                low, high = ([row[key] * 1e3 for row in line] for key in ("p20_s", "p80_s"))
                left.fill_between(n, low, high, color=color, alpha=0.12, linewidth=0)
            # A logarithm has no zero, and below a mebibyte nothing is told apart.
            right.plot(n, [max(row["peak_extra_bytes"] / 2**20, 1) for row in line], **look)
        what = "CPU time, ms" if on_cpu else "time, ms (p50, shaded p20 to p80)"
        left.set_title(f"B = {b}, D = {d}, K = {k}, {dtype} · {what}", fontsize=10, loc="left")
        right.set_title("peak memory beyond inputs and gradients, MiB", fontsize=10, loc="left")
        ticks = sorted({row["N"] for row in kept if _panel(row) == panel})
        for axis in (left, right):
            axis.set(xscale="log", yscale="log", xlabel="N, passages")
            axis.set_xticks(ticks, [_short(n) for n in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    handles = {
        label: handle for left, _ in axes for handle, label in zip(*left.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    row = kept[-1]
    devices = ", ".join(dict.fromkeys(panel[0] for panel in panels))
    figure.suptitle(
        f"Alignment loss, {which} · {devices}, threads: {row['threads']} · torch {row['torch']} · {row['date'][:10]}",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _panel(row: dict[str, Any]) -> tuple:
    return row["device"], row["dtype"], row["B"], row["D"], row["K"]


def _short(n: int) -> str:
    if n % 2**20 == 0:
        return f"{n >> 20}Mi"
    return f"{n >> 10}Ki" if n % 1024 == 0 else f"{n:,}"


def main() -> int:
    settings = tyro.cli(Settings, description=__doc__)
    try:
        draw([json.loads(line) for line in settings.rows.read_text().splitlines()], settings.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
