"""One start of `laser-dist launch`, as a scheduler starts it, with what it prints."""

import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from laser_dist.bench.faults import warm
from laser_dist.bench.faults.run import start_cold
from laser_dist.launch import outcome, processes
from laser_dist.testing import forked
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
        pipe = output.with_suffix(".pipe")  # it ends when all have ended that could write, wherever they come from
        os.mkfifo(pipe)
        printed = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self.process = (start_cold if cold else warm.start)(arguments, environment, pipe)
        self._reader = threading.Thread(target=self._read, args=(printed, pipe))
        self._reader.start()

    def _read(self, printed: int, pipe: Path) -> None:
        os.set_blocking(printed, True)
        part = b""
        while (found := os.read(printed, 2**16)) or self.code is None:
            if not found:  # nobody has opened it yet
                time.sleep(0.01)
            *whole, part = (part + found).split(b"\n")
            self.lines.extend(line.decode(errors="replace").rstrip() for line in whole)
        os.close(printed)
        pipe.unlink()

    def ended(self) -> bool:
        """Whether the supervisor has; `code` says how."""
        if self.code is None:
            self.code = self.process.poll()
        return self.code is not None

    def leave(self) -> bool:
        """Wait for the end of whatever can still print; False if something had to be killed for that."""
        self.code = self.process.wait()
        self._reader.join(LEAVING)
        alone = not self._reader.is_alive()
        if not alone:
            self.kill()
            self._reader.join()
        return alone

    def kill(self) -> None:
        """End all that belongs to the job, whatever it does."""
        if self.code is None:
            forked.end(self.process)
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
