"""`laser-dist evaluate`: nDCG, recall and MRR of a model on corpus, queries and qrels, beside BM25's on the same files.

`evaluate` is the part without files; training calls it on the dev set. Torch is imported only when something runs,
so that `--help` is instant.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from laser_dist.errors import UserError
from laser_dist.files import write_json
from laser_dist.retrieval.collection import Corpus, Queries, keep_judged, read_collection
from laser_dist.retrieval.metrics import METRICS, Run, evaluate_run

if TYPE_CHECKING:
    from laser_dist.retrieval.encoder import LaserEncoder

HELP = """Measure retrieval: nDCG@10, recall@10, recall@100 and MRR@10 of a model, beside BM25's on the same files.

All files are read and checked before the model is loaded. Search is exact. No network is used.

Examples:
  laser-dist evaluate --model mine --corpus corpus.jsonl --queries queries.jsonl --qrels qrels.tsv --out results.json
  laser-dist evaluate --model mine --corpus c.jsonl --queries q.jsonl --qrels q.tsv --out k6.json --steps 6 --no-bm25
"""


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
    """Wall-clock time to encode the passages, to encode the queries, and to search."""
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
) -> EvaluationResult:
    """Encode corpus and queries, search exactly, and score the k best passages of each query.

    Queries without a relevant passage are left out and counted. Vectors of the whole corpus are held in memory as
    float32. `device` is where the search runs; the encoder has its own. Raises ValueError for k < 100 (recall@100
    would be wrong), and UserError if no query has a relevant passage.
    """
    from laser_dist.retrieval.search import search, to_run

    if k < 100:
        raise ValueError(f"k = {k}: recall@100 needs k of at least 100")
    judged, judged_qrels = keep_judged(queries, qrels)
    times = [time.perf_counter()]
    titles = corpus.titles if any(corpus.titles) else None
    passage_vectors = encoder.encode_passages(corpus.texts, titles=titles, progress=progress)
    times.append(time.perf_counter())
    instructions = judged.instructions if any(judged.instructions) else None
    query_vectors = encoder.encode_queries(judged.texts, instructions=instructions, progress=progress)
    times.append(time.perf_counter())
    scores, indices = search(query_vectors, passage_vectors, k, device=device)
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


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `laser-dist evaluate`."""

    model: str
    """Folder of the model: an export, a checkpoint, or a run (its newest checkpoint)."""
    corpus: Path
    """corpus.jsonl: id, text and optionally title per line."""
    queries: Path
    """queries.jsonl: id, text and optionally instruction per line."""
    qrels: Path
    """qrels.tsv: query-id, corpus-id, score; or TREC's four columns."""
    out: Path
    """JSON file of the results; an existing one is replaced."""
    steps: int | None = None
    """Latent steps; unset: as many as in training."""
    bm25: bool = True
    """Also evaluate BM25 on the same files."""
    run_file: Path | None = None
    """Also write the 100 best passages of each query as a TREC run file."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the model; unset: the encoder's choice."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for wrong input, before the model is loaded."""
    import tyro

    args = tyro.cli(Arguments, args=argv, prog="laser-dist evaluate", description=HELP)
    for flag, path in (("--out", args.out), ("--run-file", args.run_file)):
        if path is not None and path.is_dir():
            raise UserError(f"{flag} {path}: is a folder: give the name of a file")
    corpus, queries, qrels = read_collection(args.corpus, args.queries, args.qrels)
    judged, judged_qrels = keep_judged(queries, qrels)

    import torch

    from laser_dist.retrieval.encoder import LaserEncoder
    from laser_dist.retrieval.search import write_run

    encoder = LaserEncoder.from_pretrained(args.model, steps=args.steps, device=args.device, dtype=args.dtype)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = evaluate(encoder, corpus, queries, qrels, device=device, progress=True)
    baseline = _bm25(corpus, judged, judged_qrels) if args.bm25 else None
    if args.run_file is not None:
        write_run(args.run_file, result.run)
    write_json(args.out, _report(args.model, result, baseline, encoder.description()))
    _print_table(result, baseline, args)
    return 0


def _bm25(corpus: Corpus, queries: Queries, qrels: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    from laser_dist.retrieval.bm25 import bm25_run

    return evaluate_run(bm25_run(corpus, queries, k=100), qrels)[0]


def _report(model: str, result: EvaluationResult, baseline: dict[str, float] | None, description: dict) -> dict:
    return {
        **result.metrics,
        **({"bm25": baseline} if baseline is not None else {}),
        **result.counts,
        "model": model,
        "encoder": description,
        "seconds": result.seconds,
        "per_query": result.per_query,
    }


def _print_table(result: EvaluationResult, baseline: dict[str, float] | None, args: Arguments) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {Path(args.model).name or args.model: result.metrics} | ({"BM25": baseline} if baseline else {})
    table = Table("metric")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in METRICS:
        table.add_row(metric, *(f"{values[metric]:.4f}" for values in columns.values()))
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    counts = result.counts
    left_out = f" ({counts['queries_left_out']} without a relevant passage left out)" * bool(counts["queries_left_out"])
    print(f"{counts['queries']} queries{left_out}, {counts['passages']} passages; results in {args.out}")
