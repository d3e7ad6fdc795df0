"""Running hostile input against real entry points, in a process of its own with bounds.

A case is a function that makes something hostile in a folder and gives it to what reads such things. It must end in a
UserError, or, for a command, in its exit code; never in another exception, in memory or time without bounds, nor in the
canary file that every bomb would make.
"""

import contextlib
import io
import os
import pickle
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError

MOST_BYTES = 512 * 2**20
"""Resident memory that a case may take beside what its process has already."""
MOST_SECONDS = 60.0
"""Of processor time; a case takes a hundredth of it where it is refused, and for ever where it is not."""
Feed = Callable[[Path, bytes], None]  # folder to work in, pickle that makes the canary


@dataclass(frozen=True)
class Case:
    """One hostile input."""

    name: str
    expected: str  # regular expression for the refusal; "" where the input is read, and harmless
    feed: Feed
    code: int = 2  # exit code of a command


@dataclass
class Cases:
    """A table of cases that run in one process."""

    cases: list[Case] = field(default_factory=list)

    def add(self, name: str, expected: str, feed: Feed, code: int = 2) -> None:
        self.cases.append(Case(name, expected, feed, code))

    def case(self, name: str, expected: str, code: int = 2) -> Callable[[Feed], Feed]:
        def register(feed: Feed) -> Feed:
            self.add(name, expected, feed, code)
            return feed

        return register


class Ended(Exception):
    """A command's exit code and what it said."""

    def __init__(self, code: object, said: str):
        super().__init__(said)
        self.code, self.said = code, said


def command(*arguments: object) -> None:
    """`laser-dist ARGUMENTS` in this process. Raises Ended unless it succeeds."""
    from laser_dist.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code: object = main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
    if code:
        raise Ended(code, said.getvalue())


class _Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def make_bomb(canary: Path) -> bytes:
    """A pickle that makes this file when it is loaded."""
    return pickle.dumps(_Bomb(canary))


def run_cases(cases: Cases, folder: Path) -> list[str]:
    """Run all cases one after the other; returns what went wrong. Prints a line for each."""
    sys.setswitchinterval(0.005)
    problems = []
    for number, case in enumerate(cases.cases):
        place = folder / str(number)
        place.mkdir(parents=True)
        problem, seconds, taken = _run(case, place)
        print(f"{seconds:6.2f} s {taken / 2**20:6.0f} MiB  {case.name}: {problem or 'ok'}", flush=True)
        if problem:
            problems.append(f"{case.name}: {problem}")
    return problems


def _run(case: Case, place: Path) -> tuple[str, float, int]:
    """What went wrong, processor time, and the peak of resident memory above what it was before."""
    canary = place / "canary"
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before, began, used = _resident("VmRSS"), time.process_time(), _resident("VmSize")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MOST_BYTES, hard))  # a bomb ends in MemoryError, not in a kill
    try:
        problem = _outcome(case, place, make_bomb(canary))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    seconds, taken = time.process_time() - began, _resident("VmHWM") - before
    if not problem and canary.exists():
        problem = "it was executed"
    if not problem and taken > MOST_BYTES:
        problem = f"took {taken >> 20} MiB"
    if not problem and seconds > MOST_SECONDS:
        problem = f"took {seconds:.0f} s of processor time"
    return problem, seconds, taken


def _outcome(case: Case, place: Path, bomb: bytes) -> str:
    try:
        case.feed(place, bomb)
    except UserError as error:
        code, said = 2, str(error)
    except Ended as error:
        code, said = error.code, error.said  # type: ignore[assignment]
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    else:
        return "was taken without a word" if case.expected else ""
    if code != case.code or "Traceback" in said:
        return f"exit code {code}: {said[-600:]}"
    return "" if case.expected and re.search(case.expected, said, re.DOTALL) else f"said {said[:600]!r}"


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024
