"""New Python processes without the seconds that importing torch, DeepSpeed and transformers takes.

`start`  a function, from any process: forked from a server that has imported them
`fork`   a copy of this process, closures included: only where there is one thread, as in what `start` made

Both make processes like others, with a group, an environment, signals and an exit code of their own. But what libraries
read from the environment while they are imported was read by the server, so that `start` starts a process whose
environment differs in more than the variables in `LATE` the plain way.
"""

import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

LATE = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"),
    *("LASER_DIST_", "PYTEST_", "SLURM_", "PYTHONPATH", "PYTHONFAULTHANDLER", "OMP_NUM_THREADS"),
    *("TOKENIZERS_PARALLELISM", "WDS_SECURE"),
    # torch sets them for itself, as do scikit-learn and polars once they are imported; commands that ran in this
    # process set the last one, as the server does.
    *("TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK", "KMP_", "_RJEM_", "DS_ACCELERATOR"),
)
"""Names of variables, or their beginnings, that nothing reads while it is imported, or that are seen to below."""
PATIENCE = 30.0
"""Seconds between the SIGTERM and the SIGKILL that DeepSpeed's launcher sends to the ranks that are left."""

_server, _copies = multiprocessing.get_context("forkserver"), multiprocessing.get_context("fork")
_server.set_forkserver_preload(["laser_dist.testing.imported"])
_environment = dict(os.environ)


class Process(Protocol):
    """What a forked process and a `subprocess.Popen` have in common."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that killed it; None while it runs."""

    def wait(self) -> int:
        """Wait until it has ended; its exit code."""

    def terminate(self) -> None:
        """SIGTERM."""

    def kill(self) -> None:
        """SIGKILL."""


class _Forked:
    def __init__(self, context: Any, *arguments: Any):
        self.process = context.Process(target=_run, args=arguments)
        self.process.start()
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


def start(
    call: Callable[..., Any], *arguments: str, env: Mapping[str, str], output: Path, errors: Path | None = None
) -> Process:
    """`sys.exit(call(*arguments))` in a new process with this environment.

    What it prints goes into `output`, its errors too unless they have a file of their own. `call` is a function at the
    top level of an importable module.
    """
    errors = errors or output
    if _imported_alike(env):
        return _Forked(_server, call, arguments, dict(env), output, errors)
    code = (
        f"import sys; from {call.__module__} import {call.__name__} as call; "
        "from laser_dist.testing.forked import leave; leave(call, *sys.argv[1:])"
    )
    with output.open("ab") as told, errors.open("ab") as complained:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=complained,
            start_new_session=True,  # a group of its own: what it starts is killed with it
        )


def _imported_alike(env: Mapping[str, str]) -> bool:
    names = {name for name in env.keys() | _environment.keys() if not name.startswith(LATE)}
    return all(env.get(name) == _environment.get(name) == os.environ.get(name) for name in names)


def fork(call: Callable[..., Any], *arguments: Any, env: Mapping[str, str], output: int) -> Process:
    """`sys.exit(call(*arguments))` in a copy of this process with this environment; it prints into a file that is open.

    Of several threads the copy would have one, and locks that the others held. Copies of a process that has imported
    laser_dist.testing.imported need not.
    """
    return _Forked(_copies, call, arguments, dict(env), output, output)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher tells one of `ranks` processes on this host, which meet at a port."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    told = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    if sys.platform == "linux":
        told["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
    return told


def launched(ranks: list[Process], timeout: float = float("inf")) -> int:
    """Wait as DeepSpeed's launcher does; the first exit code that is not 0, or 0. TimeoutError: some still run.

    When a rank fails, the others get SIGTERM, and SIGKILL `PATIENCE` seconds later.
    """
    first, give_up, kill_at = 0, time.monotonic() + timeout, float("inf")
    while True:
        codes, now = [rank.poll() for rank in ranks], time.monotonic()
        left = [rank for rank, code in zip(ranks, codes, strict=True) if code is None]
        if not first and (first := next((code for code in codes if code), 0)):
            kill_at = now + PATIENCE
            for rank in left:
                rank.terminate()
        if not left:
            return first
        if now > give_up:
            raise TimeoutError(f"{len(left)} of {len(ranks)} processes still ran after {timeout:g} s")
        for rank in left if now > kill_at else ():
            rank.kill()
        time.sleep(0.02)


def end(process: Process) -> None:
    """Kill a process and all that it started, and wait for it; one that has ended may have left some behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lines(process: Process, output: Path, timeout: float = float("inf")) -> Iterator[str]:
    """What a process prints into a file, line by line as it comes, until it has ended; after `timeout` it is killed."""
    give_up, part = time.monotonic() + timeout, b""
    output.touch()
    with output.open("rb") as file:
        running = True
        while running:
            running = process.poll() is None  # asked before reading, so that nothing is missed
            *whole, part = (part + file.read()).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
            if time.monotonic() > give_up:
                end(process)
            elif running:
                time.sleep(0.01)
    if part:
        yield part.decode(errors="replace")


def _run(
    call: Callable[..., Any], arguments: tuple[Any, ...], env: dict[str, str], output: Path | int, errors: Path | int
) -> None:
    import torch

    gc.freeze()  # what is here already is here to stay: to look through it again and again takes as long as a test
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the process that forked it
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as in a new process, whatever was forked does with them
        signal.signal(number, signal.SIG_DFL)
    multiprocessing.set_start_method(None, force=True)  # a server's own; loaders would each start another server
    appended = os.O_WRONLY | os.O_CREAT | os.O_APPEND  # both may be one file
    files = [file if isinstance(file, int) else os.open(file, appended) for file in (output, errors)]
    for target, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
        os.dup2(file, target)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    if env.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    leave(call, *arguments)


def leave(call: Callable[..., Any], *arguments: Any) -> NoReturn:
    """End this process as `sys.exit(call(*arguments))` does."""
    try:
        code = call(*arguments)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for printed in (sys.stdout, sys.stderr):
        printed.flush()
    # At once: threads of a process group that nobody destroyed would abort an orderly end.
    os._exit(1 if isinstance(code, str) else int(code or 0))
