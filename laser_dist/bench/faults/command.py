"""The command: which rows, how they ended, and the table."""

import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.files import write_json

HELP = """Strike a real run on two ranks with each of the faults in the table, and check how it ends.

Every row is a run of its own under `laser-dist launch`, with the restart where it needs one.

Examples:
  laser-dist bench faults --list
  laser-dist bench faults --only "hangs" "killed | save"
  laser-dist bench faults --out faults/
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which faults."""

    only: tuple[str, ...] = ()
    """Rows whose name holds one of these."""
    cold: bool = False
    """Start every attempt with DeepSpeed's launcher: ranks then import for themselves, half a minute for each row."""
    list: bool = False
    """Print the rows' names and end."""
    out: Path | None = None
    """Write faults.md and faults.json into this folder."""


def main(arguments: list[str]) -> int:
    """Run the rows; returns 0 if each ended as it must, else 1. UserError: no such row."""
    import tyro

    from laser_dist.bench.faults.table import ROWS

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench faults", description=HELP)
    rows = [row for row in ROWS if not settings.only or any(part in row.name for part in settings.only)]
    if not rows:
        raise UserError(f"--only {' '.join(settings.only)}: no row's name holds this; --list shows them")
    if settings.list:
        print("\n".join(f"{row.name}: {row.ends}" for row in rows))
        return 0
    with tempfile.TemporaryDirectory(prefix="laser-dist-faults-") as name:
        ended = run_rows(rows, Path(name), cold=settings.cold, out=settings.out)
    right = sum(not end.problems for end in ended)
    print(f"{right} of {len(ended)} rows ended as they must")
    return 0 if right == len(ended) else 1


def run_rows(rows: list, root: Path, *, cold: bool = False, out: Path | None = None) -> list:
    """Each row after the other, with a line for each as it ends, and what is known so far in `out`."""
    from laser_dist.bench.faults.exporting import run_export
    from laser_dist.bench.faults.run import build, run_row, weights
    from laser_dist.bench.faults.table import NO_FAULT
    from laser_dist.testing.forked import start

    start(build, str(root), env=os.environ, output=root / "build.log").wait()
    run_row(NO_FAULT, root, root / "whole", "", cold=cold)
    expected = weights(root / "whole")
    if not expected:
        raise UserError(f"a run without a fault does not come to its end: {root / 'whole'}")
    ended = []
    for number, row in enumerate(rows, 1):
        output = root / f"run-{number}"
        export = row.phase == "export"
        end = run_export(row, root, output) if export else run_row(row, root, output, expected, cold=cold)
        ended.append(end)
        told = "; ".join(end.problems) or "right"
        print(f"{number}/{len(rows)} {end.name} | {end.ends}: {told} ({_times(end)}{end.seconds:.0f} s)", flush=True)
        if end.problems:
            print("\n".join(f"    {line}" for line in end.output[-40:]), file=sys.stderr, flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "faults.md").write_text(markdown(ended).replace(f"{root}/", ""), encoding="utf-8")
            write_json(out / "faults.json", {"date": _date(), "rows": [asdict(end) for end in ended]})
    return ended


def markdown(ended: list) -> str:
    """The table."""
    right = sum(not end.problems for end in ended)
    lines = [
        f"{right} of {len(ended)} rows ended as they must ({_date()}). known: from the fault until a rank knew; "
        "gone: from then until the attempt was over, to its supervisor.",
        "",
        "| fault | in | rank | must be | is | known, s | gone, s | the line |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for end in ended:
        told = end.verdict.line.replace(f" on {end.verdict.host} ", " ") if end.verdict else ""
        known, gone = ("" if x is None else f"{x:.1f}" for x in (end.known, end.gone))
        lines.append(f"| {end.name} | {end.ends} | {'; '.join(end.problems) or 'right'} | {known} | {gone} | {told} |")
    return "\n".join(lines) + "\n"


def _times(end) -> str:  # noqa: ANN001
    return "" if end.known is None else f"known after {end.known:.1f} s, gone {end.gone or 0:.1f} s later; "


def _date() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
