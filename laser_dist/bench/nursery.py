"""Ranks that are killed many times over: forked from one process that has imported everything, they start at once.

`trials` runs a module's `run_trials` in such a process: of its own, because one that has started threads must not fork.
"""

import contextlib
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from laser_dist.errors import UserError
from laser_dist.launch.ranks import free_port

if TYPE_CHECKING:
    import torch

    from laser_dist.distributed.engine import Engine

GRACE = 2.0
"""Seconds between the death of a rank and that of the others: some write on meanwhile, as on another machine."""
LIMIT = 120.0
"""Seconds of one trial; what takes longer hangs."""


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What all benchmarks of killed ranks are asked."""

    kills: int
    ranks: int = 2
    """Processes that are killed together."""
    stage: Literal[0, 1, 2, 3] = 3
    """ZeRO stage."""
    seed: int = 0
    """Of what is random."""
    out: Path | None = None
    """Also write the result to this JSON file."""

    def validate(self) -> None:
        """Raises UserError for values that nothing can be tried with."""
        for name in ("kills", "ranks"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")


def trials(module: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `module.run_trials(**arguments)` yields, one by one. UserError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", "from laser_dist.bench.nursery import _serve; _serve()", module]
    told = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up
    process = subprocess.Popen(
        [*command, json.dumps(arguments)], env=environment, stdout=subprocess.PIPE, stderr=told, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield json.loads(line)
        if process.wait():
            told.seek(0)
            lines = told.read().strip().splitlines() or [f"the trials ended with {process.returncode}"]
            raise UserError("\n".join(lines[-10:]))
    finally:
        process.kill()
        process.wait()
        told.close()


def _serve() -> None:
    """What that process runs: results go to the real stdout, one JSON object a line; libraries have none."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(sys.argv[1])
    try:
        for result in module.run_trials(**json.loads(sys.argv[2])):
            results.write(json.dumps(result) + "\n")
            results.flush()
    except UserError as error:
        sys.exit(str(error))


def run_ranks(work: Callable[[int], None], ranks: int, *, learn: bool = False) -> tuple[list[int], str]:
    """Fork ranks that call `work(rank)` and wait for their end: exit codes, negative for a signal, and their output.

    When one is killed, the others follow. RuntimeError for a hang. `learn`: import afterwards what rank 0 has imported,
    so that later ranks need not.
    """
    if learn:
        with tempfile.NamedTemporaryFile("r") as file:
            ended = run_ranks(lambda rank: _noting_imports(work, rank, file.name), ranks)
            for name in file.read().split():
                with contextlib.suppress(Exception):  # some cannot be had alone
                    importlib.import_module(name)
        return ended
    port, (reading, writing) = free_port(), os.pipe()  # a pipe: limits on the size of files do not hold for it
    os.set_blocking(reading, False)
    pids = {_fork(work, rank, ranks, port, writing): rank for rank in range(ranks)}
    os.close(writing)
    codes: dict[int, int] = {}
    output = b""
    began, killed_at = time.monotonic(), None
    while pids:
        output = (output + _read(reading))[-10_000:]
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            code = codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
            killed_at = killed_at or (time.monotonic() if code < 0 else None)
            continue
        now = time.monotonic()
        hangs = now - began > LIMIT
        if hangs or (killed_at and now - killed_at > GRACE):
            for other in pids:
                os.kill(other, signal.SIGKILL)
        if hangs:
            raise RuntimeError(f"ranks {sorted(pids.values())} hang: {output[-2000:]!r}")
        time.sleep(0.01)
    output += _read(reading)
    os.close(reading)
    return [codes[rank] for rank in range(ranks)], output.decode(errors="replace")


def _noting_imports(work: Callable[[int], None], rank: int, file: str) -> None:
    work(rank)
    if rank == 0:
        with open(file, "w") as names:
            names.write("\n".join(sorted(sys.modules)))


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return b""


def _fork(work: Callable[[int], None], rank: int, ranks: int, port: int, output: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
        os.environ.update(MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(ranks))
        work(rank)
        code = 0
    except UserError as error:
        print(f"rank {rank}: {error}", flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # nothing of the parent's is run in the child


def digest(engine: "Engine") -> str:
    """SHA-256 of what this rank trains and of its optimizer's states, to the last bit."""
    tensors: list[Any] = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.trained]
    for weights, state in engine.optimizer.state.items():
        tensors += [weights, *(state[name] for name in sorted(state))]
    found = hashlib.sha256()
    for value in tensors:
        found.update(_bytes(value) if hasattr(value, "detach") else repr(value).encode())
    return found.hexdigest()


def _bytes(tensor: "torch.Tensor") -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
