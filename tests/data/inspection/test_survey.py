"""The counts of a survey, against what the trainer's own batches hold."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from laser_dist.config import TextConfig
from laser_dist.data.inspection import survey as survey_module
from laser_dist.data.inspection.survey import KeyPairs, Lengths, Survey
from laser_dist.data.inspection.suspicion import rules
from laser_dist.data.schema import Example, Passage
from laser_dist.data.text import TextCounts, TextFormat
from laser_dist.testing import tiny_model_folder

SEGMENTS = ["Water is densest near four degrees.", "Ice is less dense.", "So it floats.", "A passage on bonds helps."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), architecture="qwen3", chat_template=True)


def text_format(folder: Path, **settings: int) -> TextFormat:
    return TextFormat(AutoTokenizer.from_pretrained(folder), TextConfig(**settings), steps=3)  # type: ignore[arg-type]


def example(number: int) -> Example:
    query = "why does ice float on water? " * (1 + number % 5)
    rationale = "\n\n".join(SEGMENTS[: 1 + number % 4] * (1 + number % 3))
    positives = tuple(Passage(f"p{number}-{i}", f"Passage {number} {i}. " * (1 + 3 * i)) for i in range(1 + number % 2))
    return Example(f"q{number}", f"{number}: {query}", rationale, positives, (Passage(f"n{number}", "Lakes. " * 20),))


def measured(text: TextFormat, examples: list[Example], at_once: int = 100) -> Survey:
    survey = Survey(text, rules())
    for start in range(0, len(examples), at_once):
        survey.add(examples[start : start + at_once])
    return survey


@pytest.mark.parametrize("limits", [{}, {"max_query_tokens": 60, "max_explicit_tokens": 90, "max_passage_tokens": 40}])
def test_lengths_cuts_and_segments_are_those_of_the_training_batches(folder: Path, limits: dict[str, int]) -> None:
    examples = [example(number) for number in range(30)]
    survey = measured(text_format(folder, **limits), examples, at_once=7)
    text = text_format(folder, **limits)
    passages = [(*e.positives, *e.negatives) for e in examples]
    batches = [text.batch([e], [group], with_rationale=True) for e, group in zip(examples, passages, strict=True)]
    limit = text.config

    def kept(name: str, longest: int) -> Counter[int]:
        return Counter(min(length, longest) for length in survey.lengths[name].counts.elements())

    assert kept("query", limit.max_query_tokens) == Counter(int(b.prompt_lengths_R[0]) for b in batches)
    assert kept("query + rationale", limit.max_explicit_tokens) == Counter(int(b.lengths_R[0]) for b in batches)
    assert kept("passage", limit.max_passage_tokens) == Counter(int(n) for b in batches for n in b.lengths_R[1:])
    assert survey.segments == Counter(int(b.segments_B[0]) for b in batches)  # type: ignore[index]
    counts = text.counts
    assert survey.lengths["query"].cut + survey.lengths["passage"].cut == counts.prompts_cut
    assert survey.lengths["rationale"].cut == survey.lengths["query + rationale"].cut == counts.rationales_cut
    assert survey.summary()["segments"]["fewer_than_steps"] == counts.fewer_segments_than_steps
    assert bool(limits) == (counts.prompts_cut > 0) == (counts.rationales_cut > 0)
    assert isinstance(counts, TextCounts) and counts.fewer_segments_than_steps > 0


def test_rows_without_rationale_are_counted_and_measured_without_one(folder: Path) -> None:
    survey = measured(text_format(folder), [example(0), replace(example(1), rationale="")])
    assert len(survey.lengths["query"]) == 2
    assert len(survey.lengths["rationale"]) == len(survey.lengths["query + rationale"]) == survey.segments.total() == 1
    assert survey.counts["no rationale"] == 1 and survey.suspects["no rationale"] == ["q1"]


def test_a_contrastive_objective_measures_no_rationale(folder: Path) -> None:
    survey = Survey(text_format(folder), rules(), with_rationale=False)
    survey.add([example(0)])
    assert len(survey.lengths["query"]) == 1 and not survey.lengths["rationale"].counts and not survey.segments


def repetitions(survey: Survey) -> dict[str, tuple[int, list[str]]]:
    return {row["name"]: (row["count"], row["examples"]) for row in survey.summary()["repetitions"]}


def test_repetitions_are_found_across_rows(folder: Path) -> None:
    ice, lake = Passage("ice", "Ice floats."), Passage("lake", "Lakes freeze.")
    examples = [
        Example("a", "why?", "one", (ice,), (lake,)),
        Example("b", "why?", "two", (replace(ice, id="copy", text="ICE  floats."),)),  # a copy under another id
        Example("c", "where?", "three", (replace(lake, text="Lakes thaw."),), (ice,)),  # an id with another text
    ]
    assert repetitions(measured(text_format(folder), examples, at_once=1)) == {
        "repeated query": (1, ["b"]),
        "passage with several ids": (1, ["b"]),
        "id with several texts": (1, ["c"]),
        "negative that is a positive": (1, ["c"]),
    }


def test_a_set_without_repetitions_shows_none(folder: Path) -> None:
    found = repetitions(measured(text_format(folder), [replace(example(n), negatives=()) for n in range(9)]))
    assert all(row == (0, []) for row in found.values())


def test_at_most_five_examples_are_named_per_sign(folder: Path) -> None:
    survey = measured(text_format(folder), [replace(example(n), rationale="") for n in range(8)])
    rule = next(r for r in survey.summary()["suspicious"]["rules"] if r["name"] == "no rationale")
    assert rule["rows"] == 8 and rule["examples"] == [f"q{n}" for n in range(5)]
    assert survey.summary()["suspicious"]["rows"] == 8


def test_a_forgotten_passage_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "_REMEMBERED", 2)
    examples = [example(number % 3) for number in range(12)]
    few = measured(text_format(folder), examples, at_once=1)
    monkeypatch.undo()
    assert few.lengths["passage"].counts == measured(text_format(folder), examples).lengths["passage"].counts
    assert len(few._known) <= 2 + 3


@given(st.lists(st.integers(0, 50), min_size=1), st.sampled_from([0, 5, 50, 95, 100]))
def test_percentiles_are_those_of_all_values(values: list[int], percent: int) -> None:
    lengths = Lengths(None)
    lengths.counts.update(values)
    assert lengths.percentile(percent) == np.percentile(values, percent, method="inverted_cdf")


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=40), st.integers(1, 9))
def test_key_pairs_keep_the_first_row_of_each_pair(pairs: list[tuple[int, int]], merge_every: int) -> None:
    table, first = KeyPairs(), {}
    for row, pair in enumerate(pairs):
        table.add(*pair, row)
        first.setdefault(pair, row)
        if row % merge_every == 0:
            table.table()
    assert table.table().tolist() == [[*pair, first[pair]] for pair in sorted(first)]
