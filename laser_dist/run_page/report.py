"""`laser-dist report`: a run as one HTML page, from what it wrote; also of a run that died or is still going on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from laser_dist.errors import UserError
from laser_dist.files import replacing
from laser_dist.run_page.page import render
from laser_dist.run_page.read import LEDGER, METRICS, read_run

HELP = """Write a run as one HTML page: alarms, where its time went, curves, every scalar beside what is healthy,
configuration. One file without scripts; open it from disk. Training writes it too, as run.html, when it ends.

Examples:
  laser-dist report runs/first
  laser-dist report runs/second --against runs/first        # their curves together, and what differs in their recipes
  laser-dist report runs/first --out first.html
"""
PAGE = "run.html"
LARGEST_AT_END = 64 * 2**20
"""Bytes of metrics.jsonl, some 40,000 steps: reading more would keep a run's end waiting for seconds."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `laser-dist report`."""

    run: Annotated[Path, tyro.conf.Positional]
    """Output folder of the run."""
    against: Path | None = None
    """Output folder of another run to compare with."""
    out: Path | None = None
    """File to write; unset: run.html in the run's folder."""


def main(argv: list[str]) -> int:
    """Run the command. UserError if there is no run, or the page cannot be written."""
    args = tyro.cli(Arguments, args=argv, prog="laser-dist report", description=HELP)
    out = args.out or args.run / PAGE
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder: give the name of a file")
    try:
        page = write_page(args.run, out, args.against)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}): give another file with --out") from None
    print(f"wrote {page}")
    return 0


def write_page(run: Path, out: Path | None = None, against: Path | None = None) -> Path:
    """The page of `run` as a file, whole or not at all. UserError if there is no run."""
    out = out or run / PAGE
    text = render(read_run(run), read_run(against) if against else None)
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return out


@contextmanager
def page_at_end(run: Path, *, enabled: bool = True) -> Iterator[None]:
    """Writes the page when the block ends, however it ends; what goes wrong with it is said, and nothing more."""
    try:
        yield
    finally:
        try:
            present = [path for name in (METRICS, LEDGER) if (path := run / name).is_file()] if enabled else []
            if sum(path.stat().st_size for path in present) > LARGEST_AT_END:
                print(f"{PAGE}: a long run; write its page with `laser-dist report {run}`", file=sys.stderr)
            elif present:
                write_page(run)
        except Exception as error:
            print(f"no {PAGE}: {type(error).__name__}: {error}", file=sys.stderr)
