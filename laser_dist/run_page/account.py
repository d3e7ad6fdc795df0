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
    "restart": "after a failure, from an attempt's last line to the next one's first step; attempts that came to none",
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
    """Seconds from there to the first step; to the end, if it came to none."""
    first: int
    """Optimizer steps that were done before."""
    ranks: int
    started: bool = True
    """Whether it came to a step."""
    last: int = 0
    until: float = 0.0
    """When its last line was written; when it was over, if it failed and a supervisor says so."""
    tail: float = 0.0
    """Seconds from its last line until it was over, if it failed."""
    how: str = "no end"
    """finished, stopped (by a signal), failed, or no end: killed, or still running."""
    why: str = ""
    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """(step, seconds by part) of each line."""


@dataclass
class Account:
    """Seconds by part, none below 0; they add up to `wall`, but for what the clock of the host was set meanwhile."""

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
        later = [after for after in attempts[number + 1 :] if after.started]
        clean = before is None or before.how in ("finished", "stopped")
        in_vain = not attempt.started and attempt.how == "failed"
        parts["start" if clean and not in_vain else "restart"] += attempt.ready
        parts["restart"] += attempt.tail
        if before:
            parts["paused" if clean else "restart"] += max(0.0, attempt.began - before.until)
        for step, seconds in attempt.rows:
            lost = bool(later) and step > later[0].first
            for name, value in seconds.items():
                parts["lost" if lost else name] += value
    return Account(parts, attempts[-1].until - attempts[0].began, attempts)


def _attempts(lines: Iterable[dict[str, Any]]) -> Iterator[Attempt]:
    """What stands in the file, without lines that are not ours: pages are made of damaged files, too."""
    current: Attempt | None = None
    for line in lines:
        step, at, event = line.get("step"), _number(line.get("time")), line.get("event")
        if not isinstance(step, int) or at is None:
            continue
        seconds = _seconds(line)
        if event == "attempt" or event == "start" and (current is None or current.started):
            if current:
                yield current
            current = Attempt(at, 0.0, step, current.ranks if current else 1, started=False, last=step, until=at)
        if current is None:
            continue
        if event == "start":
            current.ready = max(0.0, at - current.began) + seconds.pop("start", 0.0)
            current.first, current.last, current.started = step, step, True
            current.ranks, current.until = int(_number(line.get("ranks")) or 1), current.began + current.ready
        elif event == "over":
            _end(current, at, str(line.get("how")))
        elif event != "attempt":
            current.rows.append((step, seconds))
            current.last, current.until = step, at
        if event == "end":
            current.how, current.why = str(line.get("how", "no end")), str(line.get("why", ""))
    if current:
        yield current


def _end(attempt: Attempt, at: float, how: str) -> None:
    """The supervisor says that the attempt is over. What a clean one does after its last line is no loss."""
    rest = max(0.0, at - attempt.until)
    if not attempt.started:
        attempt.ready, attempt.until = rest, at
    elif how == "failed":
        attempt.tail, attempt.until = rest, attempt.until + rest
    attempt.how = how


def _seconds(line: dict[str, Any]) -> dict[str, float]:
    """By part."""
    found: dict[str, float] = defaultdict(float)
    for name, value in line.items():
        if (part := _NAMES.get(name, name)) in PARTS and (number := _number(value)) is not None:
            found[part] += number
    return found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
