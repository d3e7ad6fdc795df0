"""nDCG, recall and MRR of an encoder on corpus, queries and qrels; the part without files, which training calls too."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from laser_dist.errors import UserError
from laser_dist.retrieval.collection import Corpus, Queries, keep_judged
from laser_dist.retrieval.metrics import Run, evaluate_run

if TYPE_CHECKING:
    from laser_dist.retrieval.encoder import LaserEncoder


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured, and the run it measured it on."""

    metrics: dict[str, float]
    """Metric name (see metrics.METRICS) -> mean over the queries."""
    per_query: dict[str, dict[str, float]]
    """Query id -> metric name -> value."""
    counts: dict[str, int]
    """queries and passages evaluated; queries_left_out: without a relevant passage in the qrels."""
    seconds: dict[str, float]
    """Wall-clock time to encode the passages (0 where their vectors were given), the queries, and to search."""
    run: Run
    """The k best passages of each query with their scores."""


def evaluate(
    encoder: "LaserEncoder",
    corpus: Corpus,
    queries: Queries,
    qrels: Mapping[str, Mapping[str, int]],
    *,
    k: int = 100,
    device: str = "cpu",
    progress: bool = False,
    passage_vectors: np.ndarray | None = None,
    explicit: bool = False,
) -> EvaluationResult:
    """Encode corpus and queries, search exactly, and score the k best passages of each query.

    Queries without a relevant passage are left out and counted. `passage_vectors` [P, D], perhaps a memory map, are
    used instead of encoding the corpus, and queries get as many components; else vectors of the whole corpus are held
    in memory as float32. `explicit` reads each query with its written rationale: what the latent view could at best
    have thought. `device` is where the search runs; the encoder has its own. Raises ValueError for k < 100 (recall@100
    would be wrong), and UserError if no query has a relevant passage, or one lacks its rationale.
    """
    from laser_dist.retrieval.search.exact import search
    from laser_dist.retrieval.search.runs import to_run

    if k < 100:
        raise ValueError(f"k = {k}: recall@100 needs k of at least 100")
    judged, judged_qrels = keep_judged(queries, qrels)
    asked: dict[str, Any] = {"rationales": written_rationales(judged)} if explicit else {}
    if passage_vectors is not None:
        asked["dim"] = passage_vectors.shape[1]
    times = [time.perf_counter()]
    if passage_vectors is None:
        titles = corpus.titles if any(corpus.titles) else None
        passage_vectors = encoder.encode_passages(corpus.texts, titles=titles, progress=progress)
    times.append(time.perf_counter())
    instructions = judged.instructions if any(judged.instructions) else None
    query_vectors = encoder.encode_queries(judged.texts, instructions=instructions, progress=progress, **asked)
    times.append(time.perf_counter())
    scores, indices = search(query_vectors, passage_vectors, k, device=device, progress=progress)
    run = to_run(scores, indices, judged.ids, corpus.ids)
    times.append(time.perf_counter())
    metrics, per_query = evaluate_run(run, judged_qrels)
    phases = ("encode_passages", "encode_queries", "search")
    return EvaluationResult(
        metrics=metrics,
        per_query=per_query,
        counts={"queries": len(judged), "passages": len(corpus), "queries_left_out": len(queries) - len(judged)},
        seconds={name: end - start for name, start, end in zip(phases, times, times[1:], strict=False)},
        run=run,
    )


def written_rationales(queries: Queries) -> list[str]:
    """Every query's rationale. Raises UserError where one has none."""
    if lacking := [query for query, text in zip(queries.ids, queries.rationales, strict=True) if not text]:
        listed = ", ".join(map(repr, lacking[:3])) + (", ..." if len(lacking) > 3 else "")
        raise UserError(
            f'--explicit: {len(lacking)} of {len(queries)} judged queries have no "rationale" in the queries file '
            f"({listed}): write them (`laser-dist annotate` can, for training rows), or leave out --explicit"
        )
    return [text for text in queries.rationales if text]
