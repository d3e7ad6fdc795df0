"""`laser-dist bench reliability`: all that shows that nothing is lost and nothing silent, in one table.

Each part is a command of its own; what it prints and measures stays in the folder, and a part that has held there is
not run again.
"""

import importlib.util
import json
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from laser_dist.errors import UserError, suggest
from laser_dist.files import replacing, write_json

HELP = """Faults, kills, damage, anomalies and bad input: run it all and write one table, reliability.md.

It takes an hour or two. The same command again goes on with what is not there or did not hold.

Examples:
  laser-dist bench reliability --out reliability/
  laser-dist bench reliability --out /tmp/quick --quick
  laser-dist bench reliability --out reliability/ --only faults --again
"""
OUT = {"faults": ".", "soak": "soak"}
"""Parts that write more than one file."""
TESTS = Path(__file__).parents[2] / "tests"


@dataclass(frozen=True)
class Part:
    """A command, and which of its lines are the result."""

    what: str
    """What must hold."""
    command: tuple[str, ...]
    """After `laser-dist bench`, or `pytest` and its arguments."""
    quick: tuple[str, ...]
    """Instead of the whole command's options."""
    lines: str
    """Expression that the lines of the result match."""


PARTS = {
    "faults": Part(
        "a run struck by a fault recovers, or stops with the right verdict",
        ("faults",),
        ("faults", "--only", "killed | save", "disk full | export", "HTTP 500"),
        r"\d+ of \d+ rows",
    ),
    "saves": Part(
        "after a kill at any byte of a save, the newest complete checkpoint loads, and is no mixture",
        ("killed-saves", "--kills", "200"),
        ("killed-saves", "--kills", "4"),
        r"published; after|trials, ",
    ),
    "runs": Part(
        "a run killed at any moment and resumed, again and again, is the run without kills",
        ("killed-runs", "--kills", "50"),
        ("killed-runs", "--kills", "1"),
        r"kills in ",
    ),
    "damage": Part(
        "damaged shards are noticed before a wrong row comes out",
        ("damage",),
        ("damage", "--rounds", "1", "--examples", "300"),
        r"noticed before|hashing takes|: (yes|NO)$",
    ),
    "guard": Part(
        "numbers that lie are caught before the update, and clean steps are not",
        ("guard",),
        ("guard", "--clean", "20", "--rounds", "0"),
        r"anomalies caught|false alarms|the guard takes",
    ),
    "soak": Part(
        "a run struck every minute for 20 minutes ends as without faults, and its ledger holds every second",
        ("soak",),
        ("soak", "--minutes", "0.07", "--pace", "0.5", "--every", "0.5", "--faults", "1", "--only", "killed"),
        r"faults in|^- ",
    ),
    "inputs": Part(
        "bad input is named with its remedy, hostile input does nothing",
        ("pytest", "bad_input", "hostile"),
        ("pytest", "bad_input/test_typos.py"),
        r"\d+ (passed|failed)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run."""

    out: Path = Path("reliability")
    """Folder for reliability.md and for what every part printed and measured."""
    only: tuple[str, ...] = ()
    """These parts only: faults, saves, runs, damage, guard, soak, inputs."""
    quick: bool = False
    """A few rows of each part, in minutes: to see how it works."""
    again: bool = False
    """Run parts again that have held."""


@dataclass
class Held:
    """How a part ended."""

    what: str
    command: str
    code: int
    minutes: float
    date: str
    lines: list[str]


def main(arguments: list[str]) -> int:
    """Run the parts; returns 0 if all held, else 1. UserError: no such part."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench reliability", description=HELP)
    for name in settings.only:
        if name not in PARTS:
            raise UserError(f"--only {name}: must be one of {', '.join(PARTS)}.{suggest(name, PARTS)}")
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in settings.only or PARTS:
        if name == "inputs" and not _tests_can_run():
            print("inputs: passed over, they are tests, which need a checkout with the `dev` packages", flush=True)
            continue
        before = _read(settings.out, name)
        if before is None or before.code or settings.again or before.command != _command(name, settings)[0]:
            print(f"{name}: {_command(name, settings)[0]} ...", flush=True)
            before = _run(name, settings)
        print("\n".join(f"{name}: {line}" for line in before.lines or [f"ended with {before.code}"]), flush=True)
        with replacing(settings.out / "reliability.md") as temporary:
            temporary.write_text(report(settings.out), encoding="utf-8")
    held = [_read(settings.out, name) for name in PARTS]
    return int(any(part.code for part in held if part))


def report(out: Path) -> str:
    """The table, and below it the faults, one by one."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    rows = [
        "# What was tried, and what held\n",
        f"Written by `laser-dist bench reliability` on {platform.machine()}, Python {platform.python_version()}, "
        f"{versions}. Ranks are processes of one machine, with gloo.\n",
        "| must hold | `laser-dist bench` | held | what came out | minutes | date |",
        "|---|---|---|---|---|---|",
    ]
    for part in filter(None, (_read(out, name) for name in PARTS)):
        held, told = "no" if part.code else "yes", "<br>".join(part.lines)
        cells = (part.what, f"`{part.command}`", held, told, f"{part.minutes:.0f}", part.date)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if (faults := out / "faults.md").is_file():
        rows += ["\n## Faults\n", faults.read_text(encoding="utf-8").rstrip()]
    return "\n".join(rows) + "\n"


def _command(name: str, settings: Settings) -> tuple[str, list[str]]:
    """As a reader would give it, and in full."""
    part = PARTS[name]
    words = list(part.quick if settings.quick else part.command)
    told = f"pytest {' '.join(f'tests/{word}' for word in words[1:])}" if words[0] == "pytest" else " ".join(words)
    if words[0] == "pytest":
        return told, ["-q", "-n", "2", "--no-header", *(str(TESTS / word) for word in words[1:])]
    return told, [*words, "--out", str(settings.out / OUT.get(name, f"{name}.json"))]


def _run(name: str, settings: Settings) -> Held:
    began = time.monotonic()
    told, words = _command(name, settings)
    module = ["pytest"] if told.startswith("pytest") else ["laser_dist.cli", "bench"]
    with (settings.out / f"{name}.log").open("w+", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, "-m", *module, *words], stdout=subprocess.PIPE, stderr=log, text=True)
        log.write(done.stdout)
    lines = [line.strip() for line in done.stdout.splitlines() if re.search(PARTS[name].lines, line)]
    date = datetime.now(UTC).date().isoformat()
    held = Held(PARTS[name].what, told, done.returncode, (time.monotonic() - began) / 60, date, lines)
    write_json(settings.out / f"{name}.held.json", asdict(held))
    return held


def _read(out: Path, name: str) -> Held | None:
    path = out / f"{name}.held.json"
    return Held(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _tests_can_run() -> bool:
    return TESTS.is_dir() and all(importlib.util.find_spec(name) for name in ("pytest", "xdist"))
