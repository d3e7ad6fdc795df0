"""What an alarm leaves behind: all that one process needs to run the step of all ranks again.

alarms/step-000123/
  alarm.json            the broken rule, what all ranks gathered, ids, versions (`Report`)
  config.toml           the run's
  rank_00000.safetensors  per micro-batch the packed batch and the generators' state before its forward
  model/                the weights of the moment, with guard.dump_weights

All ranks write into a hidden folder, which rank 0 renames: it is whole or absent.
"""

import dataclasses
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from laser_dist.batch import PackedBatch
from laser_dist.config import RunConfig
from laser_dist.distributed.collectives import barrier, gather_objects, rank, world_size
from laser_dist.distributed.engine import Engine
from laser_dist.distributed.together import Together
from laser_dist.distributed.weights import save_model
from laser_dist.errors import UserError
from laser_dist.files import sync_folder, write_json
from laser_dist.guard.evidence import MicroBatch
from laser_dist.guard.rules import Alarm
from laser_dist.reading import read_file
from laser_dist.recipe import read_recipe, to_toml

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Report:
    """alarm.json."""

    format_version: int
    date: str
    step: int
    """Optimizer step that was refused, counted from 1."""
    rule: str
    reason: str
    term: str
    value: float | None
    """None: not finite."""
    limit: float | None
    ranks: list[int]
    examples: list[str]
    """The rows named, worst first."""
    micro_batch: int
    """The one that the alarm is about, counted from 0."""
    world_size: int
    learning_rate: float | None
    weights: dict[str, float | None]
    query_ids: list[list[list[str]]]
    """Per rank and micro-batch."""
    chunks: list[int]
    """Per micro-batch."""
    tables: list[list[dict[str, float | None]]]
    """Per micro-batch and rank: the values of guard/evidence.py."""
    versions: dict[str, str]

    @classmethod
    def of(
        cls,
        alarm: Alarm,
        config: RunConfig,
        known: dict[str, float],
        weights: dict[str, float],
        number: int,
        micros: list[MicroBatch],
        ids: list[list[tuple[str, ...]]],
    ) -> "Report":
        names = [_example(row, ids[alarm.ranks[0]][number], config) for row in alarm.rows] if alarm.ranks else []
        return cls(
            format_version=FORMAT_VERSION,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            step=int(known["step"]) + 1,
            rule=alarm.rule,
            reason=alarm.reason,
            term=alarm.term,
            value=_plain(alarm.value),
            limit=_plain(alarm.limit),
            ranks=list(alarm.ranks),
            examples=names,
            micro_batch=number,
            world_size=world_size(),
            learning_rate=_plain(known["learning_rate"]),
            weights={name: _plain(value) for name, value in weights.items()},
            query_ids=[[list(own) for own in of_rank] for of_rank in ids],
            chunks=[micro.chunks for micro in micros],
            tables=[[{k: _plain(v) for k, v in row.items()} for row in micro.table] for micro in micros],
            versions={name: version(name) for name in ("torch", "deepspeed", "transformers")},
        )

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """Raises UserError if the folder holds no dump."""
        try:
            values = json.loads(read_file(folder / "alarm.json"))
            if values["format_version"] != FORMAT_VERSION:
                raise UserError(f"{folder}: another format version than {FORMAT_VERSION}; use the laser_dist it is of")
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{folder} is no dump of an alarm: alarm.json: {error}; see OUTPUT/alarms") from None


def write_dump(
    report: Report, micros: list[MicroBatch], engine: Engine, config: RunConfig, *, weights: bool = False
) -> str:
    """Put the step on disk; returns a sentence that says where. All ranks call it; a full disk hides no alarm."""
    final = gather_objects(_free(Path(config.output) / "alarms", report.step))[0]
    staging = final.with_name(f".{final.name}.partial")
    problems = gather_objects(_write_own(staging, micros))
    if weights and not any(problems):
        writes = Together()
        save_model(engine, staging / "model", config.checkpoint.max_shard_gb, writes)
        problems = [writes.problem()]
    if rank() == 0 and not any(problems):
        problems = [_publish(staging, final, report, config)]
    problem = next(filter(None, gather_objects(next(filter(None, problems), None))), None)
    if problem:
        return f"The batch could not be dumped: {problem}"
    return f"The batch is in {final}: `laser-dist replay {final}` runs it again in one process"


def read_batches(folder: Path, report: Report) -> list[list[tuple[PackedBatch, dict[str, Tensor]]]]:
    """Per micro-batch and rank: the batch, and the generators' state before its forward. Raises UserError."""
    batches: list[list[tuple[PackedBatch, dict[str, Tensor]]]] = [[] for _ in report.chunks]
    for r in range(report.world_size):
        path = folder / f"rank_{r:05d}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}; the dump is not whole") from None
        for number, found in enumerate(batches):
            own = {key.partition(".")[2]: x for key, x in tensors.items() if key.startswith(f"{number}.")}
            state = {name: own.pop(f"random_{name}") for name in ("cpu", "cuda") if f"random_{name}" in own}
            queries = len(report.query_ids[r][number])
            found.append((PackedBatch(**own, queries=queries, query_ids=tuple(report.query_ids[r][number])), state))
    return batches


def read_config(folder: Path) -> RunConfig:
    return read_recipe(folder / "config.toml")


def _free(folder: Path, step: int) -> Path:
    """A name that no dump has: a resumed run may come to the same step again."""
    names = (f"step-{step:06d}" + (f"-{again}" if again > 1 else "") for again in range(1, 10**6))
    return next(folder / name for name in names if not (folder / name).exists())


def _write_own(staging: Path, micros: list[MicroBatch]) -> str | None:
    """This rank's file; returns what went wrong. A collective."""
    problem = None
    if rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
    barrier()
    try:
        staging.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for number, micro in enumerate(micros):
            for name, value in _tensors(micro).items():
                tensors[f"{number}.{name}"] = value.cpu().contiguous().clone()
        save_file(tensors, staging / f"rank_{rank():05d}.safetensors")
    except OSError as error:
        problem = str(error)
    return problem


def _tensors(micro: MicroBatch) -> dict[str, Tensor]:
    batch = {f.name: getattr(micro.batch, f.name) for f in fields(micro.batch)}
    state = {f"random_{name}": value for name, value in micro.random_state.items()}
    return {name: value for name, value in {**batch, **state}.items() if isinstance(value, Tensor)}


def _publish(staging: Path, final: Path, report: Report, config: RunConfig) -> str | None:
    try:
        # The run's folder is the place of the alarm, wherever it is moved to: nothing else of it is needed.
        (staging / "config.toml").write_text(to_toml(dataclasses.replace(config, resume=False)), encoding="utf-8")
        write_json(staging / "alarm.json", asdict(report))
        os.rename(staging, final)
        sync_folder(final.parent)
    except OSError as error:
        return str(error)
    return None


def _example(row: int, ids: tuple[str, ...], config: RunConfig) -> str:
    """What a row of a batch is called."""
    if row < len(ids):
        return f"query {ids[row]!r}"
    group, place = divmod(row - len(ids), 1 + config.data.negatives)
    kind = "the positive" if place == 0 else f"negative {place}"
    return f"{kind} of query {ids[group]!r}"


def _plain(value: float) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if math.isfinite(value) else None
