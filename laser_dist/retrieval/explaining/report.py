"""An explanation as plain values, and these as tables: on the console and as Markdown, from one description."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from laser_dist.data.inspection.show import safe
from laser_dist.files import replacing, write_json
from laser_dist.retrieval.explaining.passages import Passages
from laser_dist.retrieval.explaining.thoughts import Thoughts

VECTOR = "vector"
_SHOWN_CHARACTERS = 160  # of a passage or a segment, in tables
_NO_SOFT_TOKEN = (
    "K = 1 under the official convention: the vector is the last prompt token's state, and there is no soft token."
)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")


@dataclass(frozen=True)
class Shown:
    """A table, or with no rows a sentence."""

    title: str
    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    note: str = ""


def explanation(
    thoughts: Thoughts, passages: Passages | None, *, parts: Sequence[str], top: int, nearest: int
) -> dict[str, Any]:
    """What is shown of one query, as JSON values; scores are cosines, entropies nats."""
    states, vector = thoughts.states_KD, thoughts.vector_D
    result: dict[str, Any] = {
        "query": thoughts.query,
        "convention": thoughts.convention,
        "steps": len(states),
        "prompt_tokens": thoughts.prompt_tokens,
        "prompt_is_cut": thoughts.prompt_is_cut,
        "state_cosine_with_vector": (states @ vector).tolist(),
    }
    if "tokens" in parts:
        result["soft_tokens"] = _soft_tokens(thoughts, top)
    if "passages" in parts and passages is not None:
        result["nearest"] = _nearest(thoughts, passages, nearest)
    if "segments" in parts and thoughts.segments is not None:
        segments = thoughts.segments
        result["segments"] = {
            "texts": segments.texts,
            "is_cut": segments.is_cut,
            "cosine_KM": (states @ segments.states_MD.T).tolist(),
            "aligned_K": segments.aligned_K,
            "vector_cosine_with_explicit": float(vector @ segments.explicit_D),
        }
    return result


def _soft_tokens(thoughts: Thoughts, top: int) -> list[dict[str, Any]]:
    best = thoughts.probabilities_SV.topk(min(top, thoughts.probabilities_SV.shape[1]), dim=-1)
    rows = []
    for number, (values, ids, entropy) in enumerate(
        zip(best.values.tolist(), best.indices.tolist(), thoughts.entropies_S.tolist(), strict=True), start=1
    ):
        tokens = [
            {"id": token, "text": thoughts.token_text(token), "probability": value}
            for token, value in zip(ids, values, strict=True)
        ]
        rows.append(
            {"number": number, "leads_to_state": thoughts.state_after(number), "entropy": entropy, "top": tokens}
        )
    return rows


def _nearest(thoughts: Thoughts, passages: Passages, k: int) -> list[dict[str, Any]]:
    """For each state and for the vector: the nearest passages."""
    scores, indices = passages.nearest(torch.cat([thoughts.states_KD, thoughts.vector_D[None]]), k)
    texts = passages.texts(set(indices.flatten().tolist()))
    names = [*(f"state {number}" for number in range(1, len(scores))), VECTOR]
    return [
        {
            "of": name,
            "passages": [
                {"id": passages.ids[row], "row": row, "cosine": score, **({"text": texts[row]} if row in texts else {})}
                for score, row in zip(row_scores, rows, strict=True)
            ],
        }
        for name, row_scores, rows in zip(names, scores.tolist(), indices.tolist(), strict=True)
    ]


def tables(one: dict[str, Any]) -> list[Shown]:
    """The parts of an explanation, in the order in which they are read."""
    shown = []
    if "soft_tokens" in one:
        shown.append(_soft_token_table(one))
    if "nearest" in one:
        shown += _nearest_tables(one["nearest"])
    if "segments" in one:
        shown.append(_segment_table(one["segments"]))
    return shown


def _soft_token_table(one: dict[str, Any]) -> Shown:
    title = "Soft tokens: what the model feeds itself"
    if not one["soft_tokens"]:
        return Shown(title, note=_NO_SOFT_TOKEN)
    rows = [
        (
            str(soft["number"]),
            f"state {soft['leads_to_state']}",
            f"{soft['entropy']:.2f}",
            " · ".join(f"{token['text']} {share(token['probability'])}" for token in soft["top"]),
        )
        for soft in one["soft_tokens"]
    ]
    note = "entropy in nats; the likeliest vocabulary tokens with their probabilities"
    return Shown(title, ("soft token", "leads to", "entropy", "tokens"), tuple(rows), note)


def _nearest_tables(nearest: list[dict[str, Any]]) -> list[Shown]:
    ranks = range(len(nearest[-1]["passages"]))
    cells = [[f"{p['id']} {p['cosine']:.3f}" for p in found["passages"]] for found in nearest]
    rows = tuple((str(rank + 1), *(column[rank] for column in cells)) for rank in ranks)
    headings = ("rank", *(found["of"] for found in nearest))
    shown = [Shown("Nearest passages of each latent state, with their cosine", headings, rows)]
    texts = tuple((p["id"], _short(p["text"])) for p in nearest[-1]["passages"] if "text" in p)
    return shown + [Shown("The passages nearest to the vector", ("id", "text"), texts)] * bool(texts)


def _segment_table(segments: dict[str, Any]) -> Shown:
    columns = list(zip(*segments["cosine_KM"], strict=True))  # M rows of K
    rows = tuple(
        (str(m + 1), *(f"{c:.3f}{'*' * (segments['aligned_K'][k] == m)}" for k, c in enumerate(cosines)), _short(text))
        for m, (cosines, text) in enumerate(zip(columns, segments["texts"], strict=True))
    )
    states = (f"state {k + 1}" for k in range(len(segments["cosine_KM"])))
    cut = "; max_explicit_tokens cut the rationale" if segments["is_cut"] else ""
    note = (
        f"* the segment that training aligns the state with; vector and explicit view: cosine "
        f"{segments['vector_cosine_with_explicit']:.3f}{cut}"
    )
    return Shown("Latent states and the rationale's segments, cosines", ("segment", *states, "text"), rows, note)


def print_explanation(one: dict[str, Any]) -> None:
    """The explanation on the console."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(Text(f"\n{safe(one['query'])}", style="bold"))
    console.print(Text(_summary(one), style="dim"))
    for shown in tables(one):
        if not shown.rows:
            console.print(Text(f"{shown.title}. {shown.note}"))
            continue
        table = Table(title=shown.title, title_justify="left", caption=shown.note or None, caption_justify="left")
        for heading in shown.headings:
            table.add_column(heading, overflow="fold")
        for row in shown.rows:
            table.add_row(*(Text(safe(cell)) for cell in row))
        console.print(table)


