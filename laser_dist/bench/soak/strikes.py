"""What may strike a rank at any time of a run, and the end that is right for it."""

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Act:
    """A kind of strike."""

    name: str
    """Of faults/acts.py, unless a signal from outside does it."""
    ends: Literal["restart", "requeue", "mended", "nothing"]
    """What the job does: start again; end with 75, and be started again by a scheduler; start again, or end with 2 for
    the user to mend something; go on."""
    kind: str = ""
    """Of the verdict; "" where there must be none."""
    when: Literal["any", "watched", "unwatched", "step", "save", "met"] = "any"
    """watched: in a phase that may take so long only; unwatched: in one that takes what it takes; step: in a step that
    has its batch; met: once the ranks have met. From outside any moment of it, from inside where a phase begins."""
    number: int = 0
    """The signal that does it from outside, 0 for an act of the rank itself."""
    job: bool = False
    """Whether all processes of the job get the signal, as a scheduler sends it."""


ACTS = (
    Act("SIGKILL", "restart", "died", number=signal.SIGKILL),
    Act("SIGSEGV", "restart", "died", number=signal.SIGSEGV),
    Act("SIGABRT", "restart", "died", number=signal.SIGABRT),
    Act("SIGSTOP", "restart", "stopped", "met", number=signal.SIGSTOP),
    Act("killed", "restart", "died"),
    Act("exits with 0", "restart", "died"),
    Act("raises", "restart", "failed"),
    Act("out of memory", "restart", "failed"),
    Act("hangs", "restart", "hung", "watched"),
    Act("spins", "restart", "hung", "watched"),
    Act("locks the interpreter", "restart", "locked", "watched"),
    Act("loader killed", "restart", "failed", "step"),
    Act("loader stopped", "restart", "hung", "watched"),
    Act("disk full", "mended", "failed", "save"),
    Act("SIGTERM to the job", "requeue", number=signal.SIGTERM, job=True),
    Act("SIGUSR1", "requeue"),
    Act("slow", "nothing"),
    Act("very slow", "nothing", when="unwatched"),
    Act("the whole job is paused", "nothing"),
    Act("the clock jumps", "nothing"),
)


def shuffled(acts: tuple[Act, ...], rng: random.Random) -> Iterator[Act]:
    """For ever, each as often as the others."""
    while True:
        yield from rng.sample(acts, len(acts))
