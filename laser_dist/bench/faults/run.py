"""Runs a row of the table in a folder of its own, and judges how it ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from laser_dist.bench.faults import warm
from laser_dist.bench.faults.data import served
from laser_dist.bench.faults.rank import FAULT
from laser_dist.bench.faults.table import SAVED_EVERY, STEPS, Row
from laser_dist.launch import outcome, processes
from laser_dist.launch.ranks import free_port
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


def build(root: Path) -> int:
    """A tiny model, shards, a dev set and a recipe; returns an exit code."""
    from laser_dist.data import sample_folder
    from laser_dist.data.preparation import prepare
    from laser_dist.testing.tiny import tiny_model_folder

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
    with served(row, root / "shards", output.with_suffix(".data")) as data_flags:
        code, lines = _launch(row, root, output, struck, data_flags, cold)
    attempts = [(at, line) for at, line in lines if line.startswith("launch: attempt ")]
    told = verdict.read(outcome.folder(output, 1)) or verdict.inferred(outcome.folder(output, 1))
    ended = Ended(row.name, row.ends, code, len(attempts), told, attempts[-1][1] if attempts else "")
    if row.act and not struck.is_file():
        ended.problems.append("the fault did not strike")
    elif row.act and told and row.kind:
        at = float(struck.read_text())
        known = told.time if told.told_by >= 0 else at  # a supervisor that infers it says not when
        ended.known = known - at if told.told_by >= 0 else None
        ended.gone = attempts[0][0] - known if attempts else None
    ended.problems += _problems(row, ended, attempts, weights(output), expected, output)
    ended.seconds = time.monotonic() - began
    ended.output = [line for _, line in lines] if ended.problems else []
    return ended


def weights(output: Path, steps: int = STEPS) -> str:
    """Hash of the model after the last step, by the manifest; '' if the run did not come so far."""
    try:
        manifest = output / "checkpoints" / f"step-{steps:06d}" / "manifest.json"
        return str(json.loads(manifest.read_text())["files"]["model/model.safetensors"]["sha256"])
    except (OSError, KeyError):
        return ""


def _launch(
    row: Row, root: Path, output: Path, struck: Path, data_flags: list[str], cold: bool
) -> tuple[int, list[tuple[float, str]]]:
    """Exit code and output, each line with the time it came at."""
    fault = {name: getattr(row, name) for name in ("act", "phase", "step", "rank", "attempts")} | {
        "struck": str(struck)
    }
    options = ["--num_accelerators", "2", "--master_port", str(free_port()), "--max-restarts", "2", "--backoff", "0"]
    arguments = [*options, str(root / "recipe.toml"), "--output", str(output), *row.flags, *data_flags]
    environment = {FAULT: json.dumps(fault), "OMP_NUM_THREADS": "1"}
    pid, printed = (start_cold if cold else warm.start)(arguments, environment)

    def end() -> None:
        os.killpg(pid, signal.SIGKILL)
        processes.end(str(output))

    limit = threading.Timer(LIMIT, end)
    limit.start()
    with printed:
        lines = [(time.time(), line.rstrip()) for line in printed]
    limit.cancel()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines


def start_cold(arguments: list[str], environment: dict[str, str]) -> tuple[int, IO[str]]:
    """`laser-dist launch` in a process of its own, with DeepSpeed's launcher: its process and what it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "laser_dist.bench.faults.launcher", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout
    return process.pid, process.stdout


def _problems(
    row: Row, ended: Ended, attempts: list[tuple[float, str]], actual: str, expected: str, output: Path
) -> list[str]:
    problems = []
    codes = {"recovered": 0, "unharmed": 0, "saved": 75}
    if ended.code != codes.get(row.ends, ended.code) or (row.ends == "stopped" and ended.code not in (1, 2)):
        problems.append(f"exit code {ended.code}")
    if row.ends in ("recovered", "unharmed") and actual != expected:
        problems.append("other weights than without a fault" if actual else "it did not come to the end")
    if row.ends == "recovered" and ended.attempts != 2 or row.ends in ("unharmed", "saved") and ended.attempts != 1:
        problems.append(f"{ended.attempts} attempts")
    if not any(row.cause in line for _, line in attempts):
        problems.append(f"no line says {row.cause!r}")
    told = ended.verdict
    if bool(row.kind) != bool(told):
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
