"""`laser-dist evaluate`: one model on one collection, or on a benchmark's tasks, into one result file.

Torch is imported only when something runs, so that `--help` is instant.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError
from laser_dist.files import sha256, write_json
from laser_dist.retrieval.collection import Corpus, Queries, collection_files, keep_judged, read_collection
from laser_dist.retrieval.evaluation.arguments import FILES, HELP, Arguments, as_asked, check_flags, load_encoder
from laser_dist.retrieval.evaluation.evaluate import EvaluationResult, evaluate, written_rationales
from laser_dist.retrieval.metrics import METRICS, evaluate_run


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for wrong input, before the model is loaded."""
    import tyro

    args = tyro.cli(Arguments, args=argv, prog="laser-dist evaluate", description=HELP)
    check_flags(args)
    if args.task is not None:
        from laser_dist.retrieval.evaluation.benchmark import evaluate_tasks

        return evaluate_tasks(args, args.task)
    files = _files(args)
    corpus, queries, qrels = read_collection(*files)
    judged, judged_qrels = keep_judged(queries, qrels)
    if args.explicit:
        written_rationales(judged)
    vectors, folder = _vectors(args, args.vectors, files[0], corpus) if args.vectors else (None, None)

    import torch

    from laser_dist.retrieval.search.runs import write_run

    encoder = load_encoder(args, folder)
    result = evaluate(
        encoder,
        corpus,
        queries,
        qrels,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        progress=True,
        passage_vectors=vectors,
        explicit=args.explicit,
    )
    baseline = _bm25(corpus, judged, judged_qrels) if args.bm25 else None
    if args.run_file is not None:
        write_run(args.run_file, result.run)
    data = {name: {"file": str(f), "sha256": sha256(f)} for name, f in zip(FILES, files, strict=True)}
    report = _report(args, result, baseline, encoder, data)
    write_json(args.out, report)
    if args.plot is not None:
        from laser_dist.retrieval.evaluation.plot import plot_results

        plot_results(args.plot, dict(reversed(_systems(args, result, baseline).items())))  # against BM25
    _print_table(_systems(args, result, baseline), result.counts, args.out)
    return 0


def _files(args: Arguments) -> tuple[Path, Path, Path]:
    if args.data is not None:
        return collection_files(args.data, args.split)
    assert args.corpus is not None and args.queries is not None and args.qrels is not None  # checked with the flags
    return args.corpus, args.queries, args.qrels


def _vectors(args: Arguments, folder: Path, file: Path, corpus: Corpus) -> tuple[Any, str]:
    """The encoded corpus, after checking that it is this corpus, by this model; and where the model lies."""
    from laser_dist.retrieval.card import RetrieverCard
    from laser_dist.retrieval.folders import model_folder
    from laser_dist.retrieval.search.origin import check_passages, check_same_corpus, check_same_model
    from laser_dist.retrieval.vectors import load_vectors

    ids, vectors = load_vectors(folder)
    check_passages(folder)
    if args.dim not in (None, vectors.shape[1]):
        raise UserError(f"--dim {args.dim}: {folder} has {vectors.shape[1]} components: encode again with this --dim")
    check_same_corpus(folder, ids, file, corpus.ids)
    model = model_folder(args.model)
    check_same_model(folder, model, as_asked(RetrieverCard.load(Path(model)), args))
    return vectors, model


def _bm25(corpus: Corpus, queries: Queries, qrels: Mapping[str, Mapping[str, int]]) -> tuple[dict, dict]:
    from laser_dist.retrieval.bm25 import bm25_run

    return evaluate_run(bm25_run(corpus, queries, k=100), qrels)


def _report(
    args: Arguments, result: EvaluationResult, baseline: tuple[dict, dict] | None, encoder: Any, data: dict
) -> dict[str, Any]:
    return {
        **result.metrics,
        **({"bm25": baseline[0]} if baseline else {}),
        **result.counts,
        "model": args.model,
        "view": "explicit" if args.explicit else "latent",
        "dim": encoder.dim,
        "encoder": encoder.description(),
        "data": data,
        "seconds": result.seconds,
        "per_query": result.per_query,
        **({"bm25_per_query": baseline[1]} if baseline else {}),
    }


def _systems(args: Arguments, result: EvaluationResult, baseline: tuple[dict, dict] | None) -> dict[str, Any]:
    """Name -> (means, per query), the model first."""
    name = Path(args.model).name or args.model
    return {name: (result.metrics, result.per_query)} | ({"BM25": baseline} if baseline else {})


def _print_table(systems: dict[str, Any], counts: dict[str, int], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric")
    for name in systems:
        table.add_column(name, justify="right")
    for metric in METRICS:
        table.add_row(metric, *(f"{means[metric]:.4f}" for means, _ in systems.values()))
    Console(file=sys.stdout, highlight=False).print(table)
    left_out = f" ({counts['queries_left_out']} without a relevant passage left out)" * bool(counts["queries_left_out"])
    print(f"{counts['queries']} queries{left_out}, {counts['passages']} passages; results in {out}")
