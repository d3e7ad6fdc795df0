"""What `inspect` found as a folder: report.json, charts (PNG), and the same for TensorBoard."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laser_dist.data.inspection.survey import Lengths, Survey
from laser_dist.files import sync_folder, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("report.json", "lengths.png", "segments.png", "tensorboard")
_BLUE, _DARK, _RED = "#4878a8", "#222222", "#c0392b"
_BINS = 40


def write_report(folder: Path, survey: Survey, report: dict[str, Any], examples: list[str]) -> None:
    """Write FILES into `folder`, which exists. `examples` are plain renderings."""
    figures = {"lengths": lengths_figure(survey.lengths), "segments": segments_figure(survey)}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
    _write_tensorboard(folder / "tensorboard", survey, report, examples, figures)
    write_json(folder / "report.json", report)
    sync_folder(folder)


def lengths_figure(lengths: dict[str, Lengths]) -> "Figure":
    """A histogram per field, with median, 95th percentile and the limit that training cuts at."""
    figure, panels = _figure(2, 2, (12, 8.5))
    for axes, (name, found) in zip(panels, lengths.items(), strict=True):
        _draw_lengths(axes, name, found)
    figure.suptitle("Tokens per text before truncation, template included")
    return figure


def segments_figure(survey: Survey) -> "Figure":
    """How many segments rationales have, those with fewer than K in another colour."""
    figure, (axes,) = _figure(1, 1, (8, 4.5))
    steps, rationales = survey.text.steps, survey.segments.total()
    if not rationales:
        axes.text(0.5, 0.5, "no rationales", ha="center", va="center", transform=axes.transAxes)
        return figure
    last = min(max(survey.segments), 30)  # what lies beyond joins the last bar
    counts = np.zeros(last + 1, dtype=np.int64)
    for segments, number in survey.segments.items():
        counts[min(segments, last)] += number
    few = [m for m in range(len(counts)) if m < steps]
    many = [m for m in range(len(counts)) if m >= steps]
    share = counts[few].sum() / rationales
    axes.bar(few, counts[few], color=_RED, label=f"M < K: {share:.1%}")
    axes.bar(many, counts[many], color=_BLUE, label=f"M ≥ K: {1 - share:.1%}")
    axes.axvline(steps - 0.5, color=_DARK, linestyle="--", label=f"K = {steps} latent steps")
    labels = [f"{m}+" if m == last < max(survey.segments) else str(m) for m in range(1, last + 1)]
    axes.set_xticks(range(1, last + 1), labels)
    axes.set_xlim(0.4, max(last, steps) + 0.6)
    axes.set(xlabel="segments per rationale (M), after truncation", ylabel="rationales")
    axes.set_title(f"Segments of {rationales:,} rationales")
    _finish(axes)
    return figure


def _draw_lengths(axes: "Axes", name: str, lengths: Lengths) -> None:
    values, counts = lengths.distribution()
    if not len(values):
        axes.set_title(f"{name}: none")
        axes.set_axis_off()
        return
    # A few giants would leave one bar: what lies beyond is counted in the last one, and said.
    limit = lengths.limit or 0
    end = int(max(min(values[-1], 3 * lengths.percentile(99)), 1)) + 1
    beyond = int(counts[values > end].sum())
    width = max(1, -(-end // _BINS))
    edges = np.arange(0, end + width, width)
    axes.hist(np.minimum(values, edges[-1] - 1), bins=edges.tolist(), weights=counts, color=_BLUE)
    for percent, style in ((50, "-"), (95, "--")):
        at = lengths.percentile(percent)
        axes.axvline(at, color=_DARK, linestyle=style, label=f"p{percent}: {at:,} tokens")
    if limit:
        share = f"{lengths.cut / len(lengths):.1%} cut"
        if limit <= 1.5 * edges[-1]:
            axes.axvline(limit, color=_RED, linewidth=2, label=f"limit: {limit:,} tokens, {share}")
        else:
            axes.plot([], [], color=_RED, linewidth=2, label=f"limit: {limit:,} tokens (off), {share}")
    if beyond:
        axes.plot([], [], " ", label=f"last bar: {beyond:,} beyond, at most {values[-1]:,}")
    axes.set_title(f"{name}: {len(lengths):,} texts")
    axes.set(xlabel="tokens", ylabel="texts")
    axes.set_xlim(left=0)
    _finish(axes)


def _figure(rows: int, columns: int, inches: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    # Without pyplot, which would look for a display.
    figure = Figure(figsize=inches, dpi=120, layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).flat)


def _finish(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    # Below the chart, where it covers nothing.
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize="small")


def _write_tensorboard(
    folder: Path, survey: Survey, report: dict[str, Any], examples: list[str], figures: "dict[str, Figure]"
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, lengths in survey.lengths.items():
            tag = name.replace(" + ", "_and_")
            _add_histogram(writer, f"inspect/tokens/{tag}", *lengths.distribution())
            writer.add_scalar(f"inspect/cut/{tag}", lengths.cut / max(1, len(lengths)), 0)
        segments = sorted(survey.segments)
        counts = [survey.segments[m] for m in segments]
        _add_histogram(writer, "inspect/segments", np.array(segments), np.array(counts))
        writer.add_scalar("inspect/fewer_segments_than_steps", report["segments"]["fewer_than_steps_share"], 0)
        writer.add_scalar("inspect/suspicious_rows", report["suspicious"]["share"], 0)
        for name, figure in figures.items():
            writer.add_image(f"inspect/{name}", _pixels(figure), 0, dataformats="HWC")
        for number, shown in enumerate(examples):
            # Four blanks make a block that Markdown leaves alone, whatever the text holds.
            writer.add_text(f"inspect/example_{number}", "\n".join(f"    {line}" for line in shown.splitlines()), 0)


def _add_histogram(writer: Any, tag: str, values: np.ndarray, counts: np.ndarray) -> None:
    """Exact counts, without making a list of all values again."""
    if len(values):
        width = int(values[-1]) // 100 + 1  # a whole number, or bins would hold unequally many lengths
        edges = np.arange(0, values[-1] + 1 + width, width)
        binned, _ = np.histogram(values, bins=edges, weights=counts)
        total, squares = float((values * counts).sum()), float((values.astype(float) ** 2 * counts).sum())
        writer.add_histogram_raw(
            tag, float(values[0]), float(values[-1]), int(counts.sum()), total, squares, edges[1:], binned, 0
        )


def _pixels(figure: "Figure") -> np.ndarray:
    """(height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
