"""Text to tokens: templates, truncation that keeps the tail, segments found in the text, packing."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from laser_dist.batch import TokenSequence, pack
from laser_dist.config import TextConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.text import TextFormat, segment_last_characters
from laser_dist.errors import UserError
from laser_dist.testing import tiny_model_folder

RATIONALE = "The essential problem is density.\n\nIce is less dense than water.\n \nSo it floats."


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "plain": tiny_model_folder(root / "plain"),
        "bos": tiny_model_folder(root / "bos", bos=True),
        "chat": tiny_model_folder(root / "chat", architecture="qwen3", chat_template=True),
    }


def text_format(folder: Path, **settings: object) -> TextFormat:
    return TextFormat(AutoTokenizer.from_pretrained(folder), TextConfig(**settings), steps=3)  # type: ignore[arg-type]


def test_query_has_instruction_and_passage_has_none(tokenizers: dict[str, Path]) -> None:
    text = text_format(tokenizers["plain"])
    decode = text.tokenizer.decode
    assert decode(text.query("why?", "Find it")) == "Instruct: Find it\nQuery: why?"
    assert decode(text.query("why?")).startswith("Instruct: Given a query")
    assert decode(text.passage(Passage("1", "Ice floats."))) == "Ice floats."
    assert decode(text.passage(Passage("1", "Ice floats.", "Density"))) == "Density\nIce floats."


def test_chat_template_wraps_with_an_empty_think_block(tokenizers: dict[str, Path]) -> None:
    text = text_format(tokenizers["chat"])
    rendered = text.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ice floats."}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text.tokenizer.decode(text.passage(Passage("1", "Ice floats."))) == rendered
    assert rendered.endswith("<think>\n\n</think>\n\n")
    never = text_format(tokenizers["chat"], chat_template="never")
    assert never.tokenizer.decode(never.passage(Passage("1", "Ice floats."))) == "Ice floats."


def test_truncation_shortens_the_content_and_keeps_the_tail(tokenizers: dict[str, Path]) -> None:
    """Right truncation of the rendered prompt cut the think block off, so thinking began in the middle of a word."""
    text = text_format(tokenizers["chat"], max_query_tokens=40)
    prompt = text.query("why does ice float on water " * 50)
    assert len(prompt) == 40
    assert prompt[-len(text.tail) :] == text.tail and prompt[: len(text.head)] == text.head
    assert text.counts.prompts_cut == 1


def test_template_longer_than_the_limit_is_refused(tokenizers: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="text.max_query_tokens = 8: the chat template alone takes"):
        text_format(tokenizers["chat"], max_query_tokens=8)


def test_bos_comes_first_where_the_tokenizer_adds_one(tokenizers: dict[str, Path]) -> None:
    """Without the BOS that a model was trained with, published retrievers lost almost all their quality."""
    text = text_format(tokenizers["bos"])
    assert text.query("why?")[0] == text.tokenizer.bos_token_id
    assert text.query("why?").count(text.tokenizer.bos_token_id) == 1
    plain = text_format(tokenizers["plain"])
    assert plain.tokenizer.bos_token_id not in plain.query("why?")


def test_segments_end_at_blank_lines_in_the_text_whatever_the_tokenizer_merges(tokenizers: dict[str, Path]) -> None:
    """Looking for one newline token id found 2 of 6 breaks, because BPE merges '.\\n\\n' into one token."""
    text = text_format(tokenizers["plain"])
    ids, ends = text.rationale(RATIONALE, budget=500)
    merged = [token for token in ids if text.tokenizer.decode([token]).startswith(".\n")]
    assert merged, "the tokenizer no longer merges full stop and newline: the test has lost its point"
    pieces = [text.tokenizer.decode(ids[a + 1 : b + 1]) for a, b in zip([-1, *ends], ends, strict=False)]
    assert [piece.strip() for piece in pieces] == [part.strip() for part in RATIONALE.split("\n\n")][:1] + [
        "Ice is less dense than water.",
        "So it floats.",
    ]


@pytest.mark.parametrize(
    ("text", "segments"),
    [("one", 1), ("one\n\n\n\ntwo", 2), ("\n\none\n\n", 1), ("one\n\t\ntwo\nstill two\n\nthree", 3), ("a\r\n\r\nb", 2)],
)
def test_blank_lines_make_segments(text: str, segments: int) -> None:
    assert len(segment_last_characters(text)) == segments


def test_a_cut_rationale_ends_its_last_segment_at_the_cut(tokenizers: dict[str, Path]) -> None:
    text = text_format(tokenizers["plain"])
    whole, ends = text.rationale(RATIONALE, budget=500)
    budget = ends[0] + 3
    ids, cut_ends = text.rationale(RATIONALE, budget=budget)
    assert ids == whole[:budget]
    assert cut_ends == [ends[0], budget - 1]
    assert text.counts.rationales_cut == 1 and text.counts.fewer_segments_than_steps == 1


def test_rationale_never_pushes_the_row_over_its_limit(tokenizers: dict[str, Path]) -> None:
    text = text_format(tokenizers["plain"], max_query_tokens=30, max_explicit_tokens=44)
    example = Example("q", "why does ice float " * 20, RATIONALE * 5, (Passage("p", "x"),))
    batch = text.batch([example], [example.positives], with_rationale=True)
    assert batch.prompt_lengths_R.tolist()[0] == 30
    assert batch.lengths_R.tolist()[0] == 44
    assert batch.tokens_T[43] == text.eos


def test_empty_rationale_is_refused_by_name(tokenizers: dict[str, Path]) -> None:
    """The published code encoded query + query instead."""
    text = text_format(tokenizers["plain"])
    with pytest.raises(UserError, match="query 'q7' has no rationale"):
        text.training_query(Example("q7", "why?", "  ", (Passage("p", "x"),)), with_rationale=True)


def test_tokenizer_without_eos_is_refused(tokenizers: dict[str, Path]) -> None:
    text = text_format(tokenizers["plain"])
    text.tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token.*set eos_token"):
        text.require_eos()


def test_padding_side_is_irrelevant(tokenizers: dict[str, Path]) -> None:
    """Rows are packed, so right padding cannot be silently wrong."""
    left, right = text_format(tokenizers["plain"]), text_format(tokenizers["plain"])
    left.tokenizer.padding_side, right.tokenizer.padding_side = "left", "right"
    assert left.query("why?") == right.query("why?")


def test_pack_lays_rows_end_to_end() -> None:
    rows = [TokenSequence([5, 6], [7, 8, 9], [0, 2]), TokenSequence([3], [4], [0]), TokenSequence([1, 2, 3])]
    batch = pack(rows, 99, queries=2)
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9, 99, 3, 4, 99, 1, 2, 3]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2]
    assert batch.lengths_R.tolist() == [6, 3, 3]
    assert batch.prompt_lengths_R.tolist() == [2, 1, 3]
    assert batch.segment_ends_BM is not None and batch.segments_B is not None
    assert batch.segment_ends_BM.tolist() == [[2, 4], [7, 7]]
    assert torch.equal(batch.segments_B, torch.tensor([2, 1]))


def test_keys_name_all_positives_of_a_query(tokenizers: dict[str, Path]) -> None:
    text = text_format(tokenizers["plain"])
    a, b, c = (Passage(name, name) for name in "abc")
    examples = [Example("1", "x", "r", (a, b)), Example("2", "y", "r", (c,))]
    batch = text.batch(examples, [(b, c), (c, a)], with_rationale=False)
    key = {name: batch.passage_keys_P[i] for i, name in enumerate("bcca")}  # type: ignore[index]
    assert batch.labels_B.tolist() == [0, 2]  # type: ignore[union-attr]
    assert batch.positive_keys_BX.tolist() == [[key["a"], key["b"]], [key["c"], key["c"]]]  # type: ignore[union-attr]
    assert not batch.has_rationale


def plain_rationale(text: TextFormat, rationale: str, budget: int) -> tuple[list[int], list[int]]:
    """As `TextFormat.rationale`, one text at a time and token by token."""
    encoded = text.tokenizer(rationale.strip(), add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"][:budget], encoded["offset_mapping"][:budget]
    ends: list[int] = []
    for last_character in segment_last_characters(rationale.strip()):
        covering = [i for i, (start, _) in enumerate(offsets) if start <= last_character]
        if covering and covering[-1] not in ends:
            ends.append(covering[-1])
    return ids, ends


def plain_prompt(text: TextFormat, content: str, longest: int) -> list[int]:
    room = longest - len(text.head) - len(text.tail)
    return text.head + text.tokenizer(content, add_special_tokens=False)["input_ids"][:room] + text.tail


# Words, blank lines of several kinds, full stops that merge with them, and characters of up to four bytes.
_PIECES = st.sampled_from(
    ["ice", " floats", ".", "\n", "\n\n", "\n \n", "\r\n\r\n", " ", "\t", "é", "水", "🧊", "\u200d", "<think>"]
)
_TEXTS = st.lists(_PIECES, max_size=40).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    rationales=st.lists(_TEXTS, min_size=1, max_size=3), cut=st.integers(2, 60), kind=st.sampled_from(["bos", "chat"])
)
def test_tokenising_a_batch_at_once_gives_what_one_text_at_a_time_gives(
    tokenizers: dict[str, Path], rationales: list[str], cut: int, kind: str
) -> None:
    frame = 60
    text = text_format(
        tokenizers[kind], max_query_tokens=frame, max_passage_tokens=frame, max_explicit_tokens=frame + cut
    )
    rationales = [f"Ice{rationale}" for rationale in rationales]
    examples = [Example(str(i), r, r, (Passage(f"p{i}", r, "T"),)) for i, r in enumerate(rationales)]
    batch = text.batch(examples, [e.positives for e in examples], with_rationale=True)
    rows, all_ends = [], []
    for example in examples:
        prompt = plain_prompt(text, f"Instruct: {text.config.instruction}\nQuery: {example.query}", frame)
        ids, ends = plain_rationale(text, example.rationale, frame + cut - len(prompt) - 1)
        all_ends.append([sum(map(len, rows)) + len(prompt) + end for end in ends])
        rows.append(prompt + ids + [text.eos])
        for budget in (0, 1, cut):
            assert text.rationale(example.rationale, budget) == plain_rationale(text, example.rationale, budget)
    rows += [plain_prompt(text, f"T\n{rationale}".strip(), frame) for rationale in rationales]
    assert batch.tokens_T.tolist() == sum(rows, [])
    assert batch.segment_ends_BM is not None and batch.segments_B is not None
    found = zip(batch.segment_ends_BM.tolist(), batch.segments_B.tolist(), strict=True)
    assert [ends[:count] for ends, count in found] == all_ends


def test_whole_rows_are_cut_to_what_training_sees(tokenizers: dict[str, Path]) -> None:
    text = text_format(tokenizers["chat"], max_query_tokens=50, max_explicit_tokens=60)
    example = Example("q", "why does ice float on water?", RATIONALE, (Passage("p", "x"),))
    (whole,) = text.whole_queries([example], with_rationale=True)
    cut = text.cut_query(whole)
    assert cut == text.training_query(example, with_rationale=True)
    assert len(whole.prompt) > len(cut.prompt) == 50 and len(whole.rationale or []) > len(cut.rationale or []) == 9
    assert text.whole_queries([example], with_rationale=False) == [TokenSequence(whole.prompt)]


def test_a_whole_row_without_rationale_has_no_segment(tokenizers: dict[str, Path]) -> None:
    text = text_format(tokenizers["plain"])
    (whole,) = text.whole_queries([Example("q", "why?", " ", (Passage("p", "x"),))], with_rationale=True)
    assert whole.rationale == whole.segment_ends == []
