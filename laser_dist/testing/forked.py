"""New Python processes without the seconds that importing torch, DeepSpeed and transformers takes.

They are forked from a server that has imported them. They are processes like others, with their own group, signals and
exit code. But what libraries read from the environment while they are imported was read by the server, so that a
process whose environment differs in more than the variables in `LATE` is started the plain way.
"""

import faulthandler
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

LATE = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"),
    *("LASER_DIST_", "PYTEST_", "PYTHONPATH", "PYTHONFAULTHANDLER", "OMP_NUM_THREADS"),
)
"""Names of variables, or their beginnings, that nothing reads while it is imported, or that are seen to below."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["laser_dist.trainer"])
_environment = dict(os.environ)


class Process(Protocol):
    """What a forked process and a `subprocess.Popen` have in common."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that killed it; None while it runs."""

    def wait(self) -> int:
        """Wait until it has ended; its exit code."""


class _Forked:
    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...], env: Mapping[str, str], output: Path):
        self.process = _server.Process(target=_run, args=(call, arguments, dict(env), os.fspath(output)))
        self.process.start()
        assert self.process.pid
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def start(call: Callable[..., Any], *arguments: str, env: Mapping[str, str], output: Path) -> Process:
    """`sys.exit(call(*arguments))` in a new process with this environment; all that it prints goes into `output`.

    `call` is a function at the top level of an importable module.
    """
    if _imported_alike(env):
        return _Forked(call, arguments, env, output)
    code = f"import sys; from {call.__module__} import {call.__name__} as call; sys.exit(call(*sys.argv[1:]))"
    with output.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own: what it starts is killed with it
        )


def _imported_alike(env: Mapping[str, str]) -> bool:
    names = {name for name in env.keys() | _environment.keys() if not name.startswith(LATE)}
    return all(env.get(name) == _environment.get(name) == os.environ.get(name) for name in names)


def _run(call: Callable[..., Any], arguments: tuple[Any, ...], env: dict[str, str], output: str) -> None:
    import torch

    os.setsid()
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (stream, 1), (stream, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    if env.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    sys.exit(call(*arguments))
