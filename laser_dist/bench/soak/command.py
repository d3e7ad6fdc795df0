"""The command: a run that nothing strikes, the one that is struck, and what is told of them."""

import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_dist.errors import UserError
from laser_dist.files import write_json

if TYPE_CHECKING:
    from laser_dist.bench.soak.judge import Held
    from laser_dist.bench.soak.run import Soak

HELP = """Strike one real run on two ranks again and again, at random times, and hold it to a run that nothing struck.

Ranks are killed, stopped, made to hang, to raise or to run out of memory; their loaders die; the disk fills up; the job
gets SIGTERM, and is started again as a scheduler does. At the end weights and losses must be those of a run without
faults, the ledger must add up to the wall time, and every failure must have named the rank that was struck.

Examples:
  laser-dist bench soak
  laser-dist bench soak --minutes 2 --every 15 --seed 7 --out soak/
  laser-dist bench soak --only SIG hangs --cold
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long, how often, and by what."""

    minutes: float = 20.0
    """That the steps take; ranks sleep for most of it."""
    every: float = 60.0
    """Mean seconds from a fault to the next one, which waits until that one is over; they are exponential."""
    faults: int = 0
    """At most so many; 0: as many as come."""
    pace: float = 1.5
    """Seconds that a step takes without faults: says how many steps there are."""
    seed: int = 0
    """Of times, faults and ranks."""
    only: tuple[str, ...] = ()
    """Faults whose name holds one of these; all if unset."""
    cold: bool = False
    """Start every attempt with DeepSpeed's launcher instead of forks: ranks then import for themselves."""
    out: Path | None = None
    """Write soak.md and soak.json into this folder, and the run's page, ledger, output and stacks beside them."""

    def validate(self) -> None:
        """Raises UserError for values that nothing can be tried with."""
        for name in ("minutes", "every", "pace"):
            if not 0 < getattr(self, name) < 1e6:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")
        if self.faults < 0:
            raise UserError(f"--faults {self.faults}: must be 0 or more")
        if self.minutes * 60 < 2 * self.pace:
            raise UserError(f"--minutes {self.minutes:g} --pace {self.pace:g}: no time for two steps")


def main(arguments: list[str]) -> int:
    """Run the soak; returns 0 if all is as it must be, else 1. UserError: no such fault, or nothing to try."""
    import tyro

    from laser_dist.bench.soak.strikes import ACTS

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench soak", description=HELP)
    settings.validate()
    acts = tuple(act for act in ACTS if not settings.only or any(part in act.name for part in settings.only))
    if not acts:
        raise UserError(f"--only {' '.join(settings.only)}: no fault's name holds this: {names(ACTS)}")
    with tempfile.TemporaryDirectory(prefix="laser-dist-soak-") as name:
        return _soak(settings, acts, Path(name))


def names(acts: tuple) -> str:
    return ", ".join(act.name for act in acts)


def _soak(settings: Settings, acts: tuple, root: Path) -> int:
    from laser_dist.bench.faults.run import build
    from laser_dist.bench.soak.judge import hold
    from laser_dist.bench.soak.run import Soak
    from laser_dist.testing.forked import start

    start(build, str(root), env=os.environ, output=root / "build.log").wait()
    steps = round(settings.minutes * 60 / settings.pace)
    common = (steps, acts, settings.every, settings.faults, settings.seed, settings.cold, settings.pace)
    whole = Soak(root, root / "whole", *common)
    whole.run()
    if whole.problems:
        raise UserError("\n".join(["a run without faults does not come to its end:", *whole.printed[-20:]]))
    print(f"without faults: {steps} steps in {whole.wall:.0f} s", flush=True)
    struck = Soak(root, root / "struck", *common, seconds=settings.minutes * 60, say=_say)
    try:
        struck.run()
        held = hold(struck.output, whole.output, steps, struck.wall, struck.jobs)
        problems = all_problems(struck, held)
        told = markdown(struck, held, problems)
        print("\n" + told)
        if problems:
            print("\n".join(struck.printed[-60:]), file=sys.stderr)
    finally:
        if settings.out is not None:
            _keep(settings.out, struck)
    if settings.out is not None:
        (settings.out / "soak.md").write_text(told, encoding="utf-8")
        write_json(settings.out / "soak.json", record(settings, struck, held, problems))
    return 1 if problems else 0


