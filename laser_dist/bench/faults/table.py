"""The faults, and what is right for each. A new row needs an act (acts.py), a phase, and how the run must end."""

from dataclasses import dataclass
from typing import Literal

STEPS, SAVED_EVERY, STRUCK_AT = 8, 2, 5
"""A run's steps, steps between checkpoints, and the step that most faults strike at: there is a median by then."""
EVALUATE = ("--evaluation.every", "4")
ONCE, ALWAYS = 1, 9


@dataclass(frozen=True)
class Row:
    """A fault, and the end that the run must come to."""

    act: str
    """Of acts.py."""
    phase: str
    """Of a pulse, or "init", when its phase is still "start": just before the ranks meet."""
    ends: Literal["recovered", "unharmed", "stopped", "saved", "mended"]
    """recovered: by a restart, with the weights of a run without faults; unharmed: the same in one attempt, without an
    alarm; stopped: with an error; saved: a checkpoint, and exit code 75; mended: stopped with an error and, started
    again once its cause is gone, recovered."""
    kind: str = ""
    """Of the verdict; "" where there is none."""
    cause: str = ""
    """What the last line must hold."""
    step: int = STRUCK_AT
    rank: int = 1
    attempts: int = ONCE
    """Attempts that the fault strikes in."""
    shards: str = ""
    """What is done to a copy of the shards before the run, of data.py; for acts that are none ("")."""
    server: tuple[str, ...] = ()
    """The first answers of an HTTP server for each shard (see FaultyServer); for acts that are none ("")."""
    machine: str = ""
    """What is wrong with the machine before the run, of machine.py; for acts that are none ("")."""
    flags: tuple[str, ...] = ()
    """Of training, beside the recipe's."""
    placed: bool = True
    """Whether the verdict's step and phase are the fault's: a loader's death shows when its batches run out."""

    @property
    def name(self) -> str:
        if self.machine:
            return f"{self.machine} | {self.phase} | -"
        if not self.act:
            return f"shard {self.shards} | data | -" if self.shards else f"HTTP {self.server[0]} | data | -"
        where = f"{self.phase}, step {self.step}" if self.step else self.phase
        again = ", each time" if self.attempts > ONCE else ""
        return f"{self.act} | {where}{again} | rank {self.rank}"


NO_FAULT = Row("none", "none", "unharmed")


def _died(act: str, phase: str, cause: str = "", **other: object) -> Row:
    return Row(act, phase, "recovered", "died", cause, **other)  # type: ignore[arg-type]


