"""`laser-dist bench killed-saves`: is there always a newest complete checkpoint, and never a mixture?

Real ranks train a tiny model and save after every step. They are killed while they save: at a random moment, at a
random byte of a file (the kernel does it: RLIMIT_FSIZE), or at a random call that changes the folder; or writing fails
there, as on a full disk. The next trial goes on with what the last one left, as a restarted run does. Each is checked:

1. What loads is bit for bit a state that was saved: the hash of parameters and optimizer on each rank was recorded.
2. It is not older than the last checkpoint that was published. 3. `latest` and `best` name complete checkpoints.
4. Of the published checkpoints the last two are there and complete. 5. A failed write ends all ranks alike.
"""

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from laser_dist.bench.nursery import Trials

HELP = """Kill ranks while they save a checkpoint, many times, and check what is left.

Examples:
  laser-dist bench killed-saves
  laser-dist bench killed-saves --kills 20 --stage 1 --out saves.json
"""
HOW = ("moment", "byte", "call", "full disk")
SAVES = 4
"""Of a trial; it is killed in one of them."""


@dataclass(frozen=True, kw_only=True)
class Settings(Trials):
    """What is tried."""

    kills: int = 200
    """Trials; a quarter each at a random moment, byte and call, and with a disk that is full."""


def main(arguments: list[str]) -> int:
    """Run the trials; returns the exit code. UserError: what was left behind is not what it must be."""
    import tyro
    from rich.console import Console
    from rich.progress import track

    from laser_dist.bench.nursery import trials

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench killed-saves", description=HELP)
    settings.validate()
    with tempfile.TemporaryDirectory(prefix="laser-dist-bench-") as root:
        job = {"root": root, **{name: getattr(settings, name) for name in ("kills", "ranks", "stage", "seed")}}
        running = trials("laser_dist.bench.killed_saves", job)
        console = Console(stderr=True)
        rows = list(track(running, "killing", settings.kills, console=console, disable=not sys.stderr.isatty()))
    result = summary(rows, settings)
    print(told(result))
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result | {"trials": rows}, indent=2) + "\n")
    return 0


def summary(rows: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Counts by how a trial was ended."""
    by_how = {how: [row for row in rows if row["how"] == how] for how in HOW}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {name: str(value) for name, value in asdict(settings).items()},
        "steps": rows[-1]["published"] if rows else 0,
        "kinds": {
            how: {
                "trials": len(own),
                "hit": sum(row["hit"] for row in own),
                "loaded": dict(Counter(row["loaded"] for row in own if row["loaded"])),
            }
            for how, own in by_how.items()
        },
    }


def told(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{result['steps']} checkpoints published; after each trial a complete one loaded, none was a mixture"]
    for how, row in result["kinds"].items():
        loaded = ", ".join(f"{count} {name}" for name, count in sorted(row["loaded"].items()))
        lines.append(f"  {how}: {row['trials']} trials, {row['hit']} hit a save; afterwards loaded: {loaded or 'none'}")
    return "\n".join(lines)


def run_trials(root: str, kills: int, ranks: int, stage: int, seed: int) -> Iterator[dict[str, Any]]:
    """In a process that forks (see `nursery`): one dict per trial. UserError: a check failed."""
    from laser_dist.bench.nursery import run_ranks
    from laser_dist.bench.saving_ranks import Trial, prepare

    folder = Path(root)
    prepare(folder)
    rng = random.Random(seed)
    trial = Trial(folder, ranks, stage, "none", 0, 0, 0)
    # Nobody is killed: in how many calls a checkpoint is saved, how long it takes, and how large its files are.
    trial.check(*run_ranks(trial.run, ranks))
    measured = trial.measured()
    for number in range(kills):
        how, victim = HOW[number % len(HOW)], rng.choice([*range(ranks), -1])
        where = {
            "moment": rng.uniform(0, 1.2 * measured["seconds"]),
            "byte": round(measured["largest"] ** rng.random()),  # so that small files are hit as well
            "call": rng.randint(1, measured["calls"]),
            "full disk": round(measured["largest"] ** rng.random()),
        }[how]
        before = trial.published()
        trial = Trial(folder, ranks, stage, how, victim, where, rng.randrange(SAVES))
        codes, output = run_ranks(trial.run, ranks)
        trial.check(codes, output)
        hit = any(codes)
        new = trial.newest() or 0
        loaded = "" if not hit else "the one before" if new == trial.published() else "the one being saved"
        yield {
            "how": how, "victim": victim, "where": where, "codes": codes, "hit": hit, "loaded": loaded,
            "step": new, "published": trial.published(), "gained": new - before,
        }  # fmt: skip
