"""What a run starts from, checked: its steps, the dev set, and what was skipped before."""

from dataclasses import dataclass
from pathlib import Path

from laser_dist.config import RunConfig
from laser_dist.data.streaming.quarantine import Quarantine
from laser_dist.data.streaming.sets import TrainingData, open_data
from laser_dist.data.text import TextFormat
from laser_dist.distributed.collectives import gather_objects, rank
from laser_dist.distributed.together import Together
from laser_dist.errors import UserError
from laser_dist.identity import Settings, settings
from laser_dist.model.backbone import load_tokenizer
from laser_dist.observability.profiler import check_profile
from laser_dist.recipe import to_toml
from laser_dist.retrieval.card import tokenizer_hash
from laser_dist.retrieval.collection import Corpus, Qrels, Queries, read_collection
from laser_dist.retrieval.metrics import METRICS


@dataclass
class RunInputs:
    """What a run reads before its ranks meet."""

    data: TrainingData
    text: TextFormat
    dev: tuple[Corpus, Queries, Qrels] | None
    settings: Settings
    """What a checkpoint must agree with, see `identity`."""
    total_steps: int


def open_inputs(config: RunConfig, queries_per_step: int) -> RunInputs:
    """All of it, checked. UserError for what is wrong with files, on this host at least."""
    data = open_data(config.data)
    steps = total_steps(config, data, queries_per_step)
    check_profile(config.profile, steps)
    text = TextFormat(load_tokenizer(config.model), config.text, steps=config.thinking.steps)
    if config.objective.needs_rationale:
        text.require_eos()
    backend = getattr(text.tokenizer, "backend_tokenizer", None)
    identity = settings(config, data, backend and tokenizer_hash(backend.to_str()))
    return RunInputs(data, text, read_dev_set(config), identity, steps)


def write_config(config: RunConfig) -> None:
    """Rank 0 writes the resolved recipe into the output folder. UserError on all ranks where it cannot."""
    work, file = Together(), Path(config.output) / "config.toml"
    if rank() == 0:
        work.run(file.parent.mkdir, parents=True, exist_ok=True)
        work.run(file.write_text, to_toml(config), encoding="utf-8")
    if problem := work.problem():
        raise UserError(f"output = {config.output!r} cannot be written to: {problem}; choose another --output")


def total_steps(config: RunConfig, data: TrainingData, queries_per_step: int, step: int = 0, position: int = 0) -> int:
    """Optimizer steps of the run, of which `step` took the examples before `position`.

    UserError if the shards cannot serve it.
    """
    data.check_enough(queries_per_step)
    if config.objective.needs_rationale and data.without_rationale:
        places = ", ".join(config.data.sources)
        raise UserError(
            f"{places} holds {data.without_rationale} examples without a rationale, which the explicit "
            "view needs: prepare with --missing-rationale drop, or set explicit, output and trajectory weights to 0"
        )
    left = int(config.train.epochs * data.examples) - position
    return config.train.max_steps or max(1, step + left // queries_per_step)


def open_quarantine(config: RunConfig, data: TrainingData, report: Path) -> Quarantine:
    """What was skipped so far, an interrupted part of the run included; alike on all ranks, written by rank 0."""
    quarantine = Quarantine(data.examples, config.data.max_skipped, report if rank() == 0 else None)
    lines = report.read_text(encoding="utf-8").splitlines() if rank() == 0 and report.is_file() else []
    quarantine.recall(gather_objects(lines)[0])
    return quarantine


def read_dev_set(config: RunConfig) -> tuple[Corpus, Queries, Qrels] | None:
    """The dev collection, checked as a whole; None if the run has none."""
    files = config.evaluation
    if files.metric not in METRICS:
        raise UserError(f"evaluation.metric = {files.metric!r}: must be one of {', '.join(METRICS)}")
    if not (files.corpus and files.queries and files.qrels):
        return None
    return read_collection(files.corpus, files.queries, files.qrels)
