"""A rank of `laser-dist bench faults`: training as it is, with one fault at one place.

Started instead of laser_dist.train. Only here is the variable looked at: nothing in the product can be made to fail.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from laser_dist.bench.faults.acts import ACTS, engines
from laser_dist.cli import run
from laser_dist.launch.outcome import ATTEMPT
from laser_dist.watch.pulse import Pulse

FAULT = "LASER_DIST_BENCH_FAULT"
"""JSON: act, phase, step, rank, attempts, and `struck`, a file that takes the time of the act."""


def main(arguments: list[str]) -> int:
    fault = json.loads(os.environ[FAULT])
    if "folder" in fault:  # `laser-dist bench soak`: what strikes, and when, is told to the rank at work
        from laser_dist.bench.soak.rank import prepare

        prepare(fault)
        return run("laser_dist.train", arguments)
    due = fault["act"] and int(os.environ["RANK"]) == fault["rank"] and int(os.environ[ATTEMPT]) <= fault["attempts"]
    if due and fault["phase"] == "init":
        _before_ranks_meet(fault)
    elif due:
        _in_phase(fault)
    return run("laser_dist.train", arguments)


def _before_ranks_meet(fault: dict) -> None:
    from laser_dist.observability.console import quiet_libraries

    quiet_libraries()
    from laser_dist.distributed import engine

    original = engine.init_distributed

    def struck(timeout: float) -> Any:
        strike(fault)
        return original(timeout)

    engine.init_distributed = struck  # type: ignore[assignment]


def _in_phase(fault: dict) -> None:
    """The fault comes where the pulse says that the phase begins, once."""
    from laser_dist.distributed.engine import Engine

    original, pending, built = Pulse.enter, [fault], Engine.__init__

    def build(self: Engine, *arguments: Any, **named: Any) -> None:
        built(self, *arguments, **named)
        engines.append(self)

    def enter(self: Pulse, phase: str) -> str:
        before = original(self, phase)
        if pending and phase == fault["phase"] and self.beat.step == fault["step"]:
            strike(pending.pop())
        return before

    Pulse.enter, Engine.__init__ = enter, build  # type: ignore[method-assign]


def strike(fault: dict) -> None:
    if not (struck := Path(fault["struck"])).exists():
        struck.write_text(str(time.time()))
    ACTS[fault["act"]]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
