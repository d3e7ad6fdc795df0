import pytest

from laser_dist.data.schema import parse_example
from laser_dist.data.sources.layouts import RowForm, parse_fields
from laser_dist.errors import UserError

WHERE = "a.jsonl:1"


def read(row, layout="auto", **fields):
    form = RowForm(layout, fields).detect(row, WHERE)
    return form.layout, parse_example(form.apply(row), WHERE)


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "positives": [{"id": "p", "text": "yes"}]},
        {"query": "q", "reasoning_query": "r", "positive_passages": [{"docid": "p", "text": "yes"}]},
        {"query": "q", "prompt": "i", "pos": ["yes"], "neg": ["no"]},
    ],
)
def test_lists_of_passages_are_detected_under_all_their_names(row):
    layout, example = read(row)
    assert layout == "passages" and (example.query, example.positives[0].text) == ("q", "yes")


@pytest.mark.parametrize("query", ["anchor", "query", "question"])
@pytest.mark.parametrize("positive", ["positive", "answer"])
def test_columns_of_texts_are_triplets(query, positive):
    row = {query: "q", positive: "yes", **{f"negative_{i}": f"no {i}" for i in (10, 2, 1)}, "negative_3": None}
    layout, example = read(row)
    assert layout == "triplets" and example.query == "q"
    assert [p.text for p in example.positives] == ["yes"]
    assert [p.text for p in example.negatives] == ["no 1", "no 2", "no 10"]  # by number; empty cells are none


def test_a_triplet_with_one_negative_or_none():
    assert [p.text for p in read({"anchor": "q", "positive": "yes", "negative": "no"})[1].negatives] == ["no"]
    assert read({"anchor": "q", "positive": "yes"})[1].negatives == ()
    rationale = read({"anchor": "q", "positive": "yes", "rationale": "r", "query_id": 7})[1]
    assert (rationale.rationale, rationale.query_id) == ("r", "7")


def test_fields_with_other_names():
    row = {"question": "q", "query": "not this", "cot": "r", "ctxs": [{"pid": "p", "contents": "yes"}], "text": "other"}
    _, example = read(row, query="question", rationale="cot", positives="ctxs", id="pid", text="contents")
    assert (example.query, example.rationale, example.positives[0].id) == ("q", "r", "p")
    _, triplet = read({"a": "q", "b": "yes", "c_1": "no", "negative": "x"}, query="a", positives="b", negatives="c")
    assert (triplet.query, triplet.positives[0].text, [p.text for p in triplet.negatives]) == ("q", "yes", ["no"])


def test_a_mapped_field_that_is_missing_in_a_row_is_missing():
    form = RowForm("passages", {"rationale": "cot"})
    row = {"query": "q", "rationale": "another column", "pos": ["yes"]}
    assert parse_example(form.apply(row), WHERE).rationale == ""


def test_a_layout_can_be_forced():
    row = {"query": "q", "positives": [{"text": "list"}], "positive": "column"}
    assert read(row)[1].positives[0].text == "list"
    assert read(row, layout="triplets")[1].positives[0].text == "column"


@pytest.mark.parametrize(
    ("row", "fields", "words"),
    [
        ({"id": 1, "text": "t"}, {}, "no layout has these fields: id, text.*--fields"),
        ({}, {}, "none"),
        ({"query": "q", "pos": ["p"], "rationales": "r"}, {"rationale": "rationals"}, 'Did you mean "rationales"'),
    ],
)
def test_rows_of_no_layout_are_refused_with_their_fields(row, fields, words):
    with pytest.raises(UserError, match=f"{WHERE}: .*{words}"):
        RowForm("auto", fields).detect(row, WHERE)


def test_rows_that_are_no_objects_are_left_to_the_schema():
    form = RowForm().detect([1], WHERE)
    with pytest.raises(UserError, match="expected a JSON object"):
        parse_example(form.apply([1]), WHERE)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["query"], "write OURS=THEIRS"),
        (["query="], "write OURS=THEIRS"),
        (["querry=q"], 'Did you mean "query"'),
        (["query=a", "query=b"], "given twice"),
    ],
)
def test_wrong_field_pairs(pairs, words):
    with pytest.raises(UserError, match=words):
        parse_fields(pairs)
    assert parse_fields(["query=a=b"]) == {"query": "a=b"}
