"""mteb's own retrieval tasks: their data, their protocol (excluded passages, re-ranking, p-MRR), their metrics."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from laser_dist.errors import UserError, require, suggest
from laser_dist.retrieval.metrics import METRICS, evaluate_run

if TYPE_CHECKING:
    from laser_dist.retrieval.evaluation.mteb_adapter import LaserMteb

_STACKEXCHANGE = (
    "Biology",
    "EarthScience",
    "Economics",
    "Psychology",
    "Robotics",
    "Stackoverflow",
    "SustainableLiving",
)
SETS = {
    "BRIGHT": tuple(
        f"Bright{domain}Retrieval"
        for domain in (*_STACKEXCHANGE, "Leetcode", "Pony", "Aops", "TheoremQAQuestions", "TheoremQATheorems")
    ),
    "BRIGHT-long": tuple(f"Bright{domain}LongRetrieval" for domain in (*_STACKEXCHANGE, "Pony")),
    "FollowIR": ("Robust04InstructionRetrieval", "News21InstructionRetrieval", "Core17InstructionRetrieval"),
    "BrowseComp-Plus": ("BrowseCompPlusRetrieval",),
}
"""Benchmarks of several tasks, by the names of mteb's tasks; BRIGHT's are those of 1.1, which heed excluded ids."""


def find_tasks(name: str, data: Path | None) -> list[Any]:
    """mteb's tasks of a set or of one name; `data` holds their datasets. Raises UserError for what mteb lacks."""
    require("--task", "mteb", extra="mteb")
    import mteb
    from mteb.abstasks import AbsTaskRetrieval

    tasks = []
    for task_name in SETS.get(name, (name,)):
        try:
            task = mteb.get_task(task_name)
        except KeyError:
            known = [
                *SETS,
                *(t.metadata.name for t in mteb.get_tasks(task_types=["Retrieval", "InstructionReranking"])),
            ]
            raise UserError(
                f"--task {task_name}: mteb {mteb.__version__} has no such task, and it is none of {', '.join(SETS)}."
                f"{suggest(task_name, known)}"
            ) from None
        if not isinstance(task, AbsTaskRetrieval):
            raise UserError(f"--task {task_name}: is of the type {task.metadata.type}: give a retrieval task")
        if data is not None:
            dataset = task.metadata.dataset
            task.metadata = task.metadata.model_copy(update={"dataset": {**dataset, "path": _copy_of(dataset, data)}})
        tasks.append(task)
    return tasks


def load_task(task: Any) -> None:
    """Read the task's data into it. Raises UserError where it cannot be had."""
    dataset = task.metadata.dataset
    try:
        task.load_data()
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"{task.metadata.name}: its dataset {dataset['path']} (revision {dataset['revision']}) cannot be loaded: "
            f"{reason}. Without a network, give a copy of it with --task-data"
        ) from error


def run_task(model: "LaserMteb", task: Any) -> dict[str, Any]:
    """One task by mteb: its scores by our names, per subset and per query; unloads the task's data afterwards."""
    import mteb

    if not task.data_loaded:
        load_task(task)
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        outcome = mteb.evaluate(
            model,
            task,
            cache=None,
            prediction_folder=folder,
            encode_kwargs={"show_progress_bar": True, "batch_size": 256},
        )
        predictions = json.loads(Path(folder, task.prediction_file_name).read_text(encoding="utf-8"))
    subsets = {
        name: scores | {"per_query": _per_query(predictions, task, split, subset)}
        for name, split, subset, scores in _scores(outcome.task_results[0])
    }
    metadata = task.metadata
    task.unload_data()
    return {
        "instruction": model.instruction(metadata) or model.model.card.text.instruction,
        "dataset": metadata.dataset["path"],
        "revision": metadata.dataset["revision"],
        "main_metric": metadata.main_score,
        "mteb": mteb.__version__,
        "seconds": time.perf_counter() - began,
        "subsets": subsets,
    }


def summary(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The means over all tasks and subsets, one vote each, and every query's values under task/subset/query."""
    rows = {f"{task}/{name}": row for task, result in tasks.items() for name, row in result["subsets"].items()}
    metrics = [m for m in (*METRICS, "p-mrr") if all(m in row for row in rows.values())]
    means = {metric: sum(row[metric] for row in rows.values()) / len(rows) for metric in metrics}
    per_query = {f"{name}/{query}": values for name, row in rows.items() for query, values in row["per_query"].items()}
    return {**means, "queries": len(per_query), "per_query": per_query}


def _copy_of(dataset: dict[str, Any], data: Path) -> str:
    own = data / Path(dataset["path"]).name
    folder = own if own.is_dir() else data
    if not folder.is_dir():
        raise UserError(f"--task-data {data}: this folder does not exist")
    return str(folder)


def _scores(result: Any) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """(name, split, subset, scores) of mteb's result; p-mrr is FollowIR's, from -1 to 1, 0 without any effect."""
    several = len(result.scores) > 1
    for split, rows in result.scores.items():
        for row in rows:
            names = {"ndcg@10": "ndcg_at_10", "recall@10": "recall_at_10", "recall@100": "recall_at_100"}
            names |= {"mrr@10": "mrr_at_10", "main_score": "main_score", "p-mrr": "p-MRR"}
            scores = {ours: float(row[theirs]) for ours, theirs in names.items() if theirs in row}
            yield f"{row['hf_subset']}-{split}" if several else row["hf_subset"], split, row["hf_subset"], scores


def _per_query(predictions: dict[str, Any], task: Any, split: str, subset: str) -> dict[str, dict[str, float]]:
    found = predictions[subset][split]
    run = {query: sorted(scores.items(), key=lambda pair: -pair[1]) for query, scores in found.items()}
    return evaluate_run(run, task.dataset[subset][split]["relevant_docs"])[1]
