"""One example as the trainer sees it: rows and their parts, after templates, truncation and segmentation."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from laser_dist.batch import TokenSequence
from laser_dist.config import ThinkingConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.text import TextFormat

if TYPE_CHECKING:
    from rich.console import RenderableType

_NEGATIVES_SHOWN = 3
STYLES = {  # of a part's text on a terminal; segments alternate between two
    "template": "magenta",
    "instruction": "cyan",
    "query": "bold cyan",
    "passage": "blue",
    "segment": "green",
    "segment, next": "yellow",
    "EOS": "bold red",
    "cut off": "dim strike",
}
# What a terminal would obey (escape sequences) or what would reorder a line.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Part:
    """Consecutive tokens with one role; `kind` is a key of STYLES."""

    kind: str
    label: str
    tokens: int
    text: str

    @property
    def is_cut(self) -> bool:
        return self.kind == "cut off"


@dataclass(frozen=True)
class ShownRow:
    """One row of a batch."""

    title: str
    limit: int  # tokens
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts if not part.is_cut)


def shown_rows(
    example: Example, text: TextFormat, thinking: ThinkingConfig, *, with_rationale: bool = True
) -> list[ShownRow]:
    """Both views of the query (the explicit one if there is a rationale), every positive and the first negatives."""
    (whole,) = text.whole_queries([example], with_rationale=with_rationale)
    cut = text.cut_query(whole)
    limits, prompt = text.config, tuple(_prompt_parts(example, whole.prompt, cut.prompt, text))
    rows = [ShownRow(f"latent view of the query: {thinking.steps} steps follow", limits.max_query_tokens, prompt)]
    if cut.segment_ends:
        kept = tuple(part for part in prompt if not part.is_cut)
        parts = (*kept, *_rationale_parts(whole, cut, text, thinking), Part("EOS", "EOS", 1, _decode(text, [text.eos])))
        rows.append(ShownRow("explicit view: the same prompt, rationale, EOS", limits.max_explicit_tokens, parts))
    passages = [("positive", p) for p in example.positives]
    passages += [("negative", p) for p in example.negatives[:_NEGATIVES_SHOWN]]
    for kind, passage in passages:
        (prompt_ids,) = text.whole_passages([passage])
        parts = tuple(_passage_parts(passage, prompt_ids, text))
        rows.append(ShownRow(f"{kind} {passage.id}", limits.max_passage_tokens, parts))
    return rows


def render(example: Example, rows: Sequence[ShownRow], *, colour: bool) -> "RenderableType":
    """The rows for a rich console; without colour, brackets show where a part begins and ends."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    left_out = len(example.negatives) - _NEGATIVES_SHOWN
    blocks: list[RenderableType] = [Text(f"example {safe(example.query_id)}", style="bold reverse")]
    for row in rows:
        blocks.append(Text(f"\n{safe(row.title)} ({row.tokens:,} tokens, limit {row.limit:,})", style="bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for part in row.parts:
            style = STYLES[part.kind]
            shown = part.text if colour else f"~~{part.text}~~" if part.is_cut else f"[{part.text}]"
            table.add_row(Text(f"  {part.label}", style=style), Text(f"{part.tokens:,}"), Text(shown, style=style))
        blocks.append(table)
    if left_out > 0:
        blocks.append(Text(f"\n... and {left_out} more negatives"))
    return Group(*blocks, Text(""))


def legend(*, colour: bool) -> "RenderableType":
    """What colours, brackets and signs mean."""
    from rich.text import Text

    line = Text("role, tokens, text; ")
    if colour:
        for kind, style in STYLES.items():
            line.append(kind, style=style).append(" ")
    else:
        line.append("[kept] ~~cut off by truncation~~")
    return line.append("; \u21b5 is a line break, -> the latent steps aligned with a segment")


def safe(text: str) -> str:
    """The text with control characters spelled out, so that data cannot steer a terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _prompt_parts(example: Example, whole: list[int], cut: list[int], text: TextFormat) -> Iterator[Part]:
    ids, lost = _content(whole, cut, text)
    decoded = _plain(text, ids)
    before = text.config.query_template.partition("{query}")[0]
    before = before.format(instruction=example.instruction or text.config.instruction)
    split = _tokens_within(ids, len(before), text) if before and decoded.startswith(before) else 0
    yield from _template(text.head, text)
    if split:
        yield Part("instruction", "instruction", split, _decode(text, ids[:split]))
    if ids[split:]:
        yield Part("query", "query", len(ids) - split, _decode(text, ids[split:]))
    yield from _lost(lost, text)
    yield from _template(text.tail, text)


def _passage_parts(passage: Passage, whole: list[int], text: TextFormat) -> Iterator[Part]:
    ids, lost = _content(whole, text.cut_passage(whole), text)
    yield from _template(text.head, text)
    if ids:
        yield Part("passage", "title, text" if passage.title else "text", len(ids), _decode(text, ids))
    yield from _lost(lost, text)
    yield from _template(text.tail, text)


def _rationale_parts(
    whole: TokenSequence, cut: TokenSequence, text: TextFormat, thinking: ThinkingConfig
) -> Iterator[Part]:
    import torch

    from laser_dist.model.thinking import aligned_segments

    assert cut.rationale is not None and cut.segment_ends is not None and whole.rationale is not None
    segments = len(cut.segment_ends)
    aligned = aligned_segments(torch.tensor([segments]), thinking.steps, thinking.convention)[0].tolist()
    start = 0
    for number, end in enumerate(cut.segment_ends):
        steps = ", ".join(str(step) for step, segment in enumerate(aligned, 1) if segment == number)
        label = f"segment {number + 1}" + (f" -> step {steps}" if steps else "")
        ids = cut.rationale[start : end + 1]
        yield Part("segment, next" if number % 2 else "segment", label, len(ids), _decode(text, ids))
        start = end + 1
    if rest := cut.rationale[start:]:  # a tokenizer that adds something behind the last character
        yield Part("template", "rest", len(rest), _decode(text, rest))
    yield from _lost(whole.rationale[len(cut.rationale) :], text)


def _content(whole: list[int], cut: list[int], text: TextFormat) -> tuple[list[int], list[int]]:
    """The ids between head and tail that are kept, and those that truncation takes away."""
    first, behind = len(text.head), len(text.tail)
    kept = cut[first : len(cut) - behind]
    return kept, whole[first + len(kept) : len(whole) - behind]


def _tokens_within(ids: list[int], characters: int, text: TextFormat) -> int:
    """How many of the first tokens end within the first `characters`."""
    counts = range(len(ids) + 1)
    return bisect_right(counts, characters, key=lambda count: len(_plain(text, ids[:count]))) - 1


def _template(ids: list[int], text: TextFormat) -> Iterator[Part]:
    if ids:
        # On one line: it is the same in every row.
        yield Part("template", "template", len(ids), _decode(text, ids).replace("\n", ""))


def _lost(ids: list[int], text: TextFormat) -> Iterator[Part]:
    if ids:
        yield Part("cut off", "cut off", len(ids), _decode(text, ids))


def _decode(text: TextFormat, ids: list[int]) -> str:
    return safe(_plain(text, ids)).replace("\n", "\u21b5\n").removesuffix("\n")


def _plain(text: TextFormat, ids: list[int]) -> str:
    return str(text.tokenizer.decode(ids))
