"""Cells: one training run each, in a folder of its own, with what it was made of and what was measured of it.

OUT/cells/DATASET/METHOD/POINT/seed-S/
  recipe.toml, cell.json   what is trained, and the hash that binds everything in the folder to it
  run/, log.txt            the training run; what it and the measurements printed
  result.json              what was measured, split by split and test by test
  failed.json              the stage that failed, and its last line
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from laser_dist.config import RunConfig
from laser_dist.run_folder import checkpoints_of
from laser_dist.study.data import Prepared
from laser_dist.study.definition import OWN, Dataset, Method, Study, Table, Test, flat

BM25, UNTRAINED = "bm25", "untrained"
FINISHED, FAILED, STARTED, WAITING = "finished", "failed", "started", "waiting"


@dataclass(frozen=True)
class Task:
    """One measurement of a cell."""

    split: str
    test: Test
    key: str
    """Hash of the test and of the split's files."""

    @property
    def name(self) -> str:
        return f"{self.split}/{self.test.name}"


@dataclass(frozen=True)
class Cell:
    """A method on a dataset with one seed and one point of its grid; a baseline, too, which trains nothing."""

    dataset: str
    method: str
    seed: int | None
    point: Table
    config: RunConfig
    folder: Path
    identity: Table
    """All that decides its numbers."""

    @property
    def name(self) -> str:
        parts = [self.dataset, self.method, slug(self.point) if self.point else "", f"seed-{self.seed}"]
        return "/".join(part for part in parts[: 4 if self.seed is not None else 2] if part)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @cached_property
    def key(self) -> str:
        return digest(self.identity)

    @property
    def trains(self) -> bool:
        return self.seed is not None

    def current(self) -> bool:
        """Whether what lies in the folder was made of the same recipe and data."""
        return read(self.folder / "cell.json").get("key") == self.key

    def trained(self) -> bool:
        """Whether the last checkpoint is there."""
        pointer = checkpoints_of(self.run) / "latest"
        last = f"step-{self.config.train.max_steps:06d}"
        return self.current() and pointer.is_file() and pointer.read_text().strip() == last

    def measured(self, tasks: list[Task]) -> dict[str, Table]:
        """Task name -> what was measured, of those tasks; not what was asked otherwise or of other files."""
        found = read(self.folder / "result.json").get("measured", {}) if self.current() else {}
        return {task.name: found[task.name] for task in tasks if found.get(task.name, {}).get("key") == task.key}

    def missing(self, tasks: list[Task]) -> list[Task]:
        found = self.measured(tasks)
        return [task for task in tasks if task.name not in found]

    def failure(self) -> Table:
        return read(self.folder / "failed.json") if self.current() else {}

    def state(self, tasks: list[Task]) -> str:
        if self.current() and not self.missing(tasks):
            return FINISHED
        if self.failure():
            return FAILED
        return STARTED if self.current() else WAITING

    def curve(self) -> list[Table]:
        """Rows of the run's metrics.jsonl."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run can leave half a line

    def seconds_per_step(self) -> float | None:
        """Mean over the run's steps, from its own clock; None before the second step."""
        rows = [row for row in self.curve() if "time/forward" in row][1:]  # the first pays for what is set up once
        times = [sum(value for name, value in row.items() if name.startswith("time/")) for row in rows]
        return sum(times) / len(times) if times else None


