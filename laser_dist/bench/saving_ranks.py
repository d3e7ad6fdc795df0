"""The ranks of `bench killed-saves`: they load what is there, train, save after each step, and are ended in a save."""

import json
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_dist.bench.killed_saves import SAVES
from laser_dist.bench.nursery import digest
from laser_dist.config import CheckpointConfig, ModelConfig, OptimizerConfig, TextConfig
from laser_dist.distributed.checkpoint import CheckpointStore, TrainerState
from laser_dist.distributed.manifest import verify
from laser_dist.errors import UserError

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link")
"""Audit events of Python's that change a folder; DeepSpeed's and safetensors' own writes are hit by bytes."""


def prepare(folder: Path) -> None:
    """What ranks start from."""
    from laser_dist.testing import tiny_model_folder

    tiny_model_folder(folder / "model", tied=False, layers=1)
    (folder / "digests").mkdir()


@dataclass
class Trial:
    """One life of all ranks. `victim` -1: all of them."""

    folder: Path
    ranks: int
    stage: int
    how: str
    victim: int
    where: float
    save: int

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.folder / "checkpoints", CheckpointConfig())

    def run(self, rank: int) -> None:
        """What a rank does; it returns after `SAVES` saves, if it lives."""
        from laser_dist.distributed.engine import init_distributed
        from laser_dist.retrieval.card import RetrieverCard

        init_distributed(60)
        engine, text = _build(self.folder / "model", self.stage)
        store = self.store
        found, _ = store.newest_complete()
        start = store.load(engine, found, "same", 0).step if found else 0
        if found:
            self._compare(engine, start, rank, "what loads as")
        for number in range(SAVES):
            step = start + number + 1
            _train(engine, text, step)
            self._compare(engine, step, rank, "after training again")
            armed = number == self.save and self.victim in (rank, -1)
            began, counted = time.monotonic(), _count_changes()
            if armed:
                self._arm(counted)
            state = TrainerState(step, self.ranks, self.stage, "same", metric=float(step % 3))
            store.save(engine, state, text.tokenizer, RetrieverCard(), best=step % 3 == 0)
            saved = store.publish()
            _disarm(counted)
            if rank == 0 and saved:
                (self.folder / "published").write_text(str(step))
                seconds, largest = time.monotonic() - began, max(p.stat().st_size for p in saved.rglob("*"))
                measured = {"seconds": seconds, "largest": largest, "calls": counted["calls"]}
                (self.folder / "measured").write_text(json.dumps(measured))

    def _compare(self, engine: Any, step: int, rank: int, what: str) -> None:
        """Record this rank's state, or compare it with the record of an earlier life."""
        file, found = self.folder / "digests" / f"{step}-{rank}", digest(engine)
        if not file.is_file():
            file.write_text(found)
        elif file.read_text() != found:
            (self.folder / "wrong").write_text(f"rank {rank}: {what} step {step} is not the state of that step")
            os._exit(9)

    def _arm(self, counted: dict[str, int]) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.how == "moment":
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process, whatever it does just then
            signal.setitimer(signal.ITIMER_REAL, max(self.where, 1e-6))
        elif self.how == "call":
            counted["last"] = int(self.where)
        elif self.how in ("byte", "full disk"):
            ends = self.how == "byte"  # otherwise Python ignores the signal, and the write fails
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if ends else signal.SIG_IGN)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.where), hard))

    def measured(self) -> dict[str, Any]:
        return json.loads((self.folder / "measured").read_text())

    def published(self) -> int:
        """The step of the last checkpoint whose `publish` has returned."""
        file = self.folder / "published"
        return int(file.read_text() or 0) if file.is_file() else 0

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is complete."""
        whole = [path for path in self.store.steps() if verify(path) is None]
        return int(whole[-1].name.split("-")[1]) if whole else None

    def check(self, codes: list[int], output: str) -> None:
        """UserError unless what is left on disk is what must be left, and all ranks ended as they should."""
        if (self.folder / "wrong").is_file():
            raise UserError(f"{self}: {(self.folder / 'wrong').read_text()}")
        killed = self.how != "full disk" and any(code < 0 for code in codes)
        alike = len(set(codes)) == 1 and codes[0] in ((0, 2) if self.how == "full disk" else (0,))
        if not (killed or alike):
            raise UserError(f"{self}: ranks ended with {codes}: {output[-1500:]}")
        published, whole = self.published(), [p.name for p in self.store.steps() if verify(p) is None]
        if (self.newest() or 0) < published:
            raise UserError(f"{self}: step {published} was published, and {self.newest()} is the newest complete one")
        if published > 1 and len(whole) < 2:
            raise UserError(f"{self}: of {published} published checkpoints only {whole} are complete")
        for name in ("latest", "best"):
            pointer = self.store.folder / name
            if pointer.is_file() and (named := pointer.read_text().strip()) not in whole:
                raise UserError(f"{self}: {name} names {named!r}, which is not complete")


_counted = {"calls": 0, "last": 0, "on": 0}


def _count_changes() -> dict[str, int]:
    """Counts calls that change the file system from here on; at the call `last` the process is killed."""
    if not _counted["on"]:
        sys.addaudithook(_on_change)
    _counted.update(calls=0, last=0, on=1)
    return _counted


def _on_change(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in CHANGES or (event == "open" and not (isinstance(arguments[2], int) and arguments[2] & os.O_CREAT)):
        return
    _counted["calls"] += 1
    if _counted["calls"] == _counted["last"]:
        os.kill(os.getpid(), signal.SIGKILL)


def _disarm(counted: dict[str, int]) -> None:
    """What has not struck in its save does not strike later."""
    counted["last"] = 0
    signal.setitimer(signal.ITIMER_REAL, 0)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def _build(model: Path, stage: int) -> tuple[Any, Any]:
    from laser_dist.data.text import TextFormat
    from laser_dist.distributed.engine import Engine
    from laser_dist.model.backbone import load_backbone, load_tokenizer, prepare_for_training
    from laser_dist.model.retriever import LaserRetriever
    from laser_dist.optim import build_optimizer

    config = ModelConfig(name=str(model), dtype="float32")
    retriever = LaserRetriever(prepare_for_training(load_backbone(config), config), steps=2)
    optimizer = build_optimizer(retriever, OptimizerConfig(learning_rate=1e-3))
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    return Engine(retriever, optimizer, settings), TextFormat(load_tokenizer(config), TextConfig(), steps=2)


def _train(engine: Any, text: Any, step: int) -> None:
    from laser_dist.batch import TokenSequence, pack
    from laser_dist.data.schema import Passage

    texts = [f"heat makes steam {step}", "cold stone keeps the drop still and bright"]
    batch = pack([TokenSequence(text.passage(Passage("x", content))) for content in texts])
    engine.backward(engine(batch).passage_PD.float().pow(3).sum())
    engine.step()
