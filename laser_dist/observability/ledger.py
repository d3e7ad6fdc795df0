"""Where the wall time of a run goes, over all its attempts: ledger.jsonl, written by rank 0 and its supervisor.

Unlike metrics.jsonl, from which a resume takes what is about to happen again, nothing is ever taken out: what was lost
is exactly what stands here twice. A line is written when an attempt starts, after every optimizer step and when the
attempt ends. Times are seconds since the epoch; durations are seconds by the monotonic clock since the line before.

    {"event": "start", "time": 1763870000.0, "ready": 21.4, "step": 0, "ranks": 2}
    {"step": 1, "time": 1763870023.1, "train": 1.6, "data": 0.1}
    {"step": 2, "time": 1763870027.0, "train": 1.5, "data": 0.1, "save": 2.2}
    {"event": "end", "time": 1763870027.2, "step": 2, "how": "finished"}

`time` of a start is when the process began, and `ready` how long it took to its first step. An attempt that was killed
has no end. `laser-dist launch` writes when it begins an attempt and when it is over, so that those that came to no step
stand here, too:

    {"event": "attempt", "time": 1763869990.0, "step": 0}
    {"event": "over", "time": 1763870031.5, "step": 2, "how": "finished"}
"""

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from laser_dist.errors import UserError

FILE = "ledger.jsonl"


class RunLedger:
    """Books every second of one attempt; silent on other ranks than 0. Booking never fails a run."""

    def __init__(self, output: Path, *, start_step: int, total_steps: int, enabled: bool):
        self.file, self.enabled = output / FILE, enabled
        self.number, self.total_steps = start_step, total_steps
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def step(self, number: int) -> None:
        """After all that belongs to optimizer step `number`."""
        self.number = number
        self._write({"step": number}, time.time())

    def book(self, name: str, seconds: float) -> None:
        """So much of what has passed since the last line was `name`: data (waiting for it), save or evaluate."""
        self._seconds[name] += seconds
        self._seconds["train"] -= seconds

    @contextlib.contextmanager
    def booked(self, name: str) -> Iterator[None]:
        """What happens inside is booked on `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.book(name, time.perf_counter() - began)

    def _write(self, line: dict[str, Any], at: float) -> None:
        """A line with what was booked since the one before; what nobody booked was training."""
        now = time.perf_counter()
        self._seconds["train"] += now - self._since
        self._since = now
        seconds, self._seconds = self._seconds, defaultdict(float)
        booked = {name: round(value, 4) for name, value in seconds.items() if abs(value) > 5e-5}
        if self.enabled:
            with contextlib.suppress(OSError), self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "time": round(at, 4), **booked}) + "\n")

    def __enter__(self) -> "RunLedger":
        age = process_age()
        self._since, self._seconds = time.perf_counter() - age, defaultdict(float, ready=age, train=-age)
        if self.enabled:
            _end_last_line(self.file)
        self._write(
            {"event": "start", "step": self.number, "ranks": int(os.environ.get("WORLD_SIZE", "1"))}, time.time() - age
        )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        how = "failed" if kind else "finished" if self.number >= self.total_steps else "stopped"
        why = {"why": str(error).strip().splitlines()[0][:300]} if isinstance(error, UserError) else {}
        self._write({"event": "end", "step": self.number, "how": how, **why}, time.time())


def supervised(output: Path, event: str, step: int, *, ago: float = 0.0, **more: Any) -> None:
    """A line of the supervisor's, while no rank writes: an "attempt" began, `ago` seconds ago, or is "over".

    `step`: of the newest checkpoint.
    It never fails a run.
    """
    with contextlib.suppress(OSError):
        output.mkdir(parents=True, exist_ok=True)
        _end_last_line(output / FILE)
        with (output / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, "time": round(time.time() - ago, 4), **more}) + "\n")


def _end_last_line(path: Path) -> None:
    """A kill can cut the last line off: what follows must not join it."""
    with contextlib.suppress(OSError), path.open("rb+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def process_age() -> float:
    """Seconds since this process was started, by the kernel; 0 where it does not say (no /proc)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf(
            "SC_CLK_TCK"
        )  # after boot; field 22 of proc(5), the 20th behind the name
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
