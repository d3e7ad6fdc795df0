"""From ledger.jsonl to an account: every second between a run's first process and its last line, in one of PARTS."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

PARTS = {
    "train": "forward, loss, backward, update, and all that is not listed below",
    "data wait": "steps waiting until every rank has its batch",
    "save": "checkpoints, as far as training stood still for them",
    "evaluate": "evaluation on the dev set",
    "rehearsal": "what comes at the end of the run, tried after its first step",
    "start": "from the first process to its first step: imports, model, preflight",
    "restart": "after a failure: from the last line of an attempt to the first step of the next",
    "lost": "steps that were trained and then again, because no checkpoint held them",
    "paused": "between a clean stop and the next start",
}
_NAMES = {"data": "data wait", "ready": "start"}


@dataclass
class Attempt:
    """What one start of the training process did."""

    began: float
    """Seconds since the epoch."""
    ready: float
    """Seconds from there to the first step."""
    first: int
    """Optimizer steps that were done before."""
    ranks: int
    last: int = 0
    until: float = 0.0
    """When its last line was written."""
    how: str = "no end"
    """finished, stopped (by a signal), failed, or no end: killed, or still running."""
    why: str = ""
    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """(step, seconds by part) of each line."""


@dataclass
class Account:
    """Seconds by part; they add up to `wall`, but for what the clock of the host was set meanwhile."""

    parts: dict[str, float]
    wall: float
    attempts: list[Attempt]

    @property
    def unaccounted(self) -> float:
        return self.wall - sum(self.parts.values())

    @property
    def goodput(self) -> float:
        """Share of the time that the run was meant to run in which it trained steps that lasted."""
        meant = self.wall - self.parts["paused"]
        return self.parts["train"] / meant if meant > 0 else 0.0


def account(lines: Iterable[dict[str, Any]]) -> Account | None:
    """None if no attempt was recorded: a run of an earlier version."""
    attempts = list(_attempts(lines))
    if not attempts:
        return None
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for number, attempt in enumerate(attempts):
        before = attempts[number - 1] if number else None
        after = attempts[number + 1] if number + 1 < len(attempts) else None
        clean = before is None or before.how in ("finished", "stopped")
        parts["start" if clean else "restart"] += attempt.ready
        if before:
            parts["paused" if clean else "restart"] += attempt.began - before.until
        for step, seconds in attempt.rows:
            lost = after is not None and step > after.first
            for name, value in seconds.items():
                parts["lost" if lost else name] += value
    return Account(parts, attempts[-1].until - attempts[0].began, attempts)


def _attempts(lines: Iterable[dict[str, Any]]) -> Iterator[Attempt]:
    """What stands in the file, without lines that are not ours: pages are made of damaged files, too."""
    current: Attempt | None = None
    for line in lines:
        step, at = line.get("step"), _number(line.get("time"))
        if not isinstance(step, int) or at is None:
            continue
        seconds: dict[str, float] = defaultdict(float)
        for name, value in line.items():
            if (part := _NAMES.get(name, name)) in PARTS and (number := _number(value)) is not None:
                seconds[part] += number
        if line.get("event") == "start":
            if current:
                yield current
            ready = seconds.pop("start", 0.0)
            current = Attempt(at, ready, step, int(_number(line.get("ranks")) or 1), last=step, until=at + ready)
        elif current:
            current.rows.append((step, dict(seconds)))
            current.last, current.until = step, at
        if current and line.get("event") == "end":
            current.how, current.why = str(line.get("how", "no end")), str(line.get("why", ""))
    if current:
        yield current


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
