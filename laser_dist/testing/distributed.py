"""Run a function on several ranks: real processes, so that collectives, crashes and hangs are the real ones."""

import importlib
import importlib.util
import inspect
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laser_dist.launch.ranks import free_port
from laser_dist.testing.forked import Process, end, rank_environment, start

_LINES_SHOWN = 40
_INSIDE = "LASER_DIST_INSIDE_RUN_DISTRIBUTED"


class RankFailed(RuntimeError):
    """A rank raised, crashed or hung; `rank` is the first one, and `__cause__` its exception where it left one."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    timeout: float = 300,
    init: bool = False,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """`fn(rank, world_size, *args)` in `world_size` new processes; returns what each rank returned.

    `fn` must be at the top level of its file; arguments and results must be picklable (tensors are). When one rank
    fails, or `timeout` seconds have passed, all are killed and RankFailed tells which was first and why. `init`: call
    `torch.distributed.init_process_group(backend)` before and destroy it after; otherwise only the environment is set.
    """
    if os.environ.get(_INSIDE):
        raise RuntimeError(
            "run_distributed was called by a rank of run_distributed, probably while it loaded the caller's file: "
            'put the call under `if __name__ == "__main__":` or into a test function'
        )
    with tempfile.TemporaryDirectory(prefix="run-distributed-") as name:
        folder = Path(name)
        job = {
            "module": fn.__module__,
            "file": str(Path(inspect.getfile(fn)).resolve()),
            "name": fn.__qualname__,
            "backend": backend if init else None,
            # By value, not as an object: unpickling may need the module, which the child loads first.
            "args": pickle.dumps(args),
        }
        (folder / "job").write_bytes(pickle.dumps(job))
        port = free_port()
        ranks = [_start(rank, world_size, folder, port, env or {}) for rank in range(world_size)]
        try:
            _wait(ranks, folder, timeout)
        finally:
            for process in ranks:
                end(process)
        for rank in range(world_size):
            sys.stdout.write(_output(folder, rank))  # pytest shows it when the test fails
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _start(rank: int, world_size: int, folder: Path, port: int, extra: dict[str, str]) -> Process:
    # The parent's path, so that the child finds the modules that the parent has found.
    path = [p for p in sys.path if p]
    own = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path),
        _INSIDE: "1",
        "PYTHONFAULTHANDLER": "1",  # a stack for a crash, and for a hang (see _wait)
    }
    env = {**os.environ, **rank_environment(rank, world_size, port), **own, **extra}
    return start(_child, str(folder), env=env, output=folder / f"output-{rank}")


def _child(name: str) -> None:
    """What each process runs: load the function, call it, leave its result or its exception behind."""
    folder, rank, world_size = Path(name), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        import torch

        torch.set_num_threads(1)
        job = pickle.loads((folder / "job").read_bytes())
        fn: Any = _load(job["module"], job["file"])
        for part in job["name"].split("."):
            fn = getattr(fn, part)
        args = pickle.loads(job["args"])
        if job["backend"]:
            torch.distributed.init_process_group(job["backend"])
        result = pickle.dumps(fn(rank, world_size, *args))
        if job["backend"]:
            torch.distributed.destroy_process_group()
        _leave(folder / f"result-{rank}", result)
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(cause := pickle.dumps(error))
        except Exception:  # an exception with a lock, a lambda or a constructor of its own
            cause = pickle.dumps(None)
        _leave(folder / f"error-{rank}", pickle.dumps((time.monotonic(), trace, cause)))
        # At once: threads of a collective that can no longer end would keep the process alive.
        sys.stdout.flush()
        os._exit(1)


def _load(module: str, file: str) -> Any:
    """The module as the parent knows it. A test file is often on nobody's path, so it is loaded from the file."""
    try:
        found = importlib.import_module(module)
        if Path(getattr(found, "__file__", None) or "").resolve() == Path(file):
            return found
    except ImportError:
        pass
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec and spec.loader
    loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _leave(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.rename(path)


def _wait(ranks: list[Process], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in ranks]
        if any(codes):
            _raise(codes, folder)
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            hung = [rank for rank, code in enumerate(codes) if code is None]
            for rank in hung:
                os.kill(ranks[rank].pid, signal.SIGABRT)  # the fault handler writes every thread's stack
            time.sleep(1)
            message = f"ranks {hung} of {len(ranks)} still ran after {timeout:g} s; rank {hung[0]} was here:\n"
            raise RankFailed(hung[0], message + _output(folder, hung[0], _LINES_SHOWN))
        time.sleep(0.02)


def _raise(codes: list[int | None], folder: Path) -> None:
    """The first failure: when one rank dies, its peers' collectives fail soon after, and that is not the cause."""
    left = {rank: folder / f"error-{rank}" for rank in range(len(codes))}
    errors = {rank: pickle.loads(path.read_bytes()) for rank, path in left.items() if path.exists()}
    crashed = [rank for rank, code in enumerate(codes) if code and rank not in errors]
    if crashed:
        rank, code = crashed[0], codes[crashed[0]]
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited with code {code}"
        raise RankFailed(rank, f"rank {rank} of {len(codes)} {how}:\n{_output(folder, rank, _LINES_SHOWN)}")
    rank = min(errors, key=lambda r: errors[r][0])
    _, trace, cause = errors[rank]
    output = _output(folder, rank, _LINES_SHOWN)
    raise RankFailed(rank, f"rank {rank} of {len(codes)} failed:\n{output}\n{trace}") from pickle.loads(cause)


def _output(folder: Path, rank: int, last: int = 0) -> str:
    lines = (folder / f"output-{rank}").read_text(errors="replace").splitlines()
    return "".join(f"[rank {rank}] {line}\n" for line in lines[-last:])
