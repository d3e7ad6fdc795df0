"""`laser-dist COMMAND` in processes that need not import everything anew (see forked.py)."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from laser_dist.launch.ranks import free_port
from laser_dist.testing.forked import Process, end, launched, rank_environment, start


def run_command(
    *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 300, ranks: int = 0
) -> "subprocess.CompletedProcess[str]":
    """`laser-dist ARGUMENTS` in a process, or one for each rank, with variables added to this environment.

    After `timeout` seconds all are killed, and subprocess.TimeoutExpired raised.
    """
    with tempfile.TemporaryDirectory(prefix="run-command-") as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        for file in (output, errors):
            file.touch()  # a process may be killed before it opens them
        started = start_command(*arguments, env=env, ranks=ranks, output=output, errors=errors)
        code: int | None = None
        with contextlib.suppress(TimeoutError):
            code = launched(started, timeout)
        for process in started:
            end(process)
        told, complained = (path.read_text(errors="replace") for path in (output, errors))
    words = list(map(str, arguments))
    if code is None:
        raise subprocess.TimeoutExpired(words, timeout, told, complained)
    return subprocess.CompletedProcess(words, code, told, complained)


def start_command(
    *arguments: object, env: Mapping[str, str] | None = None, ranks: int = 0, output: Path, errors: Path | None = None
) -> list[Process]:
    """As `run_command`, without waiting. Ranks are started as by `deepspeed --module`: see `launched`."""
    words, port = list(map(str, arguments)), free_port()
    own = [rank_environment(rank, ranks, port) for rank in range(ranks)] or [{}]
    shared = {**os.environ, **(env or {})}
    return [start(_main, "laser_dist.cli", *words, env=shared | place, output=output, errors=errors) for place in own]


def run_commands(
    commands: list[list[str]], *, cwd: Path, env: Mapping[str, str], timeout: float = 600
) -> "list[subprocess.CompletedProcess[str]]":
    """Commands in a folder, with variables that are read while libraries are imported: which is done once for all."""
    code = (
        "import json, sys; from laser_dist.testing import run_command\n"
        "done = [run_command(*words) for words in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[one.args, one.returncode, one.stdout, one.stderr] for one in done]))"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **env},
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=True,
    )
    return [subprocess.CompletedProcess(*one) for one in json.loads(done.stdout.splitlines()[-1])]


def popen(command: list[str], *, env: Mapping[str, str], stdout: IO[bytes], stderr: int) -> Process:
    """In the place of subprocess.Popen, for `python -m MODULE ...` that prints all into a file."""
    python, option, module, *arguments = command
    assert (python, option, stderr) == (sys.executable, "-m", subprocess.STDOUT), command
    return start(_main, module, *arguments, env=env, output=Path(stdout.name))


def _main(module: str, *words: str) -> int:
    from laser_dist.cli import run

    return run(module, list(words))