def _say(strike: Any) -> None:
    print(f"{strike.number}. {' | '.join(_cells(strike))}", flush=True)


def _keep(out: Path, struck: "Soak") -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("run.html", "ledger.jsonl", "metrics.jsonl"):
        if (struck.output / name).is_file():
            shutil.copy(struck.output / name, out)
    for folder in sorted(struck.root.glob(f"{struck.output.name}-job-*")):
        shutil.copytree(folder, out / "jobs" / folder.name[-3:], dirs_exist_ok=True)
    (out / "output.txt").write_text("\n".join(struck.printed) + "\n", encoding="utf-8")


def all_problems(struck: "Soak", held: "Held") -> list[str]:
    """Of the strikes, of the run, and of its comparison."""
    of_strikes = [f"fault {s.number} ({s.act.name}): {problem}" for s in struck.strikes for problem in s.problems]
    return [*of_strikes, *struck.problems, *held.problems]


def record(settings: Settings, struck: "Soak", held: "Held", problems: list[str]) -> dict[str, Any]:
    """All of it, for a file."""
    return {
        "date": _date(),
        "settings": {name: str(value) for name, value in asdict(settings).items()},
        "problems": problems,
        "faults": [{**asdict(s), "act": s.act.name} for s in struck.strikes],
        "jobs": struck.jobs,
        "wall": held.wall,
        "ledger": held.account.parts if held.account else {},
        "attempts in the ledger": len(held.account.attempts) if held.account else 0,
        "weights equal": held.weights,
        "steps compared": held.steps,
        "values compared": held.scalars,
    }


def markdown(struck: "Soak", held: "Held", problems: list[str]) -> str:
    """Summary, ledger and faults."""
    account, failures = held.account, [s for s in struck.strikes if s.act.kind]
    named = sum(not s.problems for s in failures)
    attempts = sum(line.startswith("launch: attempt ") for line in struck.printed)
    lines = [
        f"{len(struck.strikes)} faults in {held.wall:.0f} s, {attempts} attempts in {struck.jobs} jobs ({_date()}): "
        + ("all as it must be" if not problems else f"{len(problems)} problems"),
        *(f"- PROBLEM: {problem}" for problem in problems),
        f"- weights after step {struck.steps}: "
        + ("equal to those without faults" if held.weights else "OTHER than without faults"),
        f"- {held.scalars} logged values of {held.steps} steps compared, {len(held.other)} differ",
        f"- {named} of {len(failures)} failures named the rank that was struck, and how",
    ]
    if account:
        share = held.unknown / held.wall
        lines += [
            f"- ledger: {sum(account.parts.values()):.1f} s of {held.wall:.1f} s wall time ({-share:+.2%}); "
            f"training that lasted: {account.goodput:.1%}",
            "",
            f"| {' | '.join(account.parts)} | sum |",
            "|---" * (len(account.parts) + 1) + "|",
            f"| {' | '.join(f'{s:.1f}' for s in account.parts.values())} | {sum(account.parts.values()):.1f} |",
        ]
    lines += ["", "| | s | fault | rank | step, phase | lost, s | is | the supervisor's line |", "|---" * 8 + "|"]
    lines += [f"| {s.number} | {' | '.join(_cells(s))} |" for s in struck.strikes]
    return "\n".join(lines) + "\n"


def _cells(strike: Any) -> list[str]:
    who = "all" if strike.act.job else str(strike.rank)
    lost = "" if strike.lost is None else f"{strike.lost:.1f}"
    where = f"{strike.step}, {strike.phase}" if strike.step else strike.phase
    told = strike.line.removeprefix("launch: ").partition("; stacks of all ranks")[0]
    return [f"{strike.at:.0f}", strike.act.name, who, where, lost, "; ".join(strike.problems) or "right", told]


def _date() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
