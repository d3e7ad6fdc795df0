"""A supervisor whose ranks are its forks, as importing takes ten seconds of CPU time a rank.

All that is ours runs as it does otherwise: supervision, restart, ranks, faults. DeepSpeed's launcher is stood in for
(see `forked.launched`).
"""

import os
import shutil
import time
from pathlib import Path

from laser_dist.bench.faults import rank
from laser_dist.cli import run
from laser_dist.launch import launch, outcome
from laser_dist.launch.attempt import Attempt, Result, read_outcomes
from laser_dist.launch.environment import for_attempt
from laser_dist.testing import forked
from laser_dist.watch import verdict

RANKS = 2


def start(arguments: list[str], environment: dict[str, str], output: Path) -> forked.Process:
    """`laser-dist launch` with forked ranks; it and its ranks print into `output`."""
    return forked.start(_supervise, *arguments, env={**os.environ, **environment}, output=output)


def _supervise(*arguments: str) -> int:
    import laser_dist.testing.imported  # noqa: F401, what forks need not import again

    launch.Attempt = WarmAttempt  # type: ignore[misc]
    return run("laser_dist.launch.launch", list(arguments))


class WarmAttempt(Attempt):
    """An attempt whose ranks are forks."""

    def run(self) -> Result:
        records = outcome.folder(self.job.output, self.number)
        shutil.rmtree(records, ignore_errors=True)
        began = time.monotonic()
        command = self._command()
        arguments = command[command.index(str(self.job.output / "launch" / "recipe.toml")) :]
        shared = {**os.environ, **for_attempt(self.job.output, self.number)}
        port = int(self.job.launcher["--master_port"] or 0)
        ranks = []
        for number in range(RANKS):
            own = forked.rank_environment(number, RANKS, port)
            ranks.append(forked.fork(rank.main, arguments, env=shared | own, output=2))
        try:
            code = forked.launched(ranks) % 256  # of a signal: as a shell sees it
        finally:
            for process in ranks:
                forked.end(process)
        told = verdict.read(records) or verdict.inferred(records)
        return self._result(code, read_outcomes(records), told, time.monotonic() - began)
