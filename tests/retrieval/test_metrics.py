"""Metrics against values worked out by hand, and against the formulas on random runs."""

import math

import numpy as np
import pytest

from laser_dist.retrieval.metrics import METRICS, evaluate_run


def test_hand_computed_values():
    qrels = {"q": {"a": 2, "b": 1, "c": 0, "z": 1}}
    run = {"q": [("c", 0.9), ("b", 0.8), ("x", 0.7), ("a", 0.6)]}
    means, per_query = evaluate_run(run, qrels)
    dcg = 1 / math.log2(3) + 2 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert means == pytest.approx({"ndcg@10": dcg / ideal, "recall@10": 2 / 3, "recall@100": 2 / 3, "mrr@10": 0.5})
    assert tuple(means) == METRICS
    assert per_query == {"q": pytest.approx(means)}


def test_cut_offs():
    def ranked_at(rank):
        run = {"q": [("d" if i == rank else f"x{i}", -float(i)) for i in range(1, 151)]}
        return evaluate_run(run, {"q": {"d": 1}})[0]

    assert ranked_at(10) == pytest.approx(
        {"ndcg@10": 1 / math.log2(11), "recall@10": 1, "recall@100": 1, "mrr@10": 0.1}
    )
    assert ranked_at(11) == {"ndcg@10": 0, "recall@10": 0, "recall@100": 1, "mrr@10": 0}
    assert ranked_at(100)["recall@100"] == 1
    assert ranked_at(101)["recall@100"] == 0


def test_queries_without_results_count_as_zero_and_unknown_queries_do_not_count():
    qrels = {"q": {"d": 1}, "empty": {"d": 1}, "absent": {"d": 1}}
    means, per_query = evaluate_run({"q": [("d", 1.0)], "empty": [], "unjudged": [("d", 1.0)]}, qrels)
    assert means == pytest.approx(dict.fromkeys(METRICS, 1 / 3))
    assert set(per_query) == set(qrels)
    assert per_query["absent"] == dict.fromkeys(METRICS, 0.0)


def test_ties_rank_by_descending_id_whatever_the_order_of_the_run():
    tied = [("a", 1.0), ("b", 1.0), ("c", 1.0)]
    for run in (tied, tied[::-1]):
        assert evaluate_run({"q": run}, {"q": {"b": 1}})[0]["mrr@10"] == 0.5
        assert evaluate_run({"q": run}, {"q": {"a": 1}})[0]["mrr@10"] == pytest.approx(1 / 3)


def test_random_runs_agree_with_the_formulas():
    rng = np.random.default_rng(0)
    qrels, run, expected = {}, {}, []
    for query in map(str, range(50)):
        grades = {str(d): int(g) for d, g in enumerate(rng.integers(0, 3, 300)) if rng.random() < 0.05} | {"0": 1}
        ranking = rng.permutation(300)[:200]
        qrels[query] = grades
        run[query] = [(str(d), 1.0 - i / 1000) for i, d in enumerate(ranking)]
        gains = np.array([grades.get(str(d), 0) for d in ranking])
        discounts = 1 / np.log2(np.arange(2, 12))
        ideal = np.sort(np.array([*grades.values(), *[0] * 10]))[::-1][:10]
        relevant = sum(g > 0 for g in grades.values())
        first = next((1 / (i + 1) for i, g in enumerate(gains[:10]) if g > 0), 0)
        recalls = [(gains[:k] > 0).sum() / relevant for k in (10, 100)]
        expected.append([(gains[:10] * discounts).sum() / (ideal * discounts).sum(), *recalls, first])
    means, per_query = evaluate_run(run, qrels)
    np.testing.assert_allclose([[values[m] for m in METRICS] for values in per_query.values()], expected, atol=1e-12)
    np.testing.assert_allclose(list(means.values()), np.mean(expected, axis=0), atol=1e-12)


def test_numpy_scores_are_taken():
    assert evaluate_run({"q": [("d", np.float32(1))]}, {"q": {"d": 1}})[0]["ndcg@10"] == 1


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="more than once"):
        evaluate_run({"q": [("d", 1.0), ("d", 0.5)]}, {"q": {"d": 1}})
    with pytest.raises(ValueError, match="empty"):
        evaluate_run({}, {})
