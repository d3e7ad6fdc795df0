import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laser_dist.data.preparation.lengths import Histogram, Lengths, measure
from laser_dist.data.schema import Example, Passage

LENGTHS = st.lists(st.integers(0, 10**7), min_size=1)


def histogram(lengths) -> Histogram:
    made = Histogram()
    for length in lengths:
        made.add(length)
    return made


@given(LENGTHS, st.sampled_from([0.01, 0.5, 0.95, 0.99, 1.0]))
def test_quantiles_are_exact_when_short_and_near_when_long(lengths, share):
    ordered = sorted(lengths)
    true = next(length for i, length in enumerate(ordered, 1) if i >= share * len(ordered))
    found = histogram(lengths).quantile(share)
    assert abs(found - true) <= (0 if true < 64 else true / 64)


@given(LENGTHS, LENGTHS)
def test_parts_add_up_to_the_whole_also_through_json(first, second):
    parts = Lengths()
    for lengths in (first, second):
        part = Lengths()
        part.add([("query words", length) for length in lengths])
        parts.merge(Lengths.from_json(json.loads(json.dumps(part.to_json()))))
    whole = Lengths()
    whole.add([("query words", length) for length in first + second])
    assert parts.summary() == whole.summary()
    summary = whole.summary()["query"]["words"]
    assert summary["count"] == len(first + second) and summary["max"] == max(first + second)
    assert summary["mean"] == pytest.approx(sum(first + second) / len(first + second), abs=0.01)


def test_an_example_is_measured_in_every_unit():
    example = Example("q", "two words", "one\n\ntwo  three", (Passage("p", "yes"),), (Passage("n", "no no"),) * 2)
    assert sorted(measure(example)) == sorted(
        [("query characters", 9), ("query words", 2), ("rationale characters", 15), ("rationale words", 3)]
        + [("rationale segments", 2), ("positive characters", 3), ("positive words", 1)]
        + [("negative characters", 5), ("negative words", 2)] * 2
    )
    lengths = Lengths()
    lengths.add(measure(Example("q", "a", "", (Passage("p", "yes"),))))
    assert list(lengths.summary()) == ["query", "positive"]
