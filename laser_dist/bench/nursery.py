"""Ranks that are killed many times over: forked from one process that has imported everything, they start at once.

`trials` runs a module's `run_trials` in such a process: of its own, because one that has threads must not fork.
"""

import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from laser_dist.errors import UserError
from laser_dist.launch.ranks import free_port
from laser_dist.testing.forked import end, fork, lines, rank_environment, start

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
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="laser-dist-trials-") as folder:
        output, errors = Path(folder, "results"), Path(folder, "errors")
        process = start(_serve, module, json.dumps(arguments), env=environment, output=output, errors=errors)
        try:
            yield from map(json.loads, lines(process, output))
            if code := process.wait():
                told = errors.read_text(errors="replace").strip().splitlines() or [f"the trials ended with {code}"]
                raise UserError("\n".join(told[-10:]))
        finally:
            end(process)


def _serve(module: str, arguments: str) -> int:
    """What that process runs: results go to the real stdout, one JSON object a line; libraries have none."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import laser_dist.testing.imported  # noqa: F401, what forks need not import again

    try:
        for result in importlib.import_module(module).run_trials(**json.loads(arguments)):
            results.write(json.dumps(result) + "\n")
            results.flush()
    except UserError as error:
        sys.exit(str(error))
    return 0


def run_ranks(work: Callable[[int], None], ranks: int) -> tuple[list[int], str]:
    """Fork ranks that call `work(rank)` and wait for their end: exit codes, negative for a signal, and their output.

    When one is killed, the others follow. RuntimeError for a hang.
    """
    port, (reading, writing) = free_port(), os.pipe()  # a pipe: limits on the size of files do not hold for it
    os.set_blocking(reading, False)
    environments = [{**os.environ, **rank_environment(rank, ranks, port)} for rank in range(ranks)]
    forks = [fork(_rank, work, rank, env=environments[rank], output=writing) for rank in range(ranks)]
    os.close(writing)
    output, began, killed_at = b"", time.monotonic(), float("inf")
    while None in (codes := [process.poll() for process in forks]):
        output = (output + _read(reading))[-10_000:]
        now = time.monotonic()
        if killed_at > now and any(code is not None and code < 0 for code in codes):
            killed_at = now
        hangs = now - began > LIMIT
        if hangs or now - killed_at > GRACE:
            for process in forks:
                end(process)
        if hangs:
            left = [rank for rank, code in enumerate(codes) if code is None]
            raise RuntimeError(f"ranks {left} hang: {output[-2000:]!r}")
        time.sleep(0.01)
    output += _read(reading)
    os.close(reading)
    return [code for code in codes if code is not None], output.decode(errors="replace")


def _rank(work: Callable[[int], None], rank: int) -> int:
    try:
        work(rank)
    except UserError as error:
        print(f"rank {rank}: {error}", flush=True)
        return 2
    return 0


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return b""


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
