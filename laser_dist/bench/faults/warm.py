"""Ranks that are forked from this process, which has imported what takes a rank ten seconds of CPU time to import.

All that is ours runs as it does otherwise: supervision, restart, ranks, faults. DeepSpeed's launcher is stood in for:
it starts the ranks; when one ends with another code than 0 it sends SIGTERM to the others, and SIGKILL 30 s later.
"""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from laser_dist.bench.faults import rank
from laser_dist.cli import run
from laser_dist.launch import launch, outcome
from laser_dist.launch.attempt import Attempt, Result, read_outcomes
from laser_dist.launch.environment import for_attempt
from laser_dist.watch import verdict

RANKS = 2
PATIENCE = 30.0
"""Seconds between DeepSpeed's SIGTERM and its SIGKILL."""


def start(arguments: list[str], environment: dict[str, str]) -> tuple[int, IO[str]]:
    """`laser-dist launch` with forked ranks: its process, and what it and its ranks print."""
    from laser_dist.observability.console import quiet_libraries

    quiet_libraries()
    import laser_dist.trainer  # noqa: F401, what forks need not import again

    reader, writer = os.pipe()
    return fork(lambda: _supervise(arguments), environment, writer), os.fdopen(reader, errors="replace")


def fork(act: Callable[[], int], environment: dict[str, str], output: int) -> int:
    """A child, in a process group of its own, that ends with the code of `act`; closes `output`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(output)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        code = act()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _supervise(arguments: list[str]) -> int:
    launch.Attempt = WarmAttempt  # type: ignore[misc]
    return run("laser_dist.launch.launch", arguments)


class WarmAttempt(Attempt):
    """An attempt whose ranks are forks."""

    def run(self) -> Result:
        records = outcome.folder(self.job.output, self.number)
        shutil.rmtree(records, ignore_errors=True)
        began = time.monotonic()
        command = self._command()
        arguments = command[command.index(str(self.job.output / "launch" / "recipe.toml")) :]
        port = str(self.job.launcher["--master_port"])
        shared = for_attempt(self.job.output, self.number) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
        children = []
        for number in range(RANKS):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            children.append(fork(lambda: rank.main(arguments), shared | own, os.dup(2)))
        try:
            code = _wait(children)
        finally:
            for child in children:
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
        told = verdict.read(records) or verdict.inferred(records)
        return self._result(code, read_outcomes(records), told, time.monotonic() - began)


def _wait(children: list[int]) -> int:
    """Until none is left; the first code that is not 0, as DeepSpeed's launcher gives it on."""
    left, first, deadline = set(children), 0, float("inf")
    while left:
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            left.discard(child)
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first, deadline = code % 256, time.monotonic() + PATIENCE
                for other in left:
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    return first