class Workspace:
    """Where a study's cells lie, and what each is made of."""

    def __init__(
        self, study: Study, out: Path, data: dict[str, Prepared], model: str, models: dict[str, Any] | None = None
    ):
        """`model`: hub id or folder that stands for base.model.name where the study names none; `models`: what is known
        to identify backbones that need not be here.
        """
        self.study, self.out, self.data, self.model = study, out, data, model
        self.models = dict(models or {})

    @property
    def model_name(self) -> str:
        """The model's hub id, or its folder's name without the way there."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model

    def cells(self, dataset: str, method: Method, point: Table) -> list[Cell]:
        """One for each of the method's seeds."""
        return [self.cell(dataset, method, point, seed) for seed in self.study.seeds_of(method)]

    def cell(self, dataset: str, method: Method, point: Table, seed: int) -> Cell:
        """One training run."""
        study, prepared = self.study, self.data[dataset]
        folder = self.out / "cells" / dataset / method.name / (slug(point) or "only") / f"seed-{seed}"
        config = self._placed(study.config(method, point), prepared, seed, folder)
        identity = self._identity(config, prepared)
        if method.teacher:
            taught_by = self.chosen_cell(dataset, study.methods[method.teacher], seed)
            teacher, known = str(taught_by.run), taught_by.key
            config = replace(config, objective=replace(config.objective, teacher=teacher))
            identity["objective"] = identity["objective"] | {"teacher": known}
        return Cell(dataset, method.name, seed, point, config, folder, identity)

    def baseline(self, dataset: str, name: str) -> Cell:
        """BM25, or the backbone before training, asked as the study's baseline method is."""
        study, prepared = self.study, self.data[dataset]
        method = study.methods[study.baseline or next(iter(study.methods))]
        folder = self.out / "cells" / dataset / f"@{name}"
        config = self._placed(study.config(method, study.points(method)[0]), prepared, 0, folder)
        identity: Table = {"baseline": name}
        if name == UNTRAINED:
            identity |= {key: self._identity(config, prepared)[key] for key in ("model", "thinking", "text")}
        return Cell(dataset, name, None, {}, config, folder, identity)

    def choice(self, dataset: str, method: Method) -> Table | None:
        """The point that a method was given on dev; None while that is not known."""
        if method.point_of:
            return self.choice(dataset, self.study.methods[method.point_of])
        points = self.study.points(method)
        if len(points) == 1:
            return points[0]
        made = read(self.out / "cells" / dataset / method.name / "choice.json")
        return made["point"] if made.get("of") == self._choice_of(dataset, method, points) else None

    def choose(self, dataset: str, method: Method, scores: list[tuple[Table, float]]) -> Table:
        """Note the best of (point, dev metric); the first of equals."""
        from laser_dist.files import write_json

        best = max(scores, key=lambda pair: pair[1])[0]
        of = self._choice_of(dataset, method, self.study.points(method))
        tried = [{"point": flat(point), "score": score} for point, score in scores]
        file = self.out / "cells" / dataset / method.name / "choice.json"
        write_json(file, {"point": best, "of": of, "metric": f"dev {self.study.metric}", "tried": tried})
        return best

    def chosen_cell(self, dataset: str, method: Method, seed: int) -> Cell:
        point = self.choice(dataset, method)
        return self.cell(dataset, method, {} if point is None else point, seed)

    def tasks(self, cell: Cell, *, chosen: bool) -> list[Task]:
        """What is measured: dev always, test only of what was chosen."""
        if cell.method == BM25:
            tests = [OWN, *(t for t in self.study.tests.values() if t.rationale != "none" and t.view == "latent")]
        elif cell.method == UNTRAINED:
            tests = [OWN]
        else:
            tests = self.study.tests_of(self.study.methods[cell.method])
        pairs = [("dev", OWN)] + [("test", test) for test in tests if chosen]
        return [Task(split, test, self._task_key(cell.dataset, split, test)) for split, test in pairs]

    def dataset(self, name: str) -> Dataset:
        return self.study.datasets[name]

    def _task_key(self, dataset: str, split: str, test: Test) -> str:
        asked = {key: value for key, value in asdict(test).items() if key not in ("methods", "title", "name")}
        if test.rationale == "generated":
            asked["rewriting"] = asdict(self.study.rewriting)
        if self.study.encode_dtype:
            asked["dtype"] = self.study.encode_dtype
        return digest({"test": asked, "data": self.data[dataset].hashes[split]})

    def _choice_of(self, dataset: str, method: Method, points: list[Table]) -> str:
        keys = [self.cell(dataset, method, point, self.study.seeds[0]).key for point in points]
        return digest({"cells": keys, "metric": self.study.metric, "dev": self.data[dataset].hashes["dev"]})

    def _placed(self, config: RunConfig, prepared: Prepared, seed: int, folder: Path) -> RunConfig:
        evaluation = replace(config.evaluation, every=0)
        if prepared.curve:
            corpus, queries, qrels = map(str, prepared.curve)
            evaluation = replace(config.evaluation, corpus=corpus, queries=queries, qrels=qrels)
        return replace(
            config,
            output=str(folder / "run"),
            seed=seed,
            resume=True,
            model=replace(config.model, name=config.model.name or self.model),
            data=replace(config.data, train=str(prepared.shards), mix={}),
            evaluation=evaluation,
        )

    def _identity(self, config: RunConfig, prepared: Prepared) -> Table:
        kept = ("seed", "model", "thinking", "text", "data", "objective", "optimizer", "train")
        table = {name: value for name, value in asdict(config).items() if name in kept}
        table["data"] = {k: table["data"][k] for k in ("homogeneous", "negatives", "shuffle", "shuffle_shards")}
        table["data"]["train"] = prepared.hashes["train"]
        name = self.model_name if config.model.name == self.model else config.model.name
        if name not in self.models:
            self.models[name] = model_identity(config.model.name)
        table["model"]["name"] = self.models[name]
        return json.loads(json.dumps(table | {"processes": self.study.processes}))


def model_identity(name: str) -> Any:
    """A hub id as it is; of a folder its name and the sizes of its weights, so that it can be moved."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    return [folder.name, *sorted(file.stat().st_size for file in folder.glob("*.safetensors"))]


def slug(point: Table) -> str:
    """A point as a folder name: the last parts of its keys, with their values."""
    pairs = [f"{key.rpartition('.')[2]}={value}" for key, value in flat(point).items()]
    return ",".join(pairs).replace("/", "_").replace(" ", "")


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
