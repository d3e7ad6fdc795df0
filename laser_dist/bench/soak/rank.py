"""A training rank that takes its time, and strikes itself where a phase begins, if it was asked to.

Orders come as files, because the one who gives them cannot know which phase comes next.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_dist.bench.faults.acts import ACTS
from laser_dist.files import write_json
from laser_dist.launch.outcome import ATTEMPT
from laser_dist.watch.pulse import Beat, Pulse

WORK = ("forward", "loss", "backward", "optimizer")
"""Phases of a step that are made longer; in the others a ledger would take it for waiting for data."""


@dataclass
class Pace:
    """How long steps take: what is left of the time by what is left of the steps."""

    until: float
    """By the monotonic clock, which all processes of a host share; 0 for as fast as it goes."""
    steps: int
    longest: float
    """Seconds that a step may be made to take."""
    step: int = 0
    began: float = 0.0
    seconds: float = 0.0
    parts: int = 0

    def wait(self, beat: Beat) -> None:
        """Called as each phase begins."""
        if not self.until or beat.phase not in WORK:
            return
        if beat.step != self.step:
            self.step, self.began, self.parts = beat.step, time.monotonic(), 0
            self.seconds = min((self.until - self.began) / (self.steps - beat.step + 1), self.longest)
        self.parts = min(self.parts + 1, len(WORK))
        time.sleep(max(0.0, self.began + self.seconds * self.parts / len(WORK) - time.monotonic()))


def order_of(folder: Path, rank: int) -> Path:
    return folder / f"order-{rank}.json"


def struck_of(folder: Path, number: int) -> Path:
    return folder / f"struck-{number}.json"


def prepare(told: dict[str, Any]) -> None:
    """Let this process's phases begin as described; `told`: the fields of a Pace, and the folder of orders."""
    folder, original = Path(told["folder"]), Pulse.enter
    pace = Pace(told["until"], told["steps"], told["longest"])

    def enter(self: Pulse, phase: str) -> str:
        before = original(self, phase)
        pace.wait(self.beat)
        _obey(folder, self.beat)
        return before

    Pulse.enter = enter  # type: ignore[method-assign]


def fits(when: str, beat: Beat) -> bool:
    """Whether a strike that may come `when` (see strikes.Act) may come now."""
    return {
        "any": True,
        "met": beat.phase != "start",
        "step": beat.phase in WORK,
        "watched": beat.patience is not None,
        "unwatched": beat.patience is None,
        "save": beat.phase == "save",
    }[when]


def _obey(folder: Path, beat: Beat) -> None:
    order = order_of(folder, beat.rank)
    try:
        told = json.loads(order.read_bytes())
    except (OSError, ValueError):
        return
    if fits(told["when"], beat):
        where = {"attempt": int(os.environ[ATTEMPT]), "step": beat.step, "phase": beat.phase, "pid": beat.pid}
        order.unlink()
        write_json(struck_of(folder, told["number"]), where | {"at": time.monotonic()})
        ACTS[told["act"]]()
