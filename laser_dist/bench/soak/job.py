"""One start of `laser-dist launch`, as a scheduler starts it, with what it prints."""

import os
import re
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

from laser_dist.bench.faults import warm
from laser_dist.bench.faults.run import start_cold
from laser_dist.launch import outcome, processes
from laser_dist.watch import pulse, verdict
from laser_dist.watch.pulse import Beat
from laser_dist.watch.verdict import Verdict

LEAVING = 20.0
"""Seconds for all processes of a job to be gone after its supervisor, which has ended them."""


class Job:
    """A supervisor, its ranks, and all that they start."""

    def __init__(self, output: Path, arguments: list[str], environment: dict[str, str], *, cold: bool) -> None:
        self.output = output
        self.code: int | None = None
        """The supervisor's, when it has ended; see `ended`."""
        self.lines: list[str] = []
        self.pid, printed = (start_cold if cold else warm.start)(arguments, environment)
        self._reader = threading.Thread(target=self._read, args=(printed,))
        self._reader.start()

    def _read(self, printed: IO[str]) -> None:
        with printed:
            self.lines.extend(line.rstrip() for line in printed)

    def ended(self) -> bool:
        """Whether the supervisor has; `code` says how."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def leave(self) -> bool:
        """Wait for the end of whatever can still print; False if something had to be killed for that.

        Nothing may be forked while the thread that reads lives.
        """
        self._reader.join(LEAVING)
        alone = not self._reader.is_alive()
        if not alone:
            self.kill()
            self._reader.join()
        return alone

    def kill(self) -> None:
        """End all that belongs to the job, whatever it does."""
        if self.code is None:
            os.killpg(self.pid, signal.SIGKILL)
        for number in range(1, self.attempt + 1):
            for beat in self.beats(number):
                processes.send([beat.pid], signal.SIGKILL)
        processes.end(str(self.output))

    @property
    def verdicts(self) -> list[str]:
        """The supervisor's lines, one for each attempt that is over."""
        return [line for line in self.lines if re.match(r"launch: attempt \d+ of ", line)]

    @property
    def attempt(self) -> int:
        """At work now, or the last one."""
        return len(self.verdicts) + (self.code is None)

    def beats(self, attempt: int) -> list[Beat]:
        """Of the attempt's ranks that live."""
        paths: list[Path] = []
        with suppress(OSError):  # an attempt that begins removes what lies there, between two looks
            paths += sorted(outcome.folder(self.output, attempt).glob("pulse-*"))
        found = [pulse.read(path) for path in paths]
        return [beat for beat in found if beat and beat.started == (pulse.process(beat.pid) or ("", -1))[1]]

    def verdict(self, attempt: int) -> Verdict | None:
        """On an attempt that is over."""
        records = outcome.folder(self.output, attempt)
        return verdict.read(records) or verdict.inferred(records)
