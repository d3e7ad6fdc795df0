"""What this rank is doing: a small file that it keeps up to date, and that other ranks and the supervisor read.

The training thread writes when its phase changes, the watchdog's thread a few times a second: a process that is
stopped, or whose interpreter is locked, does not tick, while one that waits in a collective does. Written with pwrite,
not mapped: a page that does not fit on a full disk would kill the process, and a SIGKILL takes neither away.
"""

import json
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

RECORD, EXAMPLES = 2048, 8192
"""Bytes of a pulse, and of the example ids after it."""
STEPPING = ("data", "wait", "forward", "loss", "backward", "optimizer", "bookkeeping")
"""Phases of a step, which take about as long each time. All others (loading, saving, ...) take what they take."""
FIRST_STEPS = 3
"""Steps before a median says what is usual: the first ones compile, allocate and start loaders."""
RECENT_STEPS = 50


@dataclass(frozen=True)
class Limits:
    """When a rank that makes no progress counts as hung; see LaunchConfig and DataConfig."""

    steps: float = 3.0
    """So many median steps, 0 for never ..."""
    seconds: float = 5.0
    """... and these seconds."""
    data_seconds: float = 30.0
    """Reading may take so long at least: shards come at their store's pace."""


@dataclass
class Beat:
    """One rank's state."""

    rank: int
    ranks: int
    host: str
    pid: int
    started: int
    """Clock ticks from boot to the process's start: a number may come again, both together do not. 0: nobody knows."""
    namespace: int
    """Of process ids: those of another one mean nothing here."""
    step: int = 0
    """The optimizer step at work, from 1; 0 before the first."""
    phase: str = "start"
    changes: int = 0
    """Phases entered so far: progress that can be compared between ranks."""
    patience: float | None = None
    """Seconds that the phase may take; None: as long as it takes."""
    brief: float = 5.0
    """Seconds that a process may be stopped or silent, whatever its phase."""
    waiting: bool = False
    """In a collective: for others, that is."""
    ticks: int = 0
    code: int | None = None
    """How the rank ended, as in launch/outcome.py; None while it runs."""
    blames: int | None = None
    """The rank because of which this one failed, maybe itself."""
    kind: str = ""
    reason: str = ""
    """What it says of that rank; see judge.Finding."""


def identity() -> Beat:
    """A beat of this process, from what the launcher says."""
    pid = os.getpid()
    started = namespace = 0
    with suppress(OSError):
        if os.readlink("/proc/self") == str(pid):  # in some containers /proc is another namespace's
            started = (process(pid) or ("", 0))[1]
            namespace = os.stat("/proc/self/ns/pid").st_ino
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Beat(rank, ranks, socket.gethostname(), pid, started, namespace)


def process(pid: int) -> tuple[str, int] | None:
    """State (R, S, D, T, ...) and start of a process of this host; None if there is none, or only its remains."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before it may hold anything
    except OSError:
        return None
    return None if fields[0] in "ZX" else (fields[0], int(fields[19]))


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"pulse-{rank:05d}"


def read(path: Path) -> Beat | None:
    """The newest beat in a file; None if there is none, or one that is just being written."""
    try:
        with path.open("rb") as file:
            return Beat(**json.loads(file.read(RECORD)))
    except (OSError, ValueError, TypeError):
        return None


def read_examples(path: Path) -> tuple[int, list[str]]:
    """The step and the query ids of the last micro-batch that a rank had in hand; (0, []) if there was none."""
    try:
        with path.open("rb") as file:
            file.seek(RECORD)
            step, ids = json.loads(file.read(EXAMPLES))
            return int(step), [str(name) for name in ids]
    except (OSError, ValueError, TypeError):
        return 0, []


class Pulse:
    """Writes this rank's beat. A write that fails (a full disk, say) is left out: watching must not end a run."""

    def __init__(self, path: Path, beat: Beat, limits: Limits) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.beat, self.limits = path, beat, limits
        self.seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        beat.brief = limits.seconds
        self._write()

    def enter(self, phase: str) -> str:
        """Begin a phase; returns the one before it."""
        with self._lock:
            before, beat = self.beat.phase, self.beat
            beat.phase, beat.changes, beat.patience = phase, beat.changes + 1, self._patience(phase)
            self._write()
        return before

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around an optimizer step. An error leaves step and phase where it came up."""
        began = time.monotonic()
        self.beat.step = number
        self.enter("bookkeeping")
        yield
        self.seconds.append(time.monotonic() - began)
        if self.limits.steps:
            self.beat.brief = self.limits.steps * median(self.seconds) + self.limits.seconds
        self.enter("between steps")

    def examples(self, ids: Sequence[str]) -> None:
        """The queries of the micro-batch at hand."""
        listed = list(ids)
        while len(text := json.dumps([self.beat.step, listed]).encode()) > EXAMPLES:
            listed = listed[: len(listed) // 2]
        self._pwrite(text.ljust(EXAMPLES), RECORD)

    def tick(self, *, waiting: bool) -> None:
        with self._lock:
            self.beat.ticks, self.beat.waiting = self.beat.ticks + 1, waiting
            self._write()

    def end(self, code: int, blames: int | None = None, kind: str = "", reason: str = "") -> None:
        with self._lock:
            self.beat.code, self.beat.blames, self.beat.kind, self.beat.reason = code, blames, kind, reason[:400]
            self._write()

    def sync(self) -> None:
        """Let other hosts see it now; the system would by and by."""
        with suppress(OSError):
            os.fsync(self._file)

    def _patience(self, phase: str) -> float | None:
        if not self.limits.steps or phase not in STEPPING or len(self.seconds) < FIRST_STEPS:
            return None
        return max(self.beat.brief, self.limits.data_seconds) if phase == "data" else self.beat.brief

    def _write(self) -> None:
        self._pwrite(json.dumps(vars(self.beat), ensure_ascii=False).encode().ljust(RECORD), 0)

    def _pwrite(self, content: bytes, offset: int) -> None:
        with suppress(OSError):
            os.pwrite(self._file, content, offset)


current: Pulse | None = None
"""This process's, if it is watched."""


def enter(phase: str) -> str:
    """Begin a phase; returns the one before it, to be entered again. Costs nothing where nobody watches."""
    return current.enter(phase) if current else ""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase with an end. An error leaves it where it came up."""
    before = enter(name)
    yield
    enter(before)


@contextmanager
def step(number: int) -> Iterator[None]:
    """Optimizer step `number`, from 1."""
    if current is None:
        yield
        return
    with current.step(number):
        yield


def examples(ids: Sequence[str]) -> None:
    """The queries of the micro-batch at hand, to be named if it kills the run."""
    if current is not None:
        current.examples(ids)


def never(seconds: float | None) -> float:
    """Patience as a number."""
    return math.inf if seconds is None else seconds
