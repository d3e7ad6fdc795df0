"""`laser-dist bench corpus`: encode and search a large corpus of short passages, also killed and continued.

1. A tiny random model encodes the corpus in one process, undisturbed.
2. It encodes it again, killed with SIGKILL in the middle of a chunk and continued, each time with another number of
   ranks. Nothing is reported unless all files have the same bytes.
3. Passages out of the corpus are its queries: exact search must find each, or one with the same text, first.

Every part runs in processes of its own, so that their peaks of memory are their own.
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError
from laser_dist.files import sha256, write_json

FILES = ("vectors.npy", "ids.jsonl", "ids.offsets", "manifest.json")
WORDS = (
    "ice water density blue sky air light short long waves crystal holds molecules apart floats scatters less".split()
)

HELP = """Encode a corpus of short passages with a tiny random model, whole and killed again and again; compare the
bytes, search it exactly, and tell time and peak memory.

Examples:
  laser-dist bench corpus --passages 20000
  nice laser-dist bench corpus --passages 1000000 --out corpus.json
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    passages: int = 1_000_000
    """Passages of the corpus."""
    words: tuple[int, int] = (1, 16)
    """Shortest and longest passage."""
    chunk: int = 4096
    """Passages in memory at a time, and between two points to continue from."""
    kills: int = 3
    """How often the second run is killed."""
    ranks: tuple[int, ...] = (1, 2)
    """Processes of the second run, taken in turn after each kill."""
    queries: int = 100
    """Passages that are searched for."""
    k: int = 10
    """Passages found per query."""
    scratch: Path | None = None
    """Folder for the corpus and the vectors, about 500 bytes a passage; unset: the system's. Removed afterwards."""
    out: Path | None = None
    """Also write the result to this JSON file."""

    def validate(self) -> None:
        """Raises UserError for values that nothing could be measured with."""
        for name in ("passages", "chunk", "queries", "k"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not 1 <= self.words[0] <= self.words[1]:
            raise UserError(f"--words {self.words[0]} {self.words[1]}: give the shortest, from 1 up, and the longest")
        if not self.ranks or min(self.ranks) < 1:
            raise UserError(f"--ranks {' '.join(map(str, self.ranks))}: give numbers from 1 up")
        if not 0 <= self.kills < self.passages / self.chunk:
            raise UserError(f"--kills {self.kills}: must be fewer than the chunks, {-(-self.passages // self.chunk)}")
        if self.out is not None and self.out.is_dir():
            raise UserError(f"--out {self.out}: is a folder: give the name of a file")


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit code. UserError: wrong input, or bytes that differ."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench corpus", description=HELP)
    settings.validate()
    with tempfile.TemporaryDirectory(prefix="laser-dist-bench-", dir=settings.scratch) as scratch:
        result = measure(settings, Path(scratch))
    _print(result)
    if settings.out is not None:
        write_json(settings.out, result)
    return 0


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Encode twice, compare, search. UserError unless the bytes are the same and the search finds what it must."""
    import torch

    from laser_dist.bench.environment import environment
    from laser_dist.testing import tiny_model_folder

    _say(f"writing {settings.passages:,} passages")
    tiny_model_folder(folder / "model")
    _write_corpus(settings, folder / "corpus.jsonl")
    _say("encoding, undisturbed")
    whole = _encode(settings, folder, "whole", ranks=1)
    rng, runs = random.Random(0), []
    for kill in range(settings.kills + 1):
        ranks = settings.ranks[kill % len(settings.ranks)]
        at = (kill + rng.random()) / (settings.kills + 1) if kill < settings.kills else None
        _say(f"encoding on {ranks} rank(s), " + ("to the end" if at is None else f"killed after {at:.0%}"))
        runs.append(_encode(settings, folder, "killed", ranks=ranks, kill_at=at))
    hashes = {name: sha256(folder / "whole" / name) for name in FILES}
    if differing := [name for name in FILES if sha256(folder / "killed" / name) != hashes[name]]:
        raise UserError(f"killed and continued, {', '.join(differing)} has other bytes: nothing is reported")
    _say("searching")
    return {
        **environment(torch.device("cpu")),
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "sha256": hashes,
        "bytes": (folder / "whole" / "vectors.npy").stat().st_size,
        "corpus_bytes": (folder / "corpus.jsonl").stat().st_size,
        "whole": whole,
        "killed": runs,
        "search": _search_apart(settings, folder),
    }


def _write_corpus(settings: Settings, path: Path) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(settings.passages):
            text = " ".join(rng.choices(WORDS, k=rng.randint(*settings.words)))
            file.write(json.dumps({"id": f"p{number}", "text": text}) + "\n")


def _encode(settings: Settings, folder: Path, out: str, *, ranks: int, kill_at: float | None = None) -> dict[str, Any]:
    """Seconds and the largest rank's peak memory of `laser-dist encode`, which is killed after that share of chunks."""
    command = [sys.executable, "-m", "laser_dist.retrieval.encode", "--model", str(folder / "model")]
    command += ["--corpus", str(folder / "corpus.jsonl"), "--out", str(folder / out), "--device", "cpu"]
    command += ["--chunk", str(settings.chunk)]
    started, peak, until = time.perf_counter(), 0.0, 2.0 if kill_at is None else kill_at
    with _ranks(command, ranks, folder / "output") as processes:
        while None in [process.poll() for process in processes] and _share(folder / out / "done.bin") < until:
            peak = max([peak, *(_peak_mib(process.pid) for process in processes)])
            time.sleep(0.05)
        if kill_at is not None:
            done = max(1, round(_share(folder / out / "done.bin") * settings.passages / settings.chunk))
            time.sleep(random.random() * min(0.5, (time.perf_counter() - started) / done))  # somewhere within a chunk
            for process in processes:
                process.kill()
        codes = [process.wait() for process in processes]
    if kill_at is None and any(codes):
        raise UserError(f"encode ended with {codes}: {(folder / 'output').read_text(errors='replace')[-2000:]}")
    return {"ranks": ranks, "killed_at": kill_at, "seconds": time.perf_counter() - started, "peak_mib": peak}


