"""What each rank says when it ends, for the supervisor, which cannot see it: launchers pass on one exit code at most.

A rank writes OUTPUT/launch/attempt-N/rank-R.json. One that was killed writes nothing, and so is known too.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.files import write_json
from laser_dist.redaction import shown

ATTEMPT = "LASER_DIST_ATTEMPT"
"""Environment variable: the number of the attempt, set by the supervisor; without it nothing is written."""


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


@contextmanager
def reported(output: str | Path) -> Iterator[Outcome]:
    """Around a rank's work, which sets `code` where it is not 0; leaves the outcome behind if a supervisor asked."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    outcome = Outcome(rank, ranks, socket.gethostname(), 0)
    try:
        yield outcome
    except BaseException as error:
        outcome.code = 2 if isinstance(error, UserError) else 1
        first = next(iter(str(error).strip().splitlines()), "")
        outcome.reason = shown(first if isinstance(error, UserError) else f"{type(error).__name__}: {first}")
        raise
    finally:
        outcome.time = time.time()
        if attempt := os.environ.get(ATTEMPT):
            write_json(folder(output, int(attempt)) / f"rank-{outcome.rank:05d}.json", asdict(outcome))
