"""The summary of a profile for people: shares, a table in Markdown, and charts for TensorBoard."""

from pathlib import Path
from typing import TYPE_CHECKING

from laser_dist.observability.trace import TraceSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = ("compute", "communication", "idle")
_COLOURS = {"compute": "#4878a8", "communication": "#d98c3f", "idle": "#d0d0d0"}
_BLUE, _LIGHT, _DARK = "#4878a8", "#a8c4de", "#222222"
_LINES = 8  # of ranks in one chart that can be told apart


def shares_of(ranks: list[TraceSummary]) -> dict[str, float]:
    """Mean over ranks of each part of the step, in [0, 1]."""
    return {part: sum(getattr(one, part) / one.wall for one in ranks) / len(ranks) for part in PARTS}


def table_of(ranks: list[TraceSummary], folder: Path) -> str:
    """Markdown: the split of each rank, and what rank 0 did."""
    first = ranks[0]
    what = "kernels" if first.device == "cuda" else "operators, without those they call"
    lines = [
        f"Steps traced: {first.steps}, ranks: {len(ranks)}; all figures are means per step. Open "
        f"`{folder}/rank-*.json.gz` in [Perfetto](https://ui.perfetto.dev); nothing is uploaded.",
        "",
        "| rank | step | compute | communication alone | behind compute | idle | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, one in enumerate(ranks):
        seconds = (one.wall, one.compute, one.communication, one.hidden, one.idle)
        lines.append(f"| {number} | " + " | ".join(f"{x:.3f}" for x in seconds) + f" | {_peak(one):.3f} |")
    lines += ["", "Rank 0, by label:", "", "| label | s | share |", "|---|---|---|"]
    lines += [f"| {name} | {value:.3f} | {value / first.wall:.1%} |" for name, value in first.spans.items()]
    lines += ["", f"Rank 0, {what}:", "", "| name | calls | ms | share |", "|---|---|---|---|"]
    lines += [
        f"| `{_short(name)}` | {calls:.0f} | {seconds * 1e3:.1f} | {seconds / first.wall:.1%} |"
        for name, calls, seconds in first.operators
    ]
    if first.collectives:
        lines += ["", "Rank 0, collectives (the larger side's bytes):", "", "| name | calls | MiB |", "|---|---|---|"]
        lines += [f"| {name} | {calls:.1f} | {size / 2**20:.2f} |" for name, calls, size in first.collectives]
    return "\n".join(lines)


def figures_of(ranks: list[TraceSummary]) -> "dict[str, Figure]":
    """Charts by name: the split of each rank; labels and operators of rank 0; memory."""
    first = ranks[0]
    what = "Kernels" if first.device == "cuda" else "Operators (self time)"
    labels = [(name, seconds) for name, seconds in first.spans.items() if name != "step"]
    operators = [(_short(name, 32), seconds) for name, _, seconds in first.operators[:15]]
    return {
        "1_ranks": _split(ranks),
        "2_labels": _bars(labels, "Labels of rank 0", first.wall),
        "3_operators": _bars(operators, f"{what} of rank 0", first.wall),
        "4_memory": _memory(ranks),
    }


def _split(ranks: list[TraceSummary]) -> "Figure":
    """One bar per rank, as long as its step."""
    figure, axes = _figure(1.6 + 0.3 * max(2, len(ranks)))
    left = [0.0] * len(ranks)
    for part in PARTS:
        values = [getattr(one, part) for one in ranks]
        axes.barh(range(len(ranks)), values, left=left, color=_COLOURS[part], label=part, height=0.7)
        left = [a + b for a, b in zip(left, values, strict=True)]
    every = max(1, len(ranks) // 16)
    axes.set_yticks(range(0, len(ranks), every), [f"rank {r}" for r in range(0, len(ranks), every)])
    axes.invert_yaxis()
    axes.set(xlabel="seconds per step", title="Where a step's time goes")
    figure.legend(ncols=len(PARTS), loc="outside lower center", frameon=False)
    return _finished(figure, axes)


def _bars(values: list[tuple[str, float]], title: str, wall: float) -> "Figure":
    """Name and seconds, names may repeat; milliseconds per step, and the share of it beside each bar."""
    figure, axes = _figure(1.2 + 0.26 * max(3, len(values)))
    lengths = [seconds * 1e3 for _, seconds in values]
    colours = [_LIGHT if " / " in name else _BLUE for name, _ in values]
    axes.barh(range(len(values)), lengths, color=colours, height=0.7)
    axes.set_yticks(range(len(values)), [name for name, _ in values])
    for row, milliseconds in enumerate(lengths):
        axes.text(milliseconds, row, f" {milliseconds / wall / 1e3:.1%}", va="center", color=_DARK, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(lengths, default=1.0))
    axes.locator_params(axis="x", nbins=5)
    axes.set(xlabel="ms per step (share of the step)", title=title)
    return _finished(figure, axes)


def _memory(ranks: list[TraceSummary]) -> "Figure":
    figure, axes = _figure(4.0)
    highest = sorted(range(len(ranks)), key=lambda r: -_peak(ranks[r]))[:_LINES]
    for r in sorted(highest):
        if ranks[r].memory:
            times, sizes = zip(*ranks[r].memory, strict=True)
            axes.plot(times, sizes, linewidth=1, label=f"rank {r}: {_peak(ranks[r]):.2f} GiB")
    since = "allocated on the GPU" if ranks[0].device == "cuda" else "allocated since tracing began"
    some = f", the {_LINES} highest ranks" if len(ranks) > _LINES else ""
    axes.set(xlabel="seconds", ylabel="GiB", title=f"Memory {since}{some}")
    axes.set_ylim(bottom=0)
    if axes.lines:
        figure.legend(ncols=2, fontsize=8, loc="outside lower center", frameon=False)
    return _finished(figure, axes)


def _figure(height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    # TensorBoard shows images 350 pixels wide: letters must be large for the chart. A click shows all pixels.
    figure = Figure(figsize=(5.2, 0.8 * height), layout="constrained", dpi=200)
    return figure, figure.add_subplot()


def _finished(figure: "Figure", axes: "Axes") -> "Figure":
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.title.set_fontsize(10)
    axes.xaxis.label.set_fontsize(8)
    return figure


def _peak(one: TraceSummary) -> float:
    return max((size for _, size in one.memory), default=0.0)


def _short(name: str, letters: int = 60) -> str:
    """A kernel's name without what would break a table; templates are long."""
    name = name.replace("|", "/").replace("`", "'")
    return name if len(name) <= letters else f"{name[: letters // 2]}…{name[-letters // 2 + 1 :]}"
