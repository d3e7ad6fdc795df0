"""An explanation for TensorBoard: text, images, and queries, thoughts and passages as points in its projector."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from laser_dist.data.inspection.show import safe
from laser_dist.retrieval.explaining.passages import Passages
from laser_dist.retrieval.explaining.report import markdown
from laser_dist.retrieval.explaining.thoughts import Thoughts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ["kind", "query", "text"]


def write_tensorboard(
    folder: Path,
    thoughts: list[Thoughts],
    explained: list[dict[str, Any]],
    figures: "dict[str, Figure]",
    passages: Passages | None,
    more_passages: int,
) -> None:
    """Event files and the projector's TSV files in `folder`; `more_passages` besides the nearest ones become points."""
    from torch.utils.tensorboard import SummaryWriter

    matrix, metadata = points(thoughts, explained, passages, more_passages)
    with SummaryWriter(str(folder)) as writer:
        for number, one in enumerate(explained, start=1):
            writer.add_text(f"explain/query-{number}", markdown(one), 0)
        for name, figure in figures.items():
            writer.add_figure(f"explain/{name}", figure, 0, close=False)
        writer.add_embedding(torch.from_numpy(matrix), metadata, metadata_header=COLUMNS, tag="thoughts")


def points(
    thoughts: list[Thoughts], explained: list[dict[str, Any]], passages: Passages | None, more_passages: int
) -> tuple[np.ndarray, list[list[str]]]:
    """Unit rows [n, dim] and for each of them kind, number of the query, and text (COLUMNS)."""
    blocks: list[np.ndarray] = []
    metadata: list[list[str]] = []

    def add(states_ND: torch.Tensor, rows: list[tuple[str, str, str]]) -> None:
        blocks.append(states_ND.float().numpy() if passages is None else passages.fitted(states_ND))
        metadata.extend([kind, query, _cell(text)] for kind, query, text in rows)

    for number, thought in enumerate(thoughts, start=1):
        query = str(number)
        add(thought.vector_D[None], [("query", query, thought.query)])
        states = [(f"state {k + 1}", query, thought.query) for k in range(len(thought.states_KD))]
        add(thought.states_KD, states)
        if (segments := thought.segments) is not None:
            add(segments.states_MD, [("segment", query, text) for text in segments.texts])
            add(segments.explicit_D[None], [("explicit view", query, thought.query)])
    if passages is not None:
        chosen = _chosen(passages, explained, more_passages)
        texts = passages.texts(set(chosen))
        blocks.append(np.array(passages.vectors[chosen], dtype=np.float32))
        metadata += [["passage", "", _cell(f"{passages.ids[row]} {texts.get(row, '')}")] for row in chosen]
    return np.concatenate(blocks), metadata


def _chosen(passages: Passages, explained: list[dict[str, Any]], more: int) -> list[int]:
    """Rows of the passages that any state is nearest to, and `more` spread evenly over the corpus."""
    near = {p["row"] for one in explained for found in one.get("nearest", []) for p in found["passages"]}
    total = len(passages.ids)
    spread = np.linspace(0, total - 1, min(more, total)).astype(int).tolist() if more else []
    return sorted(near | set(spread))


def _cell(text: str) -> str:
    """One cell of a TSV file: no tabs, no line breaks; never empty, which the projector would skip."""
    text = safe(" ".join(text.split()))
    return text[:200] or "-"
