"""A fault that strikes `laser-dist export` while it replaces an earlier export."""

import os
import time
from pathlib import Path

from laser_dist.bench.faults import acts, machine
from laser_dist.bench.faults.run import Ended
from laser_dist.bench.faults.table import Row
from laser_dist.cli import run
from laser_dist.files import sha256
from laser_dist.testing import forked

PLACES = {"out of memory": "load", "disk full": "write_model", "disk takes no writes": "write_model"}
"""What of exporting/weights.py an act strikes at; others: when all is written and not yet verified."""


def run_export(row: Row, root: Path, output: Path) -> Ended:
    """Export a finished run, then again in another precision with the fault, and again without it."""
    began = time.monotonic()
    out = output / "export"
    output.mkdir()
    _export(root, out, "bfloat16")
    earlier = _content(out)
    with machine.disturbed("", output):
        code, lines = _export(root, out, "float32", "--overwrite", act=row.act)
    after = _content(out)
    again, told = _export(root, out, "float32", "--overwrite")
    _export(root, output / "expected", "float32")
    problems = []
    if not code:
        problems.append("exit code 0")
    if row.cause and not any(row.cause in line for line in lines):
        problems.append(f"no line says {row.cause!r}")
    if after != earlier or not earlier:
        problems.append("the earlier export is not what it was")
    if (
        again
        or _content(out) != _content(output / "expected")
        or sorted(output.iterdir()) != [output / "expected", out]
    ):
        problems.append(f"the next try ends with {again}, and {sorted(path.name for path in output.iterdir())}")
    last = lines[-1] if lines else ""
    seconds = time.monotonic() - began
    return Ended(
        row.name,
        row.ends,
        code,
        1,
        None,
        last,
        seconds=seconds,
        problems=problems,
        output=lines + told if problems else [],
    )


def _export(root: Path, out: Path, dtype: str, *flags: str, act: str = "") -> tuple[int, list[str]]:
    """Exit code of `laser-dist export` in a process of its own, and its output."""
    environment = {**os.environ, machine.FOLDER: str(out.parent), "OMP_NUM_THREADS": "1"}
    words = [str(root / "whole"), "--out", str(out), "--dtype", dtype, *flags]
    log = out.parent.with_suffix(".log")
    log.unlink(missing_ok=True)
    code = forked.start(export_struck, act, *words, env=environment, output=log).wait()
    return code, log.read_text(encoding="utf-8", errors="replace").splitlines()


def export_struck(act: str, *words: str) -> int:
    """What that process runs; "": without a fault."""
    from laser_dist.retrieval.exporting import weights

    if act:
        place = PLACES.get(act, "verify")
        original = getattr(weights, place)
        setattr(weights, place, lambda *arguments: (acts.ACTS[act](), original(*arguments))[1])
    return run("laser_dist.retrieval.export", list(words))


def _content(folder: Path) -> dict[str, str]:
    """Hash of each file but the model card, which names the folder."""
    if not folder.is_dir():
        return {}
    return {path.name: sha256(path) for path in folder.iterdir() if path.name != "README.md"}
