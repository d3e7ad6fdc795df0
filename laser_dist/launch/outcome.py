"""What each rank says when it ends, for the supervisor, which cannot see it: launchers pass on one exit code at most.

A rank writes OUTPUT/launch/attempt-N/rank-R.json. One that was killed writes nothing, and so is known too. What ended
the run is told once, by one rank (see laser_dist/watch): as verdict.json there, and without a supervisor as a line.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.files import write_json
from laser_dist.redaction import shown
from laser_dist.run_folder import latest_checkpoint
from laser_dist.watch.verdict import Verdict
from laser_dist.watch.watchdog import Watchdog

ATTEMPT = "LASER_DIST_ATTEMPT"
"""Environment variable: the number of the attempt, set by the supervisor; without it nothing is written."""
LONGEST_END = 30.0
"""Seconds; a watchdog that found something wrong takes much less to end its process."""
EXIT_PREEMPTED = 75
"""Exit code after a signal asked to stop and a checkpoint was saved: resume later (EX_TEMPFAIL)."""


class Asked(BaseException):
    """A signal asked to stop before there was anything to save."""


@dataclass
class Outcome:
    """How one rank ended."""

    rank: int
    ranks: int
    """How many there were."""
    host: str
    code: int
    """0 finished, 2 a user error, 75 saved and stopped because a signal asked for it, 1 anything else."""
    reason: str = ""
    time: float = 0.0
    """Seconds since the epoch, by the host's clock."""


def folder(output: str | Path, attempt: int) -> Path:
    return Path(output) / "launch" / f"attempt-{attempt}"


def own_folder(output: str | Path) -> Path:
    """Of this process's attempt; attempt 0 is one without a supervisor."""
    return folder(output, int(os.environ.get(ATTEMPT) or 0))


@contextmanager
def reported(output: str | Path, watchdog: Watchdog | None = None) -> Iterator[Outcome]:
    """Around a rank's work, which sets `code` where it is not 0; leaves the outcome behind if a supervisor asked.

    What another rank caused is told as that rank's failure, also where a UserError was made of it. An error that is not
    the user's to mend ends the process here, where ranks are watched: its last line is the verdict.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    outcome = Outcome(rank, ranks, socket.gethostname(), 0)

    def leave(code: int, reason: str) -> None:
        outcome.code, outcome.reason, outcome.time = code, reason, time.time()
        if os.environ.get(ATTEMPT):
            with suppress(OSError):
                write_json(own_folder(output) / f"rank-{outcome.rank:05d}.json", asdict(outcome))

    if watchdog:
        watchdog.on_end, watchdog.on_verdict = leave, lambda told: say(output, told)
        if os.environ.get(ATTEMPT):
            watchdog.start()  # the supervisor has made the folder, and asks also who failed before the ranks met
            watchdog.before_meeting()
    try:
        yield outcome
    except Asked as asked:
        if watchdog and watchdog.found_at:
            time.sleep(LONGEST_END)  # a launcher sends signals to those who are left: the watchdog says why, and ends
        leave(EXIT_PREEMPTED, str(asked))
        if watchdog and watchdog.active:
            watchdog.close(EXIT_PREEMPTED)
            watchdog.leave(EXIT_PREEMPTED, str(asked))  # ranks that wait to meet would keep this one alive
        return
    except BaseException as error:
        code = 2 if isinstance(error, UserError) else 1
        first = next(iter(str(error).strip().splitlines()), "")
        reason = shown(first if isinstance(error, UserError) else f"{type(error).__name__}: {first}")
        if watchdog and watchdog.active:
            unexpected = isinstance(error, Exception) and not isinstance(error, UserError)
            told = watchdog.fail(error, code, reason, shown=unexpected)
            if unexpected or told != code:  # what is not the user's to mend is not said to be
                code = told
                watchdog.leave(code, reason)
        leave(code, reason)
        raise
    leave(outcome.code, "")
    if watchdog:
        watchdog.close(outcome.code)


def say(output: str | Path, told: Verdict) -> None:
    """The last line of a run without a supervisor, which would say it itself; a UserError is its own message."""
    if not os.environ.get(ATTEMPT) and not told.mendable:
        print(f"laser-dist: {told.line}; {next_action(output, told)}", file=sys.stderr, flush=True)


def next_action(output: str | Path, told: Verdict) -> str:
    """What there is to do, and where to look."""
    try:
        start = f"--resume goes on from {latest_checkpoint(Path(output)).name}"
    except UserError:
        start = "there is no checkpoint yet, so start again"
    return f"{start}; stacks of all ranks: {own_folder(output)}/stacks-*.txt"
