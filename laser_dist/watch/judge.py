"""Is something wrong, and with whom? Decided from what one rank has seen of all ranks' pulses.

No clocks are compared: an age is how long the *observer*, awake, has seen no change. A job that is stopped as a whole
and goes on later (a laptop's lid, a debugger, a frozen container) ages nobody.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from laser_dist.watch.pulse import Beat, never

SAVED = 75
REMOTE_DELAY = 30.0
"""Seconds more for ranks of other hosts, whose pulses come by a shared file system's caches."""
SILENT = 1.0
"""Seconds without a tick after which a process is told to be stopped or locked, once it is overdue."""


@dataclass
class Sighting:
    """What is known of one rank."""

    beat: Beat
    phase_age: float = 0.0
    tick_age: float = 0.0
    """Seconds without a new phase, and without a tick."""
    state: str | None = None
    """Of its process, as in /proc; "" if it is gone, "?" where that is not known, None if it is on another host."""

    @property
    def remote(self) -> bool:
        return self.state is None

    def update(self, beat: Beat, state: str | None, awake: float) -> None:
        """Take over what is seen after `awake` seconds."""
        self.phase_age = 0.0 if beat.changes != self.beat.changes else self.phase_age + awake
        self.tick_age = 0.0 if beat.ticks != self.beat.ticks else self.tick_age + awake
        self.beat, self.state = beat, state


@dataclass(frozen=True)
class Finding:
    """A rank because of which the run cannot go on."""

    rank: int
    kind: str
    """failed: it says so itself; died: its process is gone; stopped, locked, hung: it makes no progress."""
    cause: str

    @property
    def grace(self) -> float:
        """Seconds for the training threads of the others to fail by themselves: then each says why, and tidies up.

        All ranks may fail alike. A lost peer is noticed by gloo at once, unless its loader processes hold its
        connections; NCCL waits. For one that is stuck all wait.
        """
        return {"failed": 3.0, "died": 1.0}.get(self.kind, 0.0)


def judge(own: int, seen: Mapping[int, Sighting]) -> Finding | None:
    """The first thing that is wrong, causes before their consequences; None while all is well."""
    return ended(own, seen) or _stopped(own, seen) or _overdue(seen) or _deadlock(seen)


def ended(own: int, seen: Mapping[int, Sighting]) -> Finding | None:
    """A rank that failed by its own account; else one whose process is gone; else what the other ranks say."""
    failed = [s for s in seen.values() if s.beat.code not in (None, 0, SAVED) and s.beat.rank != own]
    for sighting in failed:
        if sighting.beat.blames == sighting.beat.rank:
            return Finding(sighting.beat.rank, sighting.beat.kind, sighting.beat.reason)
    for rank, sighting in seen.items():
        if sighting.state == "" and sighting.beat.code is None:
            return Finding(rank, "died", "its process is gone without a word")
    for sighting in failed:
        if sighting.beat.blames is not None:
            return Finding(sighting.beat.blames, sighting.beat.kind, sighting.beat.reason)
    return None


def _stopped(own: int, seen: Mapping[int, Sighting]) -> Finding | None:
    for rank, sighting in seen.items():
        if rank != own and sighting.state == "T" and sighting.beat.code is None:
            if sighting.tick_age > sighting.beat.brief:
                return Finding(rank, "stopped", f"its process is stopped (SIGSTOP), for {sighting.tick_age:.0f} s now")
    return None


def _overdue(seen: Mapping[int, Sighting]) -> Finding | None:
    late = []
    for sighting in seen.values():
        beat, delay = sighting.beat, REMOTE_DELAY if sighting.remote else 0.0
        silent = sighting.tick_age > beat.brief + delay
        if beat.code is None and (silent or not beat.waiting) and sighting.phase_age > never(beat.patience) + delay:
            late.append(sighting)
    if not late:
        return None
    worst = min(late, key=lambda s: (s.tick_age <= SILENT, *_progress(s)))
    seconds = f"{worst.phase_age:.0f} s, where {never(worst.beat.patience):.0f} s are the most"
    if worst.tick_age <= SILENT:
        return Finding(worst.beat.rank, "hung", f"no progress for {seconds}")
    if worst.remote:
        return Finding(worst.beat.rank, "hung", f"no sign of life for {seconds}: its host, or the shared storage")
    return Finding(worst.beat.rank, "locked", f"no progress for {seconds}, and its interpreter is locked")


def _deadlock(seen: Mapping[int, Sighting]) -> Finding | None:
    """All wait in collectives for each other: not in the same one, or the network is gone."""
    left = [sighting for sighting in seen.values() if sighting.beat.code is None]
    if not left or not all(s.beat.waiting and s.tick_age <= SILENT for s in left):
        return None
    delay = REMOTE_DELAY if any(s.remote for s in left) else 0.0
    age = min(s.phase_age for s in left)
    if age <= max(never(s.beat.patience) for s in left) + delay:
        return None
    last = min(left, key=_progress)
    places = sorted({f"{s.beat.phase} of step {s.beat.step}" for s in left})
    return Finding(last.beat.rank, "hung", f"all ranks wait for each other for {age:.0f} s, in {', '.join(places)}")


def laggard(own: int, seen: Mapping[int, Sighting]) -> Finding | None:
    """Whom a collective that timed out was waiting for: a rank that is in none itself, the one furthest behind."""
    others = [s for s in seen.values() if s.beat.rank != own and s.beat.code is None]
    late = [s for s in others if not s.beat.waiting or s.tick_age > SILENT]
    if not late:
        return None
    last = min(late, key=_progress)
    return Finding(last.beat.rank, "hung", f"the others waited for it until launch.timeout; {last.phase_age:.0f} s")


def _progress(sighting: Sighting) -> tuple[int, int]:
    return sighting.beat.step, sighting.beat.changes
