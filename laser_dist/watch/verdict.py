"""What ended a run, in one line: rank, step, phase, cause; as JSON in OUTPUT/launch/attempt-N/verdict.json."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from laser_dist.watch import pulse, stacks
from laser_dist.watch.judge import Sighting, ended
from laser_dist.watch.pulse import Beat

FILE = "verdict.json"


@dataclass
class Verdict:
    """Why an attempt failed."""

    rank: int
    host: str
    step: int
    phase: str
    kind: str
    """failed, died, stopped, locked or hung: see judge.py."""
    cause: str
    told_by: int
    """The rank that found it out."""
    time: float = 0.0
    """When that was: seconds since the epoch, by that rank's host."""
    queries: list[str] = field(default_factory=list)
    """Of the micro-batch that the rank had in hand, if it died on it."""
    mendable: bool = False
    """The rank's error is one for the user, with a message of its own."""

    @property
    def line(self) -> str:
        where = f"step {self.step}, {self.phase}" if self.step else self.phase
        return f"rank {self.rank} on {self.host} {self.kind} in {where}: {self.cause}"


def of(folder: Path, beat: Beat, kind: str, cause: str, told_by: int) -> Verdict:
    """A verdict on a rank, with what it left behind."""
    step, queries = pulse.read_examples(pulse.path_of(folder, beat.rank))
    if kind == "died" and (crash := stacks.crash(stacks.path_of(folder, beat.rank))):
        cause = f"{cause}: {crash}"
    known = queries if step == beat.step else []
    where = (beat.rank, beat.host, beat.step, beat.phase)
    return Verdict(*where, kind, cause, told_by, time.time(), known, mendable=beat.code == 2)


def write_once(folder: Path, verdict: Verdict) -> bool:
    """Leave the verdict; False if another rank was first. One appears, whole, however many try at a time."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".verdict-", encoding="utf-8") as file:
            json.dump(asdict(verdict), file, indent=2, ensure_ascii=False)
            file.flush()
            os.link(file.name, folder / FILE)
            return True
    return not (folder / FILE).exists()  # on a full disk all say it


def read(folder: Path) -> Verdict | None:
    """What the ranks said; None if nobody did."""
    try:
        return Verdict(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def inferred(folder: Path) -> Verdict | None:
    """Nobody was left to say it: what follows from the pulses of ranks that are all gone; None if there are none."""
    beats = sorted((beat for beat in _beats(folder)), key=lambda beat: (beat.step, beat.changes))
    finding = ended(-1, {beat.rank: Sighting(beat, state="") for beat in beats})
    found = [beat for beat in beats if finding and beat.rank == finding.rank]
    return of(folder, found[0], finding.kind, finding.cause, told_by=-1) if finding and found else None


def _beats(folder: Path) -> Iterator[Beat]:
    for path in sorted(folder.glob("pulse-*")):
        if beat := pulse.read(path):
            yield beat
