"""An example on the screen is what the batch holds, and cannot steer the terminal."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from laser_dist.config import TextConfig, ThinkingConfig
from laser_dist.data.inspection.findings import plain
from laser_dist.data.inspection.show import ShownRow, render, safe, shown_rows
from laser_dist.data.schema import Example, Passage
from laser_dist.data.text import TextFormat
from laser_dist.testing import tiny_model_folder

EXAMPLE = Example(
    "q1",
    "why does ice float on water?",
    "The problem is density.\n\nIce is less dense.\n\nSo it floats.\n\nA passage on bonds helps.",
    (Passage("p1", "Ice holds its molecules apart.", "Density"),),
    tuple(Passage(f"n{i}", f"Lake {i} freezes.") for i in range(5)),
    "Find what explains it",
)
THINKING = ThinkingConfig(steps=3)


@pytest.fixture(scope="module", params=["chat", "bos", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    return tiny_model_folder(out, chat_template=request.param == "chat", bos=request.param == "bos")


def text_format(folder: Path, **settings: object) -> TextFormat:
    return TextFormat(AutoTokenizer.from_pretrained(folder), TextConfig(**settings), steps=3)  # type: ignore[arg-type]


def tight(folder: Path) -> TextFormat:
    """A format that cuts query, rationale and passages."""
    text = text_format(folder)
    frame = len(text.head) + len(text.tail)
    return text_format(
        folder, max_query_tokens=frame + 22, max_explicit_tokens=frame + 32, max_passage_tokens=max(8, frame + 6)
    )


def kinds(row: ShownRow) -> list[str]:
    return [part.kind for part in row.parts if part.kind != "template"]


@pytest.mark.parametrize("make", [text_format, tight])
def test_the_parts_are_the_tokens_of_the_batch(folder: Path, make: Callable[[Path], TextFormat]) -> None:
    text = make(folder)
    latent, explicit, *passages = shown_rows(EXAMPLE, text, THINKING)
    batch = text.batch([EXAMPLE], [(*EXAMPLE.positives, *EXAMPLE.negatives[:3])], with_rationale=True)
    assert latent.tokens == batch.prompt_lengths_R[0]
    assert [explicit.tokens, *(row.tokens for row in passages)] == batch.lengths_R.tolist()
    kept = "".join(part.text for part in explicit.parts if not part.is_cut).replace("\u21b5", "").replace("\n", "")
    row = text.tokenizer.decode(batch.tokens_T[: batch.lengths_R[0]])
    assert kept == row.replace("\n", "")
    ends = batch.segment_ends_BM[0].tolist()  # type: ignore[index]
    lengths = [part.tokens for part in explicit.parts if part.kind.startswith("segment")]
    first = int(batch.prompt_lengths_R[0])
    assert [first + sum(lengths[: i + 1]) - 1 for i in range(len(lengths))] == ends
    assert any(part.is_cut for row in (latent, explicit) for part in row.parts) == (make is tight)


def test_what_is_cut_off_is_shown_where_it_was(folder: Path) -> None:
    for loose, cut in zip(*(shown_rows(EXAMPLE, make(folder), THINKING) for make in (text_format, tight)), strict=True):
        texts = ["".join(p.text for p in row.parts if p.kind not in ("template", "EOS")) for row in (loose, cut)]
        whole, shown = (text.replace("\u21b5", "").replace("\n", "") for text in texts)
        # The explicit row repeats the prompt as it was kept: what the prompt lost is shown once, above.
        assert shown == whole if cut.title[:8] != "explicit" else whole.endswith(shown[-30:])
        assert any(part.is_cut for part in cut.parts) or cut.tokens <= cut.limit


def test_roles_segments_and_steps_are_named(folder: Path) -> None:
    latent, explicit, positive, *negatives = shown_rows(EXAMPLE, text_format(folder), THINKING)
    assert kinds(latent) == ["instruction", "query"]
    assert latent.parts[-1].kind == ("template" if text_format(folder).tail else "query")
    instruction, query = (part for part in latent.parts if part.kind != "template")
    assert instruction.text == "Instruct: Find what explains it\u21b5\nQuery:" and query.text == f" {EXAMPLE.query}"
    assert kinds(explicit)[2:] == ["segment", "segment, next", "segment", "segment, next", "EOS"]
    labels = [part.label for part in explicit.parts if part.kind.startswith("segment")]
    assert labels == ["segment 1 -> step 1", "segment 2 -> step 2", "segment 3", "segment 4 -> step 3"]
    assert positive.title == "positive p1" and kinds(positive) == ["passage"] and len(negatives) == 3


@pytest.mark.parametrize(
    ("convention", "labels"),
    [
        ("official", ["segment 1 -> step 1", "segment 2 -> step 2, 3"]),
        ("paper", ["segment 1 -> step 1, 2", "segment 2 -> step 3"]),
    ],
)
def test_steps_share_segments_as_the_convention_says(folder: Path, convention: str, labels: list[str]) -> None:
    example = replace(EXAMPLE, rationale="Ice is less dense.\n\nSo it floats.")
    thinking = ThinkingConfig(steps=3, convention=convention)  # type: ignore[arg-type]
    explicit = shown_rows(example, text_format(folder), thinking)[1]
    assert [part.label for part in explicit.parts if part.kind.startswith("segment")] == labels


def test_without_rationale_there_is_no_explicit_view(folder: Path) -> None:
    text = text_format(folder)
    for rows in (
        shown_rows(Example("q", "why?", "", EXAMPLE.positives), text, THINKING),
        shown_rows(EXAMPLE, text, THINKING, with_rationale=False)[:2],
    ):
        assert [row.title.split()[0] for row in rows] == ["latent", "positive"]


def test_without_colour_brackets_say_what_colour_would(folder: Path) -> None:
    shown = plain(EXAMPLE, shown_rows(EXAMPLE, text_format(folder), THINKING))
    assert "\x1b" not in shown and "and 2 more negatives" in shown
    assert "[ why does ice float on water?]" in shown and "[So it floats." in shown
    assert shown.count("~~") == 2, "the legend only"
    assert plain(EXAMPLE, shown_rows(EXAMPLE, tight(folder), THINKING)).count("~~") > 2


def test_cut_text_is_struck_and_segments_alternate_in_colour(folder: Path) -> None:
    rows = shown_rows(EXAMPLE, tight(folder), THINKING)
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    console.print(render(EXAMPLE, rows, colour=True))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2;9m" in shown and "\x1b[32m" in shown and "\x1b[1;31m" in shown


def test_data_cannot_steer_the_terminal(folder: Path) -> None:
    assert safe("a\x1b[2Jb\x07\u202ec\td\ne") == "a\\x1b[2Jb\\x07\\x202ec\td\ne"
    nasty = "why\x1b[2J [bold]not[/bold] \u202e?"
    example = Example(nasty, nasty, nasty, (Passage(nasty, nasty),))
    shown = plain(example, shown_rows(example, text_format(folder), THINKING))
    assert "\x1b" not in shown and "\u202e" not in shown and "[bold]not[/bold]" in shown