@contextmanager
def _ranks(command: list[str], ranks: int, output: Path) -> "Iterator[list[subprocess.Popen[bytes]]]":
    """The command as so many ranks, as torchrun starts them; none is left behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    with output.open("wb") as file:
        try:
            for rank in range(ranks):
                env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))
            yield processes
        except BaseException:
            for process in processes:
                process.kill()
                process.wait()
            raise


def _share(done: Path) -> float:
    """Share of the chunks that are on disk."""
    chunks = done.read_bytes() if done.is_file() else b""
    return sum(chunks) / len(chunks) if chunks else 0.0


def _peak_mib(pid: int) -> float:
    """Most memory that the process has had; 0 once it has ended.

    Not what wait4(2) tells: that includes the memory of the process which started it.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return max([int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")], default=0.0)


def _search_apart(settings: Settings, folder: Path) -> dict[str, Any]:
    job = json.dumps({"folder": str(folder), "queries": settings.queries, "k": settings.k})
    code = "from laser_dist.bench.corpus import _search; _search()"
    done = subprocess.run([sys.executable, "-c", code], input=job, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the search failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _search() -> None:
    """What the process for searching runs."""
    from laser_dist.retrieval.encoder import LaserEncoder
    from laser_dist.retrieval.search.exact import search
    from laser_dist.retrieval.vectors import load_vectors

    job = json.load(sys.stdin)
    folder = Path(job["folder"])
    ids, vectors = load_vectors(folder / "whole")
    asked = sorted(random.Random(1).sample(range(len(ids)), min(job["queries"], len(ids))))
    texts = _texts(folder / "corpus.jsonl", asked)
    encoder = LaserEncoder.from_pretrained(folder / "model", device="cpu")
    queries = encoder.encode_passages([texts[row] for row in asked])
    started = time.perf_counter()
    scores, found = search(queries, vectors, job["k"])
    seconds = time.perf_counter() - started
    first = found[:, 0].tolist()
    texts |= _texts(folder / "corpus.jsonl", first)
    for i, (row, best) in enumerate(zip(asked, first, strict=True)):
        # Short passages repeat, and may differ in so little that rounding decides.
        tied = texts[best] == texts[row] or scores[i, 0] - vectors[row] @ queries[i] < 1e-6
        if ids[best] != f"p{best}" or not tied:
            sys.exit(f"passage {row} was searched for, and {ids[best]!r} found first")
    print(json.dumps({"queries": len(asked), "seconds": seconds, "peak_mib": _peak_mib(os.getpid())}))


def _texts(path: Path, rows: list[int]) -> dict[int, str]:
    wanted = set(rows)
    with path.open("rb") as file:
        return {row: json.loads(line)["text"] for row, line in enumerate(file) if row in wanted}


def _say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = result["settings"]
    table = Table(title=f"{settings['passages']:,} passages, encoded and searched", caption_justify="left")
    for heading in ("", "ranks", "seconds", "peak MiB of a process"):
        table.add_column(heading, justify="right" if heading else "left")
    named = [("encode, undisturbed", result["whole"])]
    for run in result["killed"]:
        at = run["killed_at"]
        named.append(("encode, continued to the end" if at is None else f"encode, killed after {at:.0%}", run))
    named.append((f"exact search, {result['search']['queries']} queries", {"ranks": 1, **result["search"]}))
    for name, run in named:
        table.add_row(name, str(run["ranks"]), f"{run['seconds']:.1f}", f"{run['peak_mib']:,.0f}")
    table.caption = (
        f"{result['date']} · {result['device']} · torch {result['torch']}\n"
        f"corpus {result['corpus_bytes'] / 1e6:,.0f} MB, vectors {result['bytes'] / 1e6:,.0f} MB, sha256 "
        f"{result['sha256']['vectors.npy'][:16]}, the same bytes after every kill; chunks of {settings['chunk']}"
    )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