DEATHS = (
    _died("killed", "init", step=0),
    _died("killed", "preflight", step=0, flags=("--launch.preflight",)),
    _died("killed", "load", step=0),
    *(_died("killed", phase) for phase in ("data", "wait", "forward", "loss", "backward", "optimizer")),
    _died("killed", "forward", rank=0),
    _died("killed", "between steps"),
    _died("killed", "save", step=4),
    _died("killed", "evaluate", step=4, flags=EVALUATE),
    _died("segmentation fault", "forward", "Segmentation fault"),
    _died("segmentation fault", "backward", "Segmentation fault", rank=0),
    _died("abort", "optimizer", "Aborted"),
    _died("exits with 0", "forward"),
)
STOPS = (
    *(Row("stopped", phase, "recovered", "stopped", "SIGSTOP") for phase in ("data", "forward", "backward")),
    Row("stopped", "forward", "recovered", "stopped", "SIGSTOP", rank=0),
    Row("stopped", "load", "recovered", "stopped", "SIGSTOP", step=0),
    Row("stopped", "save", "recovered", "stopped", "SIGSTOP", step=4),
    Row("stopped", "evaluate", "recovered", "stopped", "SIGSTOP", step=4, flags=EVALUATE),
)
HANGS = (
    *(
        Row("hangs", phase, "recovered", "hung", "no progress")
        for phase in ("forward", "loss", "backward", "optimizer")
    ),
    Row("hangs", "forward", "recovered", "hung", "no progress", rank=0),
    Row("hangs", "data", "recovered", "hung", "no progress", flags=("--data.timeout", "1")),
    Row("spins", "forward", "recovered", "hung", "no progress"),
    Row("locks the interpreter", "forward", "recovered", "locked", "interpreter is locked"),
    Row("locks the interpreter", "optimizer", "recovered", "locked", "interpreter is locked", rank=0),
    Row("loader stopped", "forward", "recovered", "hung", "no progress", placed=False, flags=("--data.timeout", "1")),
)
ERRORS = (
    *(Row("raises", phase, "recovered", "failed", "RuntimeError: injected") for phase in ("forward", "backward")),
    Row("raises", "forward", "recovered", "failed", "RuntimeError: injected", rank=0),
    Row("raises", "load", "recovered", "failed", "RuntimeError: injected", step=0),
    Row("raises", "save", "recovered", "failed", "RuntimeError: injected", step=4),
    Row("raises", "evaluate", "recovered", "failed", "RuntimeError: injected", step=4, flags=EVALUATE),
    Row("out of memory", "forward", "recovered", "failed", "emory"),
    Row("out of memory", "load", "recovered", "failed", "emory", step=0),
    Row("a mistake of the user", "forward", "stopped", "failed", "injected mistake"),
    Row("loader killed", "forward", "recovered", "failed", "DataLoader worker", placed=False),
    Row("killed", "forward", "stopped", "died", "step 5 killed the run twice", attempts=ALWAYS),
    Row("disk full", "save", "mended", "", "cannot be saved", step=4),
)
MACHINE = (
    Row("", "init", "unharmed", machine="the usual port is taken"),
    Row("", "init", "mended", "", "listens there", machine="the port asked for is taken"),
    Row("", "init", "mended", "", "ead-only", machine="the run's folder takes no writes"),
    Row("disk takes no writes", "save", "mended", "", "ead-only", step=4),
    Row("disk takes no writes", "evaluate", "mended", "", "ead-only", step=4, rank=0, flags=EVALUATE),
)
SIGNALS = (
    Row("SIGTERM", "forward", "saved"),
    Row("SIGUSR1", "backward", "saved", rank=0),
)
NO_ALARM = (
    Row("slow", "forward", "unharmed"),
    Row("very slow", "forward", "unharmed", step=1),
    Row("very slow", "load", "unharmed", step=0),
    Row("very slow", "save", "unharmed", step=4),
    Row("very slow", "evaluate", "unharmed", step=4, flags=EVALUATE),
    Row("very slow", "between steps", "unharmed"),
    Row("the whole job is paused", "forward", "unharmed"),
    Row("the clock jumps", "forward", "unharmed"),
)
NUMBERS = (
    Row("a weight is NaN", "data", "stopped", "failed", "not finite", rank=1, placed=False),
    Row("a weight is infinite", "data", "stopped", "failed", "not finite", rank=0, placed=False),
)
SHARDS = tuple(
    Row("", "data", "stopped", "failed", "shard", placed=False, shards=damage)
    for damage in ("truncated", "with a flipped bit", "empty", "missing", "swapped with another")
)
SERVER = ("--data.timeout", "2")
HTTP = (
    *(
        Row("", "data", "unharmed", server=(fault,), flags=SERVER)
        for fault in ("408", "429", "500", "503", "reset", "truncated", "altered", "stall", "stall within")
    ),
    Row("", "data", "stopped", "failed", "it does not exist", placed=False, server=("404",) * 99, flags=SERVER),
)
EXPORT = (
    Row("killed", "export", "mended", "", "", step=0, rank=0),
    Row("SIGTERM", "export", "mended", "", "", step=0, rank=0),
    Row("raises", "export", "mended", "", "RuntimeError: injected", step=0, rank=0),
    Row("out of memory", "export", "mended", "", "emory", step=0, rank=0),
    Row("disk full", "export", "mended", "", "File too large", step=0, rank=0),
    Row("disk takes no writes", "export", "mended", "", "ead-only", step=0, rank=0),
)
"""Beside an export that is there already: it stays whole, and the next try replaces it."""
ROWS = (*DEATHS, *STOPS, *HANGS, *ERRORS, *MACHINE, *SIGNALS, *NO_ALARM, *NUMBERS, *SHARDS, *HTTP, *EXPORT)
