"""Each rule on tables by hand: what it must notice, what it must leave alone, and when."""

import dataclasses
import math

import pytest

from laser_dist.config import GuardConfig, ObjectiveConfig, RunConfig
from laser_dist.guard import rules
from laser_dist.guard.rules import CHECKS, RULES, Alarm, Moment, Windows
from laser_dist.objective.evidence import MODULUS
from laser_dist.objective.terms import TERMS

CONFIG = RunConfig(guard=GuardConfig(rank_after=10))
MOMENT = Moment(step=20, queries=32, passages=64, whole_pass=3)
SENT = (7, 11)


def row(rank: int, **changes: float) -> dict[str, float]:
    """A healthy row of one of two ranks."""
    values = {f"loss/{term}": 1.0 for term in TERMS} | {"loss/total": 4.0}
    values |= {"train/positive_mean_rank": 5.0, "train/false_negatives_masked": 0.0}
    values |= {"step": 20.0, "learning_rate": 1e-4, "weights": 12.1}
    values |= {"wrong_labels": 0.0, "without_negatives": 0.0, "sent": SENT[rank], "received": SENT[0] + 3 * SENT[1]}
    values |= {"shortest": 6.0, "shortest_row": 0.0, "typical": 7.0, "spread": 0.4}
    values |= {"queries": 100.0 + rank, "distinct": 16.0, "rationales": 16.0, "short_rationales": 3.0}
    return values | changes


def alarms(table: list[dict[str, float]], windows: Windows | None = None, **changes: object) -> list[Alarm]:
    moment = dataclasses.replace(MOMENT, **changes)
    windows = windows or Windows()
    return [alarm for check in CHECKS if (alarm := check(table, moment, windows, CONFIG))]


def both(**changes: float) -> list[dict[str, float]]:
    return [row(0, **changes), row(1, **changes)]


def test_a_healthy_table_breaks_no_rule():
    windows = Windows()
    for step in range(100):
        table = [row(0, queries=step * 2.0), row(1, queries=step * 2.0 + 1)]
        assert not alarms(table, windows, step=step)


@pytest.mark.parametrize(
    ("table", "rule", "ranks", "words"),
    [
        ([row(0), row(1, **{"loss/kl_output": math.nan})], "finite", (1,), "kl_output on rank 1"),
        ([row(0, **{"loss/total": math.inf}), row(1)], "finite", (0,), "total on rank 0"),
        ([row(0, typical=math.nan, shortest=math.nan), row(1)], "finite", (0,), "row norms on rank 0"),
        ([row(0), row(1, learning_rate=2e-4)], "schedule", (1,), "do not agree on learning_rate"),
        (both(learning_rate=math.nan), "schedule", (0, 1), "learning_rate is not finite"),
        ([row(0), row(1, step=21.0)], "schedule", (1,), "do not agree on step"),
        ([row(0), row(1, wrong_labels=2.0)], "labels", (1,), "2 queries"),
        ([row(0), row(1, received=float(3 * SENT[0] + SENT[1]))], "gather", (1,), "on rank 1"),
        ([row(0), row(1, shortest=0.0, shortest_row=4.0)], "row_norm", (1,), "on rank 1"),
        (both(spread=1e-8), "spread", (), "alike"),
        ([row(0), row(1, without_negatives=1.0)], "negatives", (1,), "on rank 1"),
        ([row(0, distinct=1.0), row(1)], "duplicate", (0,), "all 16 queries are the same one"),
        ([row(0), row(1, queries=100.0)], "duplicate", (0, 1), "ranks 0, 1 have the same queries"),
    ],
)
def test_one_thing_wrong_breaks_its_rule_and_names_the_rank(table, rule, ranks, words):
    found = alarms(table)
    assert [alarm.rule for alarm in found] == [rule]
    assert found[0].ranks == ranks and words in found[0].reason and rule in RULES


def test_a_passage_whose_vector_is_zero_is_named_by_its_row():
    (alarm,) = alarms([row(0), row(1, shortest=0.0, shortest_row=19.0)])
    assert alarm.rows == (19,) and alarm.value == 0 and alarm.limit == pytest.approx(0.007)


def test_all_vectors_zero_is_an_alarm_too():
    """The limit is then 0 as well."""
    assert "row_norm" in [alarm.rule for alarm in alarms(both(shortest=0.0, typical=0.0))]


def test_places_of_gathered_ranks_matter():
    """A plain sum of checksums would not see two ranks' passages in each other's place."""
    swapped = float((SENT[1] + 3 * SENT[0]) % MODULUS)
    assert [alarm.rule for alarm in alarms(both(received=swapped))] == ["gather"]


@pytest.mark.parametrize(("whole_pass", "expected"), [(3, ["duplicate"]), (4, []), (None, [])])
def test_a_batch_may_come_again_in_another_pass(whole_pass, expected):
    windows = Windows()
    assert not alarms(both_ranks(1), windows) and not alarms(both_ranks(2), windows)
    found = alarms(both_ranks(1), windows, whole_pass=whole_pass)
    assert [alarm.rule for alarm in found] == expected
    assert not found or "2 micro-batches ago" in found[0].reason


def both_ranks(number: int) -> list[dict[str, float]]:
    return [row(0, queries=10.0 * number), row(1, queries=10.0 * number + 1)]


def steps_until(rule: str, limit: int = 200, **changes: float) -> int | None:
    windows = Windows()
    for step in range(limit):
        table = [row(0, queries=2.0 * step, **changes), row(1, queries=2.0 * step + 1, **changes)]
        if rule in [alarm.rule for alarm in alarms(table, windows, step=step)]:
            return step
    return None


@pytest.mark.parametrize(("rank", "expected"), [(32.5, 31), (31.6, 31), (30.0, None), (3.5, None)])
def test_a_mean_rank_at_chance_is_an_alarm_once_enough_queries_said_so(rank, expected):
    """1024 queries of 32 a step; the measured ranks are those of 64 passages: shifted labels 31.6, trained 3.5."""
    assert steps_until("mean_rank", **{"train/positive_mean_rank": rank}) == expected


def test_masked_passages_lower_what_chance_is():
    at_chance = {"train/positive_mean_rank": 1 + 31 / 2, "train/false_negatives_masked": 0.5}
    assert steps_until("mean_rank", **at_chance) == 31
    assert steps_until("mean_rank", **at_chance | {"train/false_negatives_masked": 0.0}) is None


def test_short_rationales_are_said_once_and_stop_nothing():
    windows, said = Windows(), 0
    for step in range(40):
        table = [row(r, queries=2.0 * step + r, short_rationales=16.0) for r in range(2)]
        said += "segments" in [alarm.rule for alarm in alarms(table, windows, step=step)]
    assert said == 1 and RULES["segments"].stops is False
    assert steps_until("segments") is None


def test_segments_do_not_matter_where_no_term_uses_them():
    config = RunConfig(objective=ObjectiveConfig(trajectory_weight=0.0))
    windows = Windows()
    for _ in range(40):
        assert rules.segments(both(short_rationales=16.0), MOMENT, windows, config) is None


def test_a_gradient_is_compared_with_a_median_or_with_what_clipping_keeps():
    windows = Windows()
    assert rules.gradient_limit(windows, CONFIG) == math.inf
    windows.norms.extend([20.0] * 40 + [5000.0])
    assert rules.gradient_limit(windows, CONFIG) == 20_000
    windows.norms.extend([1e-6] * 100)  # a small set learned by heart: any query that is not is a million times that
    assert rules.gradient_limit(windows, CONFIG) == 1000
