"""Runs a row of the table in a folder of its own, and judges how it ended."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from laser_dist.bench.faults import warm
from laser_dist.bench.faults.data import served
from laser_dist.bench.faults.machine import FOLDER, disturbed
from laser_dist.bench.faults.rank import FAULT
from laser_dist.bench.faults.table import NO_FAULT, SAVED_EVERY, STEPS, Row
from laser_dist.launch import outcome, processes
from laser_dist.testing import forked
from laser_dist.watch import pulse, verdict
from laser_dist.watch.verdict import Verdict

LIMIT = 180.0
"""Seconds for a row: what takes longer hangs."""
KNOWN, GONE = 1.0, 10.0
"""Seconds within which a dead rank is known (a stopped or hung one: after those it may be so), and within which the
attempt is over then."""


@dataclass
class Ended:
    """What a row came to."""

    name: str
    ends: str
    code: int
    attempts: int
    verdict: Verdict | None
    last_line: str
    known: float | None = None
    """Seconds from the fault until a rank knew."""
    gone: float | None = None
    """Seconds from then until the attempt was over."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    """Why this is not the end that the row asks for."""
    output: list[str] = field(default_factory=list)
    """What was printed, if there are problems."""


def build(folder: str) -> int:
    """A tiny model, shards, a dev set and a recipe; returns an exit code."""
    from laser_dist.data import sample_folder
    from laser_dist.data.preparation import prepare
    from laser_dist.testing.tiny import tiny_model_folder

    root = Path(folder)
    tiny_model_folder(root / "model", layers=1)
    rows = [json.loads(line) for line in (sample_folder() / "train.jsonl").read_text().splitlines()[:12]]
    for row in rows:
        row["query"], row["rationale"] = row["query"][:40], row["rationale"][:80]
        for passage in row["positives"] + row["negatives"]:
            passage["text"] = passage["text"][:40]
    passages = [{"id": f"d{i}", "text": row["positives"][0]["text"]} for i, row in enumerate(rows)]
    queries = [{"id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows[:4])]
    for name, lines in (("train", rows), ("corpus", passages), ("queries", queries)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(4)))
    prepare.main(["--source", str(root / "train.jsonl"), "--out", str(root / "shards"), "--shard-examples", "5"])
    (root / "recipe.toml").write_text(
        f'[model]\nname = "{root}/model"\ndtype = "float32"\n'
        f'[data]\ntrain = "{root}/shards"\n'
        f'[train]\nqueries_per_rank = 2\nmax_steps = {STEPS}\ndeepspeed = "zero3-test"\n'
        f"[checkpoint]\nevery = {SAVED_EVERY}\nkeep = 9\n[launch]\npreflight = false\n"
        f'[evaluation]\ncorpus = "{root}/corpus.jsonl"\nqueries = "{root}/queries.jsonl"\nqrels = "{root}/qrels.tsv"\n'
    )
    return 0


def run_row(row: Row, root: Path, output: Path, expected: str, *, cold: bool = False) -> Ended:
    """Launch two ranks with the row's fault into `output`; `expected`: hash of the last weights without faults.

    `cold`: with DeepSpeed's launcher instead of forks.
    """
    began = time.monotonic()
    struck = output.with_suffix(".struck")
    with (
        disturbed(row.machine, output) as options,
        served(row, root / "shards", output.with_suffix(".data")) as data_flags,
    ):
        code, lines = _launch(row, root, output, struck, options, data_flags, cold)
    attempts = [(at, line) for at, line in lines if line.startswith(("launch: attempt ", "error: "))]
    told = verdict.read(outcome.folder(output, 1)) or verdict.inferred(outcome.folder(output, 1))
    ended = Ended(row.name, row.ends, code, len(attempts), told, attempts[-1][1] if attempts else "")
    if row.act and not struck.is_file():
        ended.problems.append("the fault did not strike")
    elif row.act and told and row.kind:
        at = float(struck.read_text())
        known = told.time if told.told_by >= 0 else at  # a supervisor that infers it says not when
        ended.known = known - at if told.told_by >= 0 else None
        ended.gone = attempts[0][0] - known if attempts else None
    if row.ends == "mended":
        ended.problems += _start_again(root, output, cold)
    ended.problems += _problems(row, ended, attempts, weights(output), expected, output)
    ended.seconds = time.monotonic() - began
    ended.output = [line for _, line in lines] if ended.problems else []
    return ended


def _start_again(root: Path, output: Path, cold: bool) -> list[str]:
    """Why the run that was stopped does not come to its end when nothing is wrong with the machine any more."""
    resume = ["--resume"] if (output / "checkpoints" / "latest").is_file() else []
    with disturbed("", output) as options:
        code, lines = _launch(NO_FAULT, root, output, output, options, resume, cold)
    return [f"started again, it ends with {code}", *(line for _, line in lines[-5:])] if code else []


def weights(output: Path, steps: int = STEPS) -> str:
    """Hash of the model after the last step, by the manifest; '' if the run did not come so far."""
    try:
        manifest = output / "checkpoints" / f"step-{steps:06d}" / "manifest.json"
        return str(json.loads(manifest.read_text())["files"]["model/model.safetensors"]["sha256"])
    except (OSError, KeyError):
        return ""


def _launch(
    row: Row, root: Path, output: Path, struck: Path, options: list[str], flags: list[str], cold: bool
) -> tuple[int, list[tuple[float, str]]]:
    """Exit code and output, each line with the time it came at."""
    fault = {name: getattr(row, name) for name in ("act", "phase", "step", "rank", "attempts")} | {
        "struck": str(struck)
    }
    options = ["--num_accelerators", "2", "--max-restarts", "2", "--backoff", "0", *options]
    arguments = [*options, str(root / "recipe.toml"), "--output", str(output), *row.flags, *flags]
    environment = {FAULT: json.dumps(fault), FOLDER: str(output), "OMP_NUM_THREADS": "1"}
    process = (start_cold if cold else warm.start)(arguments, environment, log := output.with_suffix(".log"))
    try:
        lines = [(time.time(), line.rstrip()) for line in forked.lines(process, log, LIMIT)]
    finally:
        forked.end(process)
        processes.end(str(output))
    return process.wait(), lines


def start_cold(arguments: list[str], environment: dict[str, str], output: Path) -> forked.Process:
    """`laser-dist launch` in a process of its own, with DeepSpeed's launcher."""
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "laser_dist.bench.faults.launcher", *arguments],
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _problems(
    row: Row, ended: Ended, attempts: list[tuple[float, str]], actual: str, expected: str, output: Path
) -> list[str]:
    problems = []
    codes = {"recovered": 0, "unharmed": 0, "saved": 75}
    if ended.code != codes.get(row.ends, ended.code) or (
        row.ends in ("stopped", "mended") and ended.code not in (1, 2)
    ):
        problems.append(f"exit code {ended.code}")
    if row.ends in ("recovered", "unharmed", "mended") and actual != expected:
        problems.append("other weights than without a fault" if actual else "it did not come to the end")
    if row.ends == "recovered" and ended.attempts != 2 or row.ends in ("unharmed", "saved") and ended.attempts != 1:
        problems.append(f"{ended.attempts} attempts")
    if not any(row.cause in line for _, line in attempts):
        problems.append(f"no line says {row.cause!r}")
    told = ended.verdict
    if row.ends != "mended" and bool(row.kind) != bool(told):  # a disk that takes nothing takes no verdict
        problems.append(f"verdict: {told.line if told else 'none'}")
    if told and row.kind:
        phase = "start" if row.phase == "init" else row.phase
        expected_place = (row.rank, row.step, phase) if row.placed else (told.rank, told.step, told.phase)
        if (told.kind, told.rank, told.step, told.phase) != (row.kind, *expected_place):
            problems.append(f"verdict: {told.line}")
        if not list(outcome.folder(output, 1).glob("stacks-*.txt")):
            problems.append("no stacks")
    return problems + _late(row, ended, output)


def _late(row: Row, ended: Ended, output: Path) -> list[str]:
    late = [f"gone {ended.gone:.1f} s later, allowed are {GONE:.0f}"] if (ended.gone or 0.0) > GONE else []
    if ended.known is None or not row.placed:
        return late
    beat = pulse.read(pulse.path_of(outcome.folder(output, 1), row.rank))
    promised = beat.brief if beat and row.kind in ("stopped", "locked", "hung") else 0.0  # 3 median steps and 5 s
    allowed = promised + KNOWN
    return late + ([f"known after {ended.known:.1f} s, allowed are {allowed:.1f}"] if ended.known > allowed else [])
