"""The processes of `LaserEncoder.pool`: one encoder per device, batches of token ids in, vectors out.

1. Each worker is started by its own command, not by multiprocessing, which imports the caller's main module again: that
   may not be importable, and may start the pool again.
2. The pool tokenises and forms batches as one process does, so vectors do not depend on how many workers there are.
3. A request is one line of JSON, an answer one line of JSON followed by the float32 values. A worker whose input ends
   ends, so none outlives its parent; a parent whose worker's output ends raises WorkerFailed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from queue import SimpleQueue
from typing import IO, Any

import numpy as np

from laser_dist.batch import TokenSequence
from laser_dist.errors import UserError
from laser_dist.retrieval.loading import find_device

_LINES_SHOWN = 20


class WorkerFailed(RuntimeError):
    """A process of a pool died or could not compute; the message has its last words."""


class Workers:
    """One running worker per device; `map` shares batches among them. A context manager: leaving it ends them."""

    def __init__(self, origin: dict[str, Any], devices: Sequence[str]):
        """`origin`: the arguments of LaserEncoder.from_pretrained. Raises UserError, WorkerFailed."""
        if isinstance(devices, str) or not devices:
            raise UserError(f'devices = {devices!r}: expected a list with one device per process, e.g. ["cpu", "cpu"]')
        for device in devices:
            find_device(device)
        self._all: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        try:
            # All first, then wait: they load at the same time.
            for device in devices:
                self._all.append(_Worker(origin, str(device), len(devices)))
            for worker in self._all:
                worker.answer()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def map(self, jobs: Sequence[Sequence[TokenSequence]], steps: int, dim: int) -> Iterator[np.ndarray]:
        """The vectors of each batch of rows, [rows, dim], in order. After a failure the pool is closed."""
        executor = ThreadPoolExecutor(len(self._all))
        try:
            yield from executor.map(lambda rows: self._encode(rows, steps, dim), jobs)
        except BaseException:
            self.close()  # threads that wait for an answer get its end
            raise
        finally:
            executor.shutdown(cancel_futures=True)

    def close(self) -> None:
        for worker in self._all:
            worker.close()

    def _encode(self, rows: Sequence[TokenSequence], steps: int, dim: int) -> np.ndarray:
        worker = self._idle.get()
        try:
            worker.ask({"rows": [astuple(row) for row in rows], "steps": steps, "dim": dim})
            return worker.answer()
        finally:
            self._idle.put(worker)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    def __init__(self, origin: dict[str, Any], device: str, count: int):
        self.device = device
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        threads = max(1, (os.cpu_count() or 1) // count)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from laser_dist.retrieval.workers import serve; serve()"],
            # The parent's path, so that the child finds the modules that the parent has found.
            env={"OMP_NUM_THREADS": str(threads)}
            | os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
        )
        self.ask({**origin, "device": device})

    def ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise self._failure() from None

    def answer(self) -> np.ndarray:
        assert self._process.stdout
        try:
            head = json.loads(self._process.stdout.readline() or "null")
            if head is None:
                raise self._failure()
            if "error" in head:
                raise UserError(head["error"])
            values = self._process.stdout.read(4 * int(np.prod(head["shape"])))
            return np.frombuffer(values, np.float32).reshape(head["shape"])
        except ValueError:  # cut off, or closed by another thread
            raise self._failure() from None

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()  # it holds nothing that is not here
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe:
                    pipe.close()
            except OSError:  # what was not read by the dead process
                pass

    def _failure(self) -> WorkerFailed:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").splitlines()[-_LINES_SHOWN:]
        return WorkerFailed("\n".join([f"the pool's process on {self.device} ended with code {code}", *words]))


def serve() -> None:
    """What each process runs: load the encoder, then answer until the input ends."""
    # Answers have a descriptor of their own: what a library prints goes to the last words.
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        from laser_dist.retrieval.encoder import LaserEncoder

        encoder = None
        for line in sys.stdin.buffer:
            request = json.loads(line)
            vectors, head = np.zeros((0, 0), np.float32), {}
            try:
                if encoder is None:
                    encoder = LaserEncoder.from_pretrained(request.pop("folder"), **request)
                else:
                    rows = [TokenSequence(*row) for row in request["rows"]]
                    vectors = encoder.encode_batch(rows, request["steps"], request["dim"])
            except UserError as error:
                head = {"error": str(error)}
            output.write(json.dumps(head or {"shape": vectors.shape}).encode() + b"\n" + vectors.tobytes())
            output.flush()