def write_report(folder: Path, about: dict[str, Any], explained: list[dict[str, Any]]) -> None:
    """explanation.json and explanation.md in `folder`, which exists."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / "explanation.json", {"date": date, **about, "queries": explained})
    blocks = [f"# What {markdown_text(str(about['model']))} thinks\n\n{date}", *map(markdown, explained)]
    with replacing(folder / "explanation.md") as temporary:
        temporary.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def markdown(one: dict[str, Any]) -> str:
    """The explanation as Markdown."""
    blocks = [f"## {markdown_text(one['query'])}", _summary(one)]
    for shown in tables(one):
        blocks.append(f"### {shown.title}")
        if shown.rows:
            lines = [shown.headings, ("---",) * len(shown.headings)]
            lines += [tuple(map(markdown_text, row)) for row in shown.rows]
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        if shown.note:
            blocks.append(markdown_text(shown.note))
    return "\n\n".join(blocks)


def markdown_text(text: str) -> str:
    """The text as Markdown shows it as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", safe(" ".join(text.split())))


def _summary(one: dict[str, Any]) -> str:
    cosines = ", ".join(f"{cosine:.3f}" for cosine in one["state_cosine_with_vector"])
    cut = ", cut" if one["prompt_is_cut"] else ""
    return (
        f"K = {one['steps']}, {one['convention']} convention, prompt of {one['prompt_tokens']} tokens{cut}; "
        f"cosine of each state with the vector: {cosines}"
    )


def share(probability: float) -> str:
    """A probability with three digits, none of which hides that there is one."""
    return f"{probability:.3f}" if probability >= 0.0005 else "<0.001"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
