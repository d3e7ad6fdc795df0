"""One figure per query: heat maps of soft tokens, of the nearest passages' cosines, and of states against segments."""

import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from laser_dist.retrieval.explaining.report import share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PASSAGES = 12
_MOST_CHARACTERS = 22
_ALIGNED = "#D55E00"


def draw(one: dict[str, Any]) -> "Figure":
    """The parts of an explanation, one below the other."""
    from matplotlib.figure import Figure

    # Fonts lack glyphs of some scripts: they are drawn as boxes, and a warning for each would fill the console.
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    parts = [(name, drawer) for name, drawer in _DRAWERS.items() if one.get(name)]
    heights = [1.6 + 0.42 * _rows(one, name) for name, _ in parts] or [1.0]
    # Without pyplot, which would look for a display.
    figure = Figure(figsize=(12, 0.7 + sum(heights)), dpi=120, layout="constrained")
    query = one["query"] if len(one["query"]) <= 110 else one["query"][:109] + "…"
    figure.suptitle(
        _plain(f"{query}\nK = {one['steps']}, {one['convention']} convention"), x=0.01, ha="left", fontsize=11
    )
    if parts:
        panels = np.atleast_1d(figure.subplots(len(parts), 1, height_ratios=heights))
        for axes, (_, drawer) in zip(panels, parts, strict=True):
            drawer(axes, one)
    return figure


def _rows(one: dict[str, Any], name: str) -> int:
    return {"soft_tokens": lambda: len(one[name]), "nearest": lambda: len(one[name])}.get(name, lambda: one["steps"])()


def _draw_soft_tokens(axes: "Axes", one: dict[str, Any]) -> None:
    soft = one["soft_tokens"]
    values = np.array([[token["probability"] for token in row["top"]] for row in soft])
    labels = [f"soft token {row['number']} → state {row['leads_to_state']}\n{row['entropy']:.2f} nats" for row in soft]
    texts = [[f"{_label(token['text'])}\n{share(token['probability'])}" for token in row["top"]] for row in soft]
    _heat(axes, values, texts, labels, [str(i + 1) for i in range(values.shape[1])], limits=(0, values.max()))
    axes.set_title("likeliest vocabulary tokens and their probability", fontsize=10, loc="left")


def _draw_nearest(axes: "Axes", one: dict[str, Any]) -> None:
    nearest = one["nearest"]
    # By the best rank that any state gives them; the vector's own first.
    seen = {p["id"]: None for rank in zip(*(row["passages"] for row in reversed(nearest)), strict=True) for p in rank}
    ids = list(seen)[:_MOST_PASSAGES]
    values = np.full((len(nearest), len(ids)), np.nan)
    texts = [[""] * len(ids) for _ in nearest]
    for i, row in enumerate(nearest):
        for rank, passage in enumerate(row["passages"], start=1):
            if passage["id"] in ids:
                j = ids.index(passage["id"])
                values[i, j], texts[i][j] = passage["cosine"], f"{passage['cosine']:.3f}\nrank {rank}"
    limits = (np.nanmin(values), np.nanmax(values))
    _heat(axes, values, texts, [row["of"] for row in nearest], [_label(i) for i in ids], limits=limits)
    axes.set_title("nearest passages and their cosine (blank: not among the nearest)", fontsize=10, loc="left")


def _draw_segments(axes: "Axes", one: dict[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    segments = one["segments"]
    values = np.array(segments["cosine_KM"])
    texts = [[f"{value:.3f}" for value in row] for row in values]
    states = [f"state {k + 1}" for k in range(len(values))]
    most = max(_MOST_CHARACTERS, 130 // len(segments["texts"]) - 4)
    columns = [f"{m + 1}: {_label(text, most)}" for m, text in enumerate(segments["texts"])]
    _heat(axes, values, texts, states, columns, limits=(values.min(), values.max()))
    for k, m in enumerate(segments["aligned_K"]):
        axes.add_patch(Rectangle((m - 0.5, k - 0.5), 1, 1, fill=False, edgecolor=_ALIGNED, linewidth=2.5))
    axes.set_title("cosine of states and rationale segments (framed: aligned in training)", fontsize=10, loc="left")


def _heat(
    axes: "Axes",
    values: np.ndarray,
    texts: list[list[str]],
    rows: list[str],
    columns: list[str],
    *,
    limits: tuple[float, float],
) -> None:
    axes.imshow(values, cmap="Blues", aspect="auto", vmin=limits[0], vmax=max(limits[1], limits[0] + 1e-6))
    middle = sum(limits) / 2
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            dark = values[i, j] > middle
            axes.text(j, i, _plain(text), ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    slanted = {"rotation": 20, "ha": "right"} if max(map(len, columns)) * len(columns) > 140 else {}
    axes.set_xticks(range(len(columns)), list(map(_plain, columns)), fontsize=8, **slanted)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _label(text: str, most: int = _MOST_CHARACTERS) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _plain(text: str) -> str:
    """Two dollars would begin a formula."""
    return text.replace("$", r"\$")


_DRAWERS = {"soft_tokens": _draw_soft_tokens, "nearest": _draw_nearest, "segments": _draw_segments}
