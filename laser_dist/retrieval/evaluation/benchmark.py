"""`laser-dist evaluate --task`: mteb's tasks one after the other into one result file."""

import json
import sys
from pathlib import Path
from typing import Any

from laser_dist.files import write_json
from laser_dist.retrieval.encode import weights_hash
from laser_dist.retrieval.evaluation.arguments import Arguments, load_encoder
from laser_dist.retrieval.evaluation.tasks import find_tasks, load_task, run_task, summary
from laser_dist.retrieval.metrics import METRICS


def evaluate_tasks(args: Arguments, name: str) -> int:
    """mteb's tasks one after the other; tasks that an interrupted call finished are not run again."""
    tasks = find_tasks(name, args.task_data)
    load_task(tasks[0])  # before the model: without a network it ends here

    from laser_dist.retrieval.evaluation.mteb_adapter import LaserMteb
    from laser_dist.retrieval.folders import model_folder

    folder = model_folder(args.model)  # once: a run's newest checkpoint may be another one a moment later
    encoder, weights = load_encoder(args, folder), weights_hash(folder)
    model = LaserMteb(encoder, name=Path(args.model).name, revision=weights or "unknown")
    identity = {
        "task": name,
        "model": args.model,
        "weights": weights,
        "dim": encoder.dim,
        "encoder": encoder.description(),
    }
    results = _finished_tasks(args.out, identity)
    for task in tasks:
        if task.metadata.name not in results:
            results[task.metadata.name] = run_task(model, task)
            write_json(
                args.out, {**summary(results), **identity, "tasks_left": len(tasks) - len(results), "tasks": results}
            )
    if args.plot is not None:
        from laser_dist.retrieval.evaluation.plot import plot_results

        plot_results(args.plot, {Path(args.model).name: _means_of(summary(results))})
    _print_tasks(results, summary(results), args.out)
    return 0


def _finished_tasks(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Tasks in an unfinished result file of the same model and settings."""
    try:
        before = json.loads(out.read_text(encoding="utf-8"))
        unfinished = before["tasks_left"] > 0
        same = all(before[key] == json.loads(json.dumps(value)) for key, value in identity.items())
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return before["tasks"] if unfinished and same else {}


def _means_of(summarised: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    return {metric: summarised[metric] for metric in METRICS if metric in summarised}, summarised["per_query"]


def _print_tasks(results: dict[str, Any], means: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics = [metric for metric in (*METRICS, "p-mrr") if metric in means]
    table = Table("task", *metrics)
    for task, result in results.items():
        for name, row in result["subsets"].items():
            table.add_row(f"{task}/{name}", *(f"{row[metric]:.4f}" for metric in metrics))
    table.add_row("mean", *(f"{means[metric]:.4f}" for metric in metrics))
    Console(file=sys.stdout, highlight=False).print(table)
    print(f"{means['queries']} queries; results in {out}")
