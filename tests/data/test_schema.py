import json

import pytest

from laser_dist.data.schema import decode_example, encode_example, example_to_row, parse_example, passage_key
from laser_dist.errors import UserError

WHERE = "train.jsonl:7"
OWN = {
    "query_id": "q1",
    "query": "why is the sky blue?",
    "rationale": "Light scatters.\n\nBlue scatters most.",
    "instruction": "Find an explanation",
    "positives": [{"id": "p1", "text": "Rayleigh scattering", "title": "Optics"}],
    "negatives": [{"id": "n1", "text": "The sea is blue"}],
    "domain": "physics",
}
PUBLISHED = {
    "query": OWN["query"],
    "reasoning_query": OWN["rationale"],
    "prompt": OWN["instruction"],
    "positive_passages": [{"docid": "p1", "title": "Optics", "text": "Rayleigh scattering"}],
    "negative_passages": [{"docid": "n1", "title": "", "text": "The sea is blue"}],
}


def test_both_namings_give_the_same_example_and_the_inverse_restores_it():
    own, published = parse_example(OWN, WHERE), parse_example(PUBLISHED, WHERE)
    assert own.positives == published.positives and own.negatives == published.negatives
    assert (own.query, own.rationale, own.instruction) == (published.query, published.rationale, published.instruction)
    for example in (own, published):
        assert parse_example(example_to_row(example), WHERE) == example
    assert example_to_row(own) == {key: value for key, value in OWN.items() if key != "domain"}


def test_flagembeddings_naming_has_texts_for_passages():
    # As ReasonEmbed's training code reads its data: prompt, query, reasoning_query, pos, neg.
    row = {"query": "q", "prompt": "Find it", "reasoning_query": "r", "pos": ["yes", "also"], "neg": ["no"]}
    example = parse_example(row, WHERE)
    assert (example.query, example.instruction, example.rationale) == ("q", "Find it", "r")
    assert [p.text for p in example.positives] == ["yes", "also"] and [p.text for p in example.negatives] == ["no"]
    again = parse_example({**row, "query": "other", "neg": ["yes "]}, WHERE)
    assert again.positives[0].id == example.positives[0].id != again.negatives[0].id  # ids come from the texts
    with pytest.raises(UserError, match=r"train.jsonl:7: pos\[1\]: .* empty"):
        parse_example({**row, "pos": ["yes", " "]}, WHERE)


def test_contradictory_negatives_can_be_left_out():
    negatives = [{"id": "p1", "text": "x"}, *OWN["negatives"], {"id": "n", "text": "Rayleigh scattering"}]
    example = parse_example({**OWN, "negatives": negatives}, WHERE, drop_contradictions=True)
    assert [negative.id for negative in example.negatives] == ["n1"]


def test_ids_may_look_like_paths():
    example = parse_example({**OWN, "query_id": "../../etc/passwd"}, WHERE)
    assert decode_example(encode_example(example), WHERE).query_id == "../../etc/passwd"


def test_derived_query_ids_are_stable_and_tell_other_answers_apart():
    again = parse_example(dict(PUBLISHED), "elsewhere:1").query_id
    other = parse_example({**PUBLISHED, "positive_passages": [{"docid": "p2", "text": "Mie"}]}, WHERE).query_id
    assert parse_example(PUBLISHED, WHERE).query_id == again == "q-" + again[2:] != other


def test_optional_fields_may_be_missing_null_or_blank():
    row = {"query": "q", "rationale": None, "instruction": " ", "positives": [{"text": "t", "title": None}]}
    example = parse_example(row, WHERE)
    assert (example.rationale, example.instruction, example.negatives) == ("", None, ())
    assert example.positives[0].id.startswith("p-") and example.positives[0].title == ""
    assert parse_example({**row, "query_id": 12}, WHERE).query_id == "12"


def test_repeated_passages_are_fine():
    row = {**OWN, "negatives": OWN["negatives"] * 2}
    assert len(parse_example(row, WHERE).negatives) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": None}, ['"query" is missing']),
        ({"query": "  "}, ['"query" is empty']),
        ({"query": 3}, ['"query" must be a string', "a number"]),
        ({"query": "half \ud83d"}, ['"query"', "surrogate", "character 6"]),
        ({"rationale": ["a"]}, ['"rationale" must be a string', "a list"]),
        ({"query_id": True}, ['"query_id" must be a string', "true/false"]),
        ({"positives": None}, ['"positives" is missing']),
        ({"positives": []}, ['"positives" is empty']),
        ({"positives": {"id": "p"}}, ['"positives" must be a list', "an object"]),
        ({"positives": [5]}, ["positives[0]", "must be an object", "a number", '{"id"']),
        ({"query": "a\0b"}, ['"query"', "NUL", "character 2"]),
        ({"positives": [{"text": "t\0"}]}, ["positives[0]", '"text"', "NUL"]),
        ({"query_id": "a\tb"}, ['"query_id"', "tab or line break"]),
        ({"query_id": " a"}, ['"query_id"', "blank at either end"]),
        ({"negatives": [{"id": "n", "text": "x"}, {"id": "m"}]}, ["negatives[1]", '"text" is missing']),
        ({"negatives": [{"id": "n", "text": ""}]}, ["negatives[0]", '"text" is empty']),
        ({"negatives": [{"id": "n", "text": "x", "title": 1}]}, ["negatives[0]", '"title" must be a string']),
        ({"negatives": [{"id": "p1", "text": "x"}]}, ["negatives[0]", "also a positive", "same id"]),
        ({"negatives": [{"id": "n", "text": "Rayleigh scattering"}]}, ["negatives[0]", "same text"]),
    ],
)
def test_defects_name_place_field_and_remedy(change, words):
    with pytest.raises(UserError) as error:
        parse_example({**OWN, **change}, WHERE)
    assert str(error.value).startswith(WHERE)
    assert ": " in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_near_key_is_suggested_but_never_a_known_one():
    row = {key: value for key, value in OWN.items() if key != "query"}
    with pytest.raises(UserError, match='Did you mean "querry"'):
        parse_example({**row, "querry": "x"}, WHERE)
    with pytest.raises(UserError) as error:
        parse_example(row, WHERE)  # "query_id" is near, but is what it is
    assert "Did you mean" not in str(error.value)
    with pytest.raises(UserError, match='Did you mean "positive"'):
        parse_example({"query": "q", "positive": []}, WHERE)


@pytest.mark.parametrize("row", [[], "text", 3, None])
def test_a_row_must_be_an_object(row):
    with pytest.raises(UserError, match="train.jsonl:7: expected a JSON object"):
        parse_example(row, WHERE)


@pytest.mark.parametrize("raw", [b"{", b"\xff{}", b"[" * 100_000, b"9" * 5000, b'{"a": -' + b"9" * 5000])
def test_broken_json_is_named(raw):
    with pytest.raises(UserError, match="train.jsonl:7"):
        decode_example(raw, WHERE)
    assert decode_example(json.dumps(OWN).encode(), WHERE).query_id == "q1"


def test_passage_keys_are_pinned_signed_and_never_zero():
    # Pinned: a change would make keys of an old and a new run differ.
    assert passage_key("p1") == -1723077891436786031
    keys = {passage_key(str(i)) for i in range(2000)}
    assert len(keys) == 2000 and 0 not in keys
    assert min(keys) < 0 < max(keys) and all(-(2**63) <= key < 2**63 for key in keys)
