"""What `bench latency` found: percentiles, ratios within a round, tables and a chart."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laser_dist.bench.latency import PASS, REWRITE, Cell, laser_name
from laser_dist.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PERCENTILES = (20, 50, 80, 95)
_CLOCKS = {"wall": ("wall_s", "ratio", "time"), "cpu": ("cpu_s", "cpu_ratio", "CPU time")}
_OWN_SHARE = 0.9
# Okabe and Ito's colours, which colour-blind readers can tell.
_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")


def summarise(cell: Cell) -> dict[str, Any]:
    """One batch size and length as plain values: seconds per call, and the ratio to one pass of the same round."""
    variants: dict[str, dict[str, Any]] = {}
    for name in cell.rounds[0]:
        rounds = [timed for timed in cell.rounds if name in timed]
        variants[name] = {
            "calls": len(rounds),
            "wall_s": _percentiles([timed[name].wall for timed in rounds]),
            "cpu_s": _percentiles([timed[name].cpu for timed in rounds]),
            "ratio": _percentiles([timed[name].wall / timed[PASS].wall for timed in rounds]),
            # On a machine that other work shares, this one says more.
            "cpu_ratio": _percentiles([timed[name].cpu / timed[PASS].cpu for timed in rounds]),
        }
    return {"batch": cell.batch, "length": cell.length, "variants": variants}


def trusted_clock(cells: list[dict[str, Any]], device: str) -> str:
    """Which seconds are shown: on a CPU that other work kept busy those of this process ("cpu"), else "wall"."""
    passes = [cell["variants"][PASS] for cell in cells]
    own = sum(row["cpu_s"]["p50"] for row in passes) / sum(row["wall_s"]["p50"] for row in passes)
    return "cpu" if device == "cpu" and own < _OWN_SHARE else "wall"


def _percentiles(values: list[float]) -> dict[str, float]:
    return dict(zip([f"p{p}" for p in PERCENTILES], np.percentile(values, PERCENTILES).tolist(), strict=True))


def seconds_per_step(cell: dict[str, Any], steps: list[int], clock: str) -> float | None:
    """What one more soft token costs: from the fewest to the most steps, medians; None for a single K."""
    low, high = min(steps), max(steps)
    if low == high:
        return None
    ends = [cell["variants"][laser_name(k)][_CLOCKS[clock][0]]["p50"] for k in (low, high)]
    return (ends[1] - ends[0]) / (high - low)


def print_tables(result: dict[str, Any]) -> None:
    """The ratios and what they were measured on."""
    from rich.console import Console
    from rich.table import Table

    steps, traffic = sorted(result["settings"]["steps"]), result["step_traffic"]
    seconds, ratio, name = _CLOCKS[result["clock"]]
    table = Table(title=f"Encoding: {name} / one encoder pass of the same round (p50)", caption_justify="left")
    headings = ["texts", "tokens", "one pass, ms", "p95, ms", *map(laser_name, steps), "one step, ms", "rewrite"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for cell in result["cells"]:
        variants = cell["variants"]
        step = seconds_per_step(cell, steps, result["clock"])
        rewrite = variants.get(REWRITE)
        table.add_row(
            str(cell["batch"]),
            str(cell["length"]),
            *(f"{variants[PASS][seconds][p] * 1e3:,.1f}" for p in ("p50", "p95")),
            *(f"{variants[laser_name(k)][ratio]['p50']:.2f}" for k in steps),
            "" if step is None else f"{step * 1e3:,.1f}",
            "" if rewrite is None else f"{rewrite[ratio]['p50']:,.0f} ({rewrite[seconds]['p50']:,.1f} s)",
        )
    worst = max(difference for what, difference in result["agreement"].items() if "logit" not in what)
    most = laser_name(max(steps))
    table.caption = (
        f"{result['date']} · {result['device']}, threads: {result['threads']} · torch {result['torch']} · "
        f"transformers {result['transformers']}\n"
        f"{result['model']} · {result['settings']['dtype']} · {result['settings']['repeats']} rounds · rewriting "
        f"generates {result['settings']['rewrite_tokens']} tokens\n"
        f"a step reads {(traffic['layer_bytes'] + traffic['vocabulary_bytes']) / 1e6:,.0f} MB of weights: "
        f"{traffic['floor_seconds'] * 1e3:,.1f} ms at the {traffic['read_bytes_per_second'] / 1e9:,.0f} GB/s that a "
        f"plain sum reads here\nvectors agree to {worst:.0e} in float64 (alone and batched, K and more steps, "
        f"published implementation, one pass); {most} alone and batched to "
        f"{result['rounding']:.0e} in {result['settings']['dtype']}"
    )
    if result["clock"] == "cpu":
        table.caption += "\nother work shared this CPU: shown are this process's own seconds; --out has both"
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def draw(result: dict[str, Any], out: Path) -> None:
    """Two panels per batch size: the ratio against K, and the time against the length."""
    from matplotlib.figure import Figure

    batches = sorted({cell["batch"] for cell in result["cells"]})
    # Without pyplot, which would look for a display.
    figure = Figure(figsize=(12, 0.9 + 4.2 * len(batches)), dpi=120, layout="constrained")
    panels = figure.subplots(len(batches), 2, squeeze=False)
    for (left, right), batch in zip(panels, batches, strict=True):
        cells = sorted((cell for cell in result["cells"] if cell["batch"] == batch), key=lambda cell: cell["length"])
        texts = "1 text" if batch == 1 else f"{batch} texts together"
        seconds, ratio, name = _CLOCKS[result["clock"]]
        _draw_ratios(left, cells, sorted(result["settings"]["steps"]), ratio)
        left.set_title(f"{texts}: {name} / one encoder pass (p50, shaded p20 to p80)", fontsize=10, loc="left")
        _draw_times(right, cells, sorted(result["settings"]["steps"]), seconds)
        right.set_title(f"{texts}: {name}, ms (p50)", fontsize=10, loc="left")
    figure.suptitle(
        f"{result['model']}, {result['settings']['dtype']} · {result['device']}, threads: {result['threads']} · "
        f"torch {result['torch']} · {result['date'][:10]}",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png")


def _draw_ratios(axes: "Axes", cells: list[dict[str, Any]], steps: list[int], ratio: str) -> None:
    for cell, colour in zip(cells, _cycle(len(cells)), strict=True):
        ratios = [cell["variants"][laser_name(k)][ratio] for k in steps]
        axes.plot(steps, [r["p50"] for r in ratios], marker="o", color=colour, label=f"{cell['length']} tokens")
        axes.fill_between(
            steps, [r["p20"] for r in ratios], [r["p80"] for r in ratios], color=colour, alpha=0.15, linewidth=0
        )
    axes.axhline(1, color="#222222", linewidth=0.8)
    axes.set(xlabel="K, latent states averaged", ylim=(0, None))
    axes.set_xticks(steps)
    _finish(axes)


def _draw_times(axes: "Axes", cells: list[dict[str, Any]], steps: list[int], seconds: str) -> None:
    shown = [PASS, *map(laser_name, dict.fromkeys([k for k in (1, 3) if k in steps] + [max(steps)])), REWRITE]
    for name, colour in zip(shown, _cycle(len(shown)), strict=True):
        points = [(c["length"], c["variants"][name][seconds]["p50"] * 1e3) for c in cells if name in c["variants"]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
    lengths = [cell["length"] for cell in cells]
    axes.set(xscale="log", yscale="log", xlabel="tokens per text")
    axes.set_xticks(lengths, list(map(str, lengths)))
    axes.minorticks_off()
    _finish(axes)


def _cycle(number: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(number)]


def _finish(axes: "Axes") -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
