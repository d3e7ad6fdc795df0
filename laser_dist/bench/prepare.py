"""`laser-dist bench prepare`: rows per second and memory of `prepare` and `prepare --check` on synthetic rows.

The command runs as users run it, in a process of its own. Memory is that of all its processes together, pages that they
share counted once, sampled a few times per second: flat means that what it takes at the end is what it took early on.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError

HELP = """Time `prepare` on synthetic rows and watch its memory.

Examples:
  laser-dist bench prepare --rows 100000
  laser-dist bench prepare --rows 1000000 --workers 2 --out prepare.json
"""
_WORDS = 20_000
_SAMPLE_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured. A row has one query, one rationale of three segments, one positive and some negatives."""

    rows: int = 100_000
    """Rows of the synthetic source."""
    workers: int | None = None
    """--workers of `prepare`; unset: its default."""
    negatives: int = 3
    """Negatives per row."""
    folder: Path | None = None
    """Where rows and shards are written, and removed again; unset: a temporary folder. About 3 kB per row, twice."""
    out: Path | None = None
    """Also write the result to this JSON file."""


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit code."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench prepare", description=HELP)
    if settings.rows < 1000 or settings.negatives < 0:
        raise UserError("--rows must be at least 1000, --negatives at least 0")
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        result = measure(settings, Path(name))
    print(_table(result))
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Generate the rows, prepare them, check the result. UserError if either fails."""
    source, shards = folder / "rows.jsonl", folder / "shards"
    write_rows(source, settings.rows, settings.negatives)
    workers = [] if settings.workers is None else ["--workers", str(settings.workers)]
    runs = {
        "prepare": _watched(["--source", str(source), "--out", str(shards), *workers]),
        "check": _watched(["--check", str(shards), *workers]),
    }
    size = source.stat().st_size
    for run in runs.values():
        run |= {"rows_per_second": settings.rows / run["seconds"], "mb_per_second": size / 1e6 / run["seconds"]}
    return {"settings": asdict(settings) | {"out": None, "folder": None}, "source_mb": size / 1e6, **runs}


def write_rows(path: Path, rows: int, negatives: int, seed: int = 0) -> None:
    """JSON lines with random words; the same for the same arguments."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(_rows(rows, negatives, random.Random(seed)))


def _rows(rows: int, negatives: int, rng: random.Random) -> Iterator[str]:
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(_WORDS)]
    text = " ".join(rng.choices(words, k=200_000))

    def some(length: int) -> str:
        start = rng.randrange(len(text) - length)
        return text[start : start + length].strip()

    for number in range(rows):
        passages = [{"id": f"d{number}-{i}", "text": f"{i} {some(500)}"} for i in range(negatives + 1)]
        row = {
            "query_id": f"q{number}",
            "query": f"{number} {some(150)}",
            "rationale": "\n\n".join(some(250) for _ in range(3)),
            "positives": passages[:1],
            "negatives": passages[1:],
        }
        yield json.dumps(row) + "\n"


def _watched(arguments: list[str]) -> dict[str, Any]:
    """Seconds of a `laser-dist prepare`, and its memory: at its peak, and in the tenths of its time."""
    began = time.monotonic()
    samples: list[tuple[float, float]] = []
    command = [sys.executable, "-m", "laser_dist.cli", "prepare", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            samples.append((time.monotonic() - began, _tree_mb(process.pid)))
            time.sleep(_SAMPLE_SECONDS)
        seconds = time.monotonic() - began
        told = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise UserError(f"laser-dist prepare {' '.join(arguments)} failed: {told.strip()}")
    tenths = [max((mb for at, mb in samples if at <= seconds * share), default=0.0) for share in (0.2, 0.5, 1.0)]
    return {"seconds": seconds, "mb_until_20_percent": tenths[0], "mb_until_half": tenths[1], "mb_peak": tenths[2]}


def _tree_mb(pid: int) -> float:
    """Proportional set size of a process and its children, MB; 0 for those that have just ended."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    own = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return own / 1e3 + sum(_tree_mb(int(child)) for child in children)


def _table(result: dict[str, Any]) -> str:
    rows = result["settings"]["rows"]
    lines = [
        f"{rows:,} rows, {result['source_mb']:,.0f} MB",
        "",
        "            rows/s   MB/s      s   MB: to 20 %  to 50 %  peak",
    ]
    for name in ("prepare", "check"):
        run = result[name]
        lines.append(
            f"{name:<10}{run['rows_per_second']:>8,.0f}{run['mb_per_second']:>7,.0f}{run['seconds']:>7,.0f}"
            f"{run['mb_until_20_percent']:>12,.0f}{run['mb_until_half']:>12,.0f}{run['mb_peak']:>6,.0f}"
        )
    return "\n".join(lines)
