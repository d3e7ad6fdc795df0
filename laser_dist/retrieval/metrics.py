"""Retrieval metrics, computed by trec_eval (through pytrec_eval), so that they mean what they mean elsewhere."""

from collections.abc import Mapping, Sequence

import pytrec_eval

METRICS = ("ndcg@10", "recall@10", "recall@100", "mrr@10")
Run = dict[str, list[tuple[str, float]]]
"""query id -> (passage id, score), best first."""


def evaluate_run(
    run: Mapping[str, Sequence[tuple[str, float]]], qrels: Mapping[str, Mapping[str, int]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Score a run: ({metric: mean}, {query id: {metric: value}}), each in [0, 1], for the metrics in METRICS.

    The means are over all queries of `qrels`; one that the run lacks counts as 0, and one that only the run has is
    ignored. nDCG uses linear gains (trec_eval's, and BEIR's); mrr@10 is 1/rank of the first relevant passage, 0 beyond
    rank 10. Passages with equal scores rank as in trec_eval, by descending id, whatever their order in the run: the
    numbers are deterministic, and trec_eval repeats them from a run file.

    Raises ValueError for empty qrels and for a passage that a query's ranking holds twice.
    """
    if not qrels:
        raise ValueError("qrels are empty: there is nothing to evaluate")
    rankings = {query: dict(run[query]) for query in qrels if run.get(query)}
    for query, ranking in rankings.items():
        if len(ranking) != len(run[query]):
            raise ValueError(f"query {query!r}: a passage is ranked more than once")
    judgements = {query: dict(grades) for query, grades in qrels.items()}
    evaluator = pytrec_eval.RelevanceEvaluator(judgements, {"ndcg_cut.10", "recall.10,100", "recip_rank"})
    found = evaluator.evaluate({query: _floats(ranking) for query, ranking in rankings.items()})
    per_query = {query: _named(found[query]) if query in found else dict.fromkeys(METRICS, 0.0) for query in qrels}
    means = {name: sum(values[name] for values in per_query.values()) / len(per_query) for name in METRICS}
    return means, per_query


def _floats(ranking: Mapping[str, float]) -> dict[str, float]:
    # pytrec_eval refuses numpy's numbers.
    return {passage: float(score) for passage, score in ranking.items()}


def _named(measures: Mapping[str, float]) -> dict[str, float]:
    reciprocal_rank = measures["recip_rank"]
    return {
        "ndcg@10": measures["ndcg_cut_10"],
        "recall@10": measures["recall_10"],
        "recall@100": measures["recall_100"],
        # trec_eval has no cut-off for it; between 1/10 and 1/11 lies the line, whatever the rounding.
        "mrr@10": reciprocal_rank if reciprocal_rank > 1 / 10.5 else 0.0,
    }
