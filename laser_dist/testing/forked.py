"""New Python processes without the seconds that importing torch, DeepSpeed and transformers takes.

They are forked from a server that has imported them. They are processes like others, with their own group, signals and
exit code. But what libraries read from the environment while they are imported was read by the server, so that a
process whose environment differs in more than the variables in `LATE` is started the plain way.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

LATE = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"),
    *("LASER_DIST_", "PYTEST_", "PYTHONPATH", "PYTHONFAULTHANDLER", "OMP_NUM_THREADS"),
    *("TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK"),  # torch sets them for itself
)
"""Names of variables, or their beginnings, that nothing reads while it is imported, or that are seen to below."""

_server = multiprocessing.get_context("forkserver")
# What DeepSpeed imports when it makes an optimizer (torch.compile and all that it needs) is half of the seconds.
_server.set_forkserver_preload(
    ["laser_dist.trainer", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard"]
)
_environment = dict(os.environ)


class Process(Protocol):
    """What a forked process and a `subprocess.Popen` have in common."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that killed it; None while it runs."""

    def wait(self) -> int:
        """Wait until it has ended; its exit code."""


class _Forked:
    def __init__(self, call: Callable[..., Any], arguments: tuple[str, ...], env: Mapping[str, str], *files: Path):
        self.process = _server.Process(target=_run, args=(call, arguments, dict(env), *files))
        self.process.start()
        assert self.process.pid
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def start(
    call: Callable[..., Any], *arguments: str, env: Mapping[str, str], output: Path, errors: Path | None = None
) -> Process:
    """`sys.exit(call(*arguments))` in a new process with this environment.

    What it prints goes into `output`, its errors too unless they have a file of their own. `call` is a function at the
    top level of an importable module.
    """
    errors = errors or output
    if _imported_alike(env):
        return _Forked(call, arguments, env, output, errors)
    code = f"import sys; from {call.__module__} import {call.__name__} as call; sys.exit(call(*sys.argv[1:]))"
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


def run_command(
    *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """`laser-dist ARGUMENTS` in a process of its own, with variables added to this environment.

    After `timeout` seconds it is killed, and subprocess.TimeoutExpired raised.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory(prefix="run-command-") as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = start(_command, *words, env={**os.environ, **(env or {})}, output=output, errors=errors)
        deadline = time.monotonic() + timeout
        while (code := process.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):  # it and all that it started have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        told, complained = (path.read_text(errors="replace") for path in (output, errors))
    if code is None:
        raise subprocess.TimeoutExpired(words, timeout, told, complained)
    return subprocess.CompletedProcess(words, code, told, complained)


def _command(*words: str) -> int:
    from laser_dist.cli import main

    return main(list(words))


def _run(call: Callable[..., Any], arguments: tuple[str, ...], env: dict[str, str], output: Path, errors: Path) -> None:
    import torch

    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # a server's own; loaders would each start another server
    appended = os.O_WRONLY | os.O_CREAT | os.O_APPEND  # both may be one file
    files = (os.open(os.devnull, os.O_RDONLY), os.open(output, appended), os.open(errors, appended))
    for target, file in enumerate(files):
        os.dup2(file, target)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    if env.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
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
