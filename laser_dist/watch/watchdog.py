"""The thread that watches: this rank's own progress and all other ranks', and ends this rank when the run cannot go on.

Every rank judges for itself from all pulses, so that it needs no collective, no launcher and no rank that must survive:
a lost peer is noticed with NCCL too, which would wait for it, and with any launcher. Ranks of other hosts are looked at
by the first rank of each host; what that one finds, the others read in its pulse.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from laser_dist.watch import pulse, stacks, verdict
from laser_dist.watch.judge import SAVED, Finding, Sighting, ended, judge, laggard
from laser_dist.watch.pulse import Beat, Limits, Pulse
from laser_dist.watch.verdict import Verdict

INTERVAL = 0.2
"""Seconds between two looks at ranks of this host."""
REMOTE_INTERVAL = 5.0
OTHERS = 3.0
"""Seconds for the other ranks to have seen it as well: a launcher may end them as soon as one is gone."""
SETTLE = 0.5
"""Seconds for a locked rank to answer the signal that asks for its stacks, before it is killed."""
EXPLAINED_WITHIN = 1.5
"""Seconds to find out whose loss an error of communication is about."""
EARLY_GRACE = 2.0
"""Seconds for the training thread to hear of a signal itself, before the ranks have met."""
LAST_RESORT = 8.0
"""Seconds after which a process that began to end does so whatever holds it."""


class Watchdog:
    """Watches from `meet` to `close`."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        """`folder`: of the attempt, shared by all ranks."""
        self.folder, self.limits = folder, limits
        self.own = pulse.identity()
        self.active = False
        """Whether this rank tells what it does; others are watched from `meet` on."""
        self.seen: dict[int, Sighting] = {}
        self.remote: list[int] = []
        self.met, self.leaving = threading.Event(), threading.Event()
        self.arrives: socket.socket | None = None
        self.claimed = threading.Lock()
        """Taken by whichever thread ends the rank."""
        self.remote_awake = 0.0
        self.found_at = 0.0
        """When something was found to be wrong: seconds since the epoch, 0 for not yet."""
        self.on_end: Callable[[int, str], None] = lambda code, reason: None
        """Called before the process ends from here, with its code and why."""
        self.on_verdict: Callable[[Verdict], None] = lambda told: None
        """Called on the rank whose verdict it is."""

    def start(self) -> None:
        """Begin to tell what this rank does."""
        self.stacks = stacks.Stacks(stacks.path_of(self.folder, self.own.rank))
        self.pulse = pulse.current = Pulse(pulse.path_of(self.folder, self.own.rank), self.own, self.limits)
        self.active = True

    def before_meeting(self) -> None:
        """Before `meet`: tell that this rank lives, and let no request to stop wait for ranks that may never come.

        To meet is one call in C, in which no handler of Python's runs; the numbers of signals arrive here all the same.
        """
        arrived, arrives = socket.socketpair()
        arrives.setblocking(False)
        signal.set_wakeup_fd(arrives.fileno(), warn_on_full_buffer=False)
        self.arrives = arrives
        threading.Thread(target=self._until_met, args=(arrived,), name="before-meeting", daemon=True).start()

    def _until_met(self, arrived: socket.socket) -> None:
        arrived.settimeout(INTERVAL)
        while not self.met.is_set() and not self.leaving.is_set():
            self.pulse.tick(waiting=False)
            try:
                number = arrived.recv(1)
            except TimeoutError:
                continue
            if number not in (bytes([signal.SIGTERM]), bytes([signal.SIGUSR1])):  # a child's end, say
                continue
            if self.met.wait(EARLY_GRACE) or not self.claimed.acquire(blocking=False):
                return
            self.pulse.end(SAVED)
            self._stop()
            self.leave(SAVED, "a signal came before the ranks had met")

    def meet(self, gather: Callable[[Beat], list[Beat]]) -> None:
        """Learn who the others are, and begin to watch. A collective: `gather` gives every rank's object."""
        if not self.active:
            if self.own.rank == 0:
                (self.folder / verdict.FILE).unlink(missing_ok=True)  # of an earlier run without a supervisor
            self.start()
        everyone: list[Beat] = gather(self.own)
        self.met.set()
        self._hear_no_more()
        self.seen = {beat.rank: Sighting(beat, state=self._state(beat)) for beat in everyone}
        hosts = [(beat.host, beat.namespace) for beat in everyone]
        self.remote = [beat.rank for beat in everyone if self._is_remote(beat)]
        if hosts.index((self.own.host, self.own.namespace)) != self.own.rank:
            for rank in self.remote:
                del self.seen[rank]
            self.remote = []
        self.several_hosts = len(set(hosts)) > 1
        pulse.enter("load")
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def close(self, code: int) -> None:
        """The rank is done."""
        if self.active and self.claimed.acquire(blocking=False):
            self.pulse.end(code)
            self._stop()

    def fail(self, error: BaseException, code: int, reason: str, *, shown: bool) -> int:
        """Called by the training thread with what ended it: finds out whose fault that is, and leaves the verdict.

        Returns the exit code: 1 where another rank caused it, whatever the message says that was made of it; else
        `code`. `shown`: with its traceback on stderr, unless another rank caused it.
        """
        if not self.claimed.acquire(blocking=False):
            time.sleep(600)  # the other thread is about to end the process
        self.found_at = time.time()
        self._insist()
        lost = stacks.communication(error)
        found = self._explain(lost) if lost else None
        code = 1 if found else code
        finding = found or Finding(self.own.rank, "failed", reason)
        self.pulse.end(code, finding.rank, finding.kind, finding.cause)
        if found:
            self.stacks.error(error, "an error that another rank's failure caused")
        elif shown:
            traceback.print_exception(error)
        self._conclude(finding)
        self._stop()
        return code

    def leave(self, code: int, reason: str) -> NoReturn:
        """End this process now: threads of a collective that nobody completes would keep it alive."""
        with suppress(Exception):
            self.on_end(code, reason)
        for child in multiprocessing.active_children():
            child.kill()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)

    def _hear_no_more(self) -> None:
        if self.arrives and threading.current_thread() is threading.main_thread():  # no other one may
            signal.set_wakeup_fd(-1)
            self.arrives.close()
            self.arrives = None

    def _stop(self) -> None:
        self.leaving.set()
        self._hear_no_more()
        pulse.current = None

    def _run(self) -> None:
        last = time.monotonic()
        while not self.leaving.wait(INTERVAL):
            now = time.monotonic()
            awake, last = min(now - last, 2 * INTERVAL), now  # while we were stopped, so may the others have been
            try:
                finding = self._round(awake)
            except Exception as error:  # without this thread the others would take this rank for stuck
                self.stacks.error(error, "the watchdog's own")
                continue
            if finding:
                self._end(finding)
                return

    def _round(self, awake: float) -> Finding | None:
        self.pulse.tick(waiting=stacks.in_collective())
        self._look([rank for rank in self.seen if rank not in self.remote], awake)
        self.remote_awake += awake
        if self.remote_awake >= REMOTE_INTERVAL:
            if self.several_hosts:
                self.pulse.sync()
            self._look(self.remote, self.remote_awake)
            self.remote_awake = 0.0
        return judge(self.own.rank, self.seen)

    def _look(self, ranks: list[int], awake: float) -> None:
        for rank in ranks:
            known = self.seen[rank]
            if rank == self.own.rank:
                known.update(replace(self.own), "R", awake)
                continue
            state = self._state(known.beat)  # before its pulse, in which it says last that it ends
            beat = pulse.read(pulse.path_of(self.folder, rank)) or known.beat
            same = (beat.pid, beat.started) == (known.beat.pid, known.beat.started)
            known.update(beat if same else known.beat, state, awake)

    def _is_remote(self, beat: Beat) -> bool:
        return (beat.host, beat.namespace) != (self.own.host, self.own.namespace)

    def _state(self, beat: Beat) -> str | None:
        if self._is_remote(beat):
            return None
        if not beat.started:
            return "?"
        found = pulse.process(beat.pid)
        return found[0] if found and found[1] == beat.started else ""

    def _end(self, finding: Finding) -> None:
        """In the watchdog's thread: the run cannot go on. The training thread has a while to say so by itself."""
        if self.claimed.locked():  # the training thread says it already
            return
        self.found_at = time.time()
        self.pulse.end(1, finding.rank, finding.kind, finding.cause)
        deadline = time.monotonic() + finding.grace
        while time.monotonic() < deadline and not self.claimed.locked():
            time.sleep(0.05)
        if not self.claimed.acquire(blocking=False):
            return
        self._insist()
        self.stacks.write(f"rank {finding.rank} {finding.kind}: {finding.cause}")
        self._conclude(finding)
        self.leave(1, f"ended because rank {finding.rank} {finding.kind}")

    def _insist(self) -> None:
        """The process ends in LAST_RESORT seconds, by a thread in C, which no lock of the interpreter's can delay."""
        with suppress(RuntimeError):  # no thread can be started: memory is short
            faulthandler.dump_traceback_later(LAST_RESORT, exit=True, file=self.stacks.file)

    def _explain(self, error: BaseException) -> Finding | None:
        """Whose loss an error of communication is about; None if no rank is known to be lost."""
        deadline = time.monotonic() + EXPLAINED_WITHIN
        while time.monotonic() < deadline:
            self._look(list(self.seen), 0.0)
            if finding := ended(self.own.rank, self.seen):
                return finding
            time.sleep(0.05)
        return laggard(self.own.rank, self.seen) if "time" in str(error).lower() else None

    def _conclude(self, finding: Finding) -> None:
        """Stacks of the one to blame, if it cannot write them; the verdict; and the end of a process that cannot."""
        sighting = self.seen.get(finding.rank)
        stuck = finding.kind in ("stopped", "locked")
        if sighting and stuck and self._state(sighting.beat):  # it cannot write its stacks by itself
            self.stacks.neighbour(sighting.beat.pid, finding.rank)
            time.sleep(SETTLE)
        self._wait_for_others(finding.rank)
        beat = pulse.read(pulse.path_of(self.folder, finding.rank)) or self.own
        told = verdict.of(self.folder, beat, finding.kind, finding.cause, self.own.rank)
        told.time = self.found_at
        if verdict.write_once(self.folder, told):
            self.on_verdict(told)
        if sighting and finding.rank != self.own.rank and finding.kind in ("stopped", "locked", "hung"):
            self._require_end(sighting.beat, 0.0 if stuck else OTHERS)

    def _require_end(self, beat: Beat, seconds: float) -> None:
        """Kill a process of this host that does not end by itself."""
        deadline = time.monotonic() + seconds
        while beat.started and self._state(beat):
            if time.monotonic() >= deadline:
                with suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)
                return
            time.sleep(0.05)

    def _wait_for_others(self, culprit: int) -> None:
        """Until the other ranks of this host have seen it or ended, or OTHERS seconds."""
        deadline = time.monotonic() + OTHERS
        ranks = [rank for rank in self.seen if rank not in (culprit, self.own.rank, *self.remote)]
        while time.monotonic() < deadline:
            self._look(ranks, 0.0)
            if all(self.seen[rank].beat.code is not None or not self.seen[rank].state for rank in ranks):
                return
            time.sleep(0.05)


current: Watchdog | None = None
"""This process's, from when its recipe is read; a Trainer that a program builds by itself has none."""


def meet(gather: Callable[[Beat], list[Beat]]) -> None:
    """Begin to watch, if this process is to. A collective: all ranks call it."""
    if current is not None:
        current.meet(gather)
