"""Dress rehearsal: what a run does at its end is done once after its first step, and fails then or not at all.

The first step is the run's own. After it: save, load what was saved, evaluate on a slice, export, and size the disk for
the whole run. Loading puts back what is there already, bit for bit, which is checked: no number of the run changes.
Everything happens in OUTPUT/.rehearsal, which is gone afterwards. All ranks take part.

A run that goes on from a checkpoint is not rehearsed: it has saved and loaded one.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from laser_dist.distributed.checkpoint import CheckpointStore
from laser_dist.distributed.collectives import gather_objects, rank, uncounted
from laser_dist.distributed.disk import folder_bytes, size
from laser_dist.distributed.engine import Engine
from laser_dist.distributed.together import Together
from laser_dist.errors import UserError
from laser_dist.observability.scalars import Scalars
from laser_dist.retrieval.collection import Corpus, Qrels, Queries
from laser_dist.retrieval.evaluation.evaluate import evaluate

if TYPE_CHECKING:
    from laser_dist.trainer import Trainer

FOLDER = ".rehearsal"
LONG = 3600.0
"""Seconds of a run from which auto rehearses it."""
QUERIES, PASSAGES = 8, 32
"""Of the slice that is evaluated: the longest, which take the most memory."""
# What makes a process a rank; the export is a process of its own.
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LASER_DIST_ATTEMPT")


class Rehearsal:
    """Called after every step; rehearses after the first one (on), or the second if the run is a long one (auto)."""

    def __init__(self, trainer: "Trainer", start: int):
        self.trainer = trainer
        self.folder = Path(trainer.config.output) / FOLDER
        self.mode = trainer.config.rehearse if start == 0 else "off"
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # of one that was killed

    def __call__(self, step: int, values: Scalars) -> None:
        """UserError, on all ranks, names the part that failed."""
        left = self.trainer.total_steps - step
        # The first step of a process compiles, connects and starts loaders, and tells little of the others.
        seconds = sum(value for name, value in values.items() if name.startswith("time/"))
        long = self.mode == "auto" and step == 2 and seconds * left > LONG
        if not left or not (long or (self.mode == "on" and step == 1)):
            return
        self._say(f"one step took {seconds:.1f} s, so {left} more may take {seconds * left / 3600:.1f} h")
        try:
            with uncounted(), self.trainer.doing("rehearsal"):
                self._rehearse(step, len(json.dumps(values)))
        finally:
            if rank() == 0:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _rehearse(self, step: int, line: int) -> None:
        trainer, engine = self.trainer, self.trainer.engine
        began = time.monotonic()
        store = CheckpointStore(self.folder / "checkpoints", trainer.config.checkpoint)
        state = trainer.state(step, None)
        with self._part("save") as told:
            store.save(engine, state, trainer.text.tokenizer, trainer.card)
            saved = store.publish()
            assert saved is not None
            taken = gather_objects(folder_bytes(saved) if rank() == 0 else 0)[0]
            told.append(size(taken))
        with self._part("disk") as told:
            told.append(self._size_disk(taken, line))
        with self._part("load") as told:
            before = _sums(engine)
            _, skipped = store.newest_complete()
            if skipped:
                raise UserError(f"what was saved is damaged already: {skipped[0]}")
            store.load(engine, saved, state.fingerprint, trainer.config.seed, trainer.settings)
            if not all(gather_objects(before == _sums(engine))):
                raise UserError("parameters or optimizer states differ from those that were saved")
            told.append("parameters and optimizer states are those that were saved")
        if trainer.dev is not None:
            with self._part("evaluate") as told:
                told.append(self._evaluate(*trainer.dev))
        with self._part("export") as told:
            told.append(self._export(saved))
        self._say(f"passed in {time.monotonic() - began:.0f} s")

    @contextmanager
    def _part(self, name: str) -> Iterator[list[str]]:
        """Around a part, which says what it found; whatever goes wrong in it names the part."""
        began, told = time.monotonic(), list[str]()
        hint = "Nothing is lost but the first step; --rehearse off starts without this check"
        try:
            yield told
        except UserError as error:
            raise UserError(f"rehearsal, {name}: {error}. {hint}") from error
        except (OSError, MemoryError, RuntimeError) as error:
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
            if not (memory or isinstance(error, OSError)):
                error.add_note(f"in the rehearsal: {name}")
                raise
            what = "out of memory: use ZeRO-3, shorter texts or a smaller evaluation set" if memory else str(error)
            raise UserError(f"rehearsal, {name}: {what}. {hint}") from error
        self._say(f"{name} {time.monotonic() - began:.1f} s, {', '.join(told)}")

    def _say(self, line: str) -> None:
        self.trainer.progress.say(f"rehearsal: {line}")

    def _size_disk(self, taken: int, line: int) -> str:
        """Room for all checkpoints that will be there at once, and for the logs. UserError if there is not."""
        config, trainer = self.trainer.config, self.trainer
        output, keep = Path(config.output), config.checkpoint.keep
        copies = keep + 1 + (trainer.dev is not None)
        # A step's scalars lie in metrics.jsonl and, twice as large, in TensorBoard's file.
        logs = 3 * line * trainer.total_steps // config.logging.every
        needed = copies * taken + logs
        free = gather_objects(shutil.disk_usage(output).free + taken)[0]
        best = ", the best one" if trainer.dev is not None else ""
        story = (
            f"the run takes {size(needed)} ({copies} checkpoints of {size(taken)}: checkpoint.keep = {keep}{best} and "
            f"the one being written; {size(logs)} of logs), {size(free)} are free in {output}"
        )
        if free < needed:
            lower = ", lower checkpoint.keep" if keep > 2 else ""
            raise UserError(f"{story}: make room{lower}, or choose another --output")
        return story

    def _evaluate(self, corpus: Corpus, queries: Queries, qrels: Qrels) -> str:
        """The longest texts, and memory for the vectors of the whole corpus."""
        trainer = self.trainer
        needed = 4 * _copies() * len(corpus) * trainer.encoder.dim
        free = _available_memory()
        if any(gather_objects(free is not None and free < needed)):
            raise UserError(
                f"vectors of {len(corpus):,} passages take {size(needed)} of memory on a host, and less is free there: "
                "give a smaller evaluation.corpus"
            )
        part = _slice(corpus, queries, qrels)
        evaluate(trainer.encoder, *part)
        return f"{len(part[1])} queries and {len(part[0])} passages, the longest"

    def _export(self, saved: Path) -> str:
        work = Together()
        found = work.run(_export, saved, self.folder / "export") if rank() == 0 else None
        if problem := work.problem():
            raise UserError(problem)
        return size(found or 0)


def _export(saved: Path, out: Path) -> int:
    """`laser-dist export` in a process of its own, whose memory is free again afterwards; bytes that it wrote."""
    command = [sys.executable, "-m", "laser_dist.cli", "export", str(saved), "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    done = subprocess.run(
        command,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode} without a word"]
        killed = " (killed: is there memory for two copies of the weights?)" if done.returncode == -9 else ""
        raise UserError(f"{lines[-1].removeprefix('error: ')}{killed}")
    return folder_bytes(out)


def _slice(corpus: Corpus, queries: Queries, qrels: Qrels) -> tuple[Corpus, Queries, Qrels]:
    """The longest judged queries with their relevant passages, and beside these the longest passages."""
    judged = [i for i, name in enumerate(queries.ids) if any(grade > 0 for grade in qrels.get(name, {}).values())]
    chosen = sorted(judged, key=lambda i: -len(queries.texts[i]))[:QUERIES]
    relevant = {name for i in chosen for name, grade in qrels[queries.ids[i]].items() if grade > 0}
    order = sorted(range(len(corpus)), key=lambda i: (corpus.ids[i] not in relevant, -len(corpus.texts[i])))
    rows = order[: max(PASSAGES, len(relevant))]
    ids, texts = [queries.ids[i] for i in chosen], [queries.texts[i] for i in chosen]
    return (
        Corpus(*([column[i] for i in rows] for column in (corpus.ids, corpus.texts, corpus.titles))),
        Queries(ids, texts, [queries.instructions[i] for i in chosen], [queries.rationales[i] for i in chosen]),
        {name: qrels[name] for name in ids},
    )


def _sums(engine: Engine) -> list[tuple[float, float]]:
    """Sum and norm of each tensor that this rank trains or updates: equal before and after loading, or it was not."""
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.trained]
    for weights, state in engine.optimizer.state.items():
        tensors += [weights, *(value for value in state.values() if isinstance(value, torch.Tensor))]
    with torch.no_grad():
        return [
            (float(x.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(x, dtype=torch.float64)))
            for x in tensors
            if x.is_floating_point()
        ]


def _copies() -> int:
    """Of all passages' vectors on one host: ranks put theirs together, which takes four on each."""
    return 4 * int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun's, DeepSpeed's


def _available_memory() -> int | None:
    """Bytes of this host's memory that are free or can be made so; None where the system does not say."""
    table = Path("/proc/meminfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
