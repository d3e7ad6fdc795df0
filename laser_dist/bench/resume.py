"""`laser-dist bench resume`: seconds from opening the data to the first micro-batch, at several places of an epoch.

Each place is measured in a process of its own, with the folder's pages dropped from the system's cache, and counts only
if the ids are those that the order has at that place.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_dist.errors import UserError

if TYPE_CHECKING:
    from laser_dist.data.schema import Example

HELP = """Time how long a run takes to continue at several places of a large set.

Examples:
  laser-dist bench resume
  laser-dist bench resume --examples 100000 --workers 2 --out resume.json
  laser-dist bench resume --data shards/ --places 0 50 99.9
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    data: Path | None = None
    """Folder written by `laser-dist prepare`; unset: a synthetic set is written to a temporary folder."""
    examples: int = 1_000_000
    """Examples of the synthetic set, about 1 kB each."""
    shard_examples: int = 1000
    """Examples per shard of the synthetic set."""
    places: tuple[float, ...] = (0.0, 1.0, 50.0, 99.0)
    """Where the run continues, in percent of an epoch."""
    workers: int = 1
    """Loader processes."""
    queries: int = 8
    """Queries of a micro-batch."""
    repeats: int = 3
    """Measurements per place."""
    out: Path | None = None
    """Also write the result to this JSON file."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be measured with."""
        for name in ("examples", "shard_examples", "queries", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: must be 0 or more")
        if not self.places or not all(0 <= place < 100 for place in self.places):
            raise UserError(f"--places {self.places}: percentages from 0 to below 100")


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit code. UserError: wrong input, or other ids than the order's."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench resume", description=HELP)
    settings.validate()
    with ExitStack() as stack:
        if settings.data is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="laser-dist-bench-")))
            settings = replace(settings, data=root / "shards")
            build(settings)
        result = measure_all(settings)
    _print(result)
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def build(settings: Settings) -> None:
    """Write the synthetic set."""
    from rich.console import Console
    from rich.progress import track

    from laser_dist.data.shards import write_shards

    assert settings.data is not None
    console = Console(stderr=True)
    rows = track(
        _examples(settings.examples), "writing examples", settings.examples, console=console,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
    write_shards(rows, settings.data, source="synthetic", shard_examples=settings.shard_examples)


def _examples(count: int) -> Iterator["Example"]:
    from laser_dist.data.schema import Example, Passage

    for i in range(count):
        passages = [Passage(f"p{i}-{j}", f"Passage {j} for example {i}. " * 6) for j in range(3)]
        yield Example(f"q{i}", f"Query {i}?", f"First thought {i}. " * 8, (passages[0],), tuple(passages[1:]))


def measure_all(settings: Settings) -> dict[str, Any]:
    """Seconds and shards read per place; every measurement is a fresh process, as a resumed run is."""
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(settings.repeats):
        for place in settings.places:
            found = _in_a_process(settings, place)
            row = rows.setdefault(f"{place:g}", {"position": found["position"], "seconds": []})
            row["seconds"].append(round(found["seconds"], 3))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "examples": found["examples"],
        "shards": found["shards"],
        "settings": {name: str(value) for name, value in asdict(settings).items() if value is not None},
        "places": rows,
    }


def _in_a_process(settings: Settings, place: float) -> dict[str, Any]:
    arguments = {"data": str(settings.data), "place": place, "workers": settings.workers, "queries": settings.queries}
    done = subprocess.run(
        [sys.executable, "-m", "laser_dist.bench.resume", json.dumps(arguments)], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"the measurement at {place:g} % failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(data: str, place: float, workers: int, queries: int) -> dict[str, Any]:
    """Open the set, continue at `place` percent of its first epoch, and time the first micro-batch."""
    from torch.utils.data import DataLoader

    from laser_dist.data.streaming.sets import open_folder
    from laser_dist.data.streaming.stream import ExampleStream, plain_errors

    _drop_pages(Path(data))
    started = time.perf_counter()
    opened = open_folder(data)
    position = int(opened.examples * place / 100)
    stream = ExampleStream(opened, seed=0, queries_per_rank=queries, total_batches=1000, start=position)
    batch = next(plain_errors(DataLoader(stream, batch_size=None, num_workers=workers)))
    seconds = time.perf_counter() - started
    _check(stream, batch.items)
    return {
        "seconds": seconds,
        "position": position,
        "examples": opened.examples,
        "shards": len(opened.sets[0].shards),
    }


def _check(stream: Any, items: list[tuple[int, "Example"]]) -> None:
    """UserError unless the items are those that the whole epoch, laid out at once, has at these positions."""
    from laser_dist.data.schema import decode_example
    from laser_dist.data.shards import read_shard

    [part], [order] = stream.data.sets, stream.orders
    for position, example in items:
        epoch, offset = divmod(position, order.examples)
        index = int(order.epoch(epoch)[offset])
        number = int((order.starts > index).argmax()) - 1
        raw = read_shard(part.store, part.shards[number])[index - int(order.starts[number])]
        if decode_example(raw, "the shard").query_id != example.query_id:
            raise UserError(f"position {position} holds {example.query_id!r}, which is not what the order says")


def _drop_pages(folder: Path) -> None:
    """Read from disk, as a run on another machine would; what the system has cached stays out of the measurement."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Seconds from opening the data to the first micro-batch", caption_justify="left")
    for heading in ("% of the epoch", "position", "median s", "all s"):
        table.add_column(heading, justify="right")
    for place, row in result["places"].items():
        seconds = sorted(row["seconds"])
        table.add_row(place, f"{row['position']:,}", f"{seconds[len(seconds) // 2]:.2f}", " ".join(map(str, seconds)))
    table.caption = (
        f"{result['date']} · {result['cpus']} CPU cores · {result['examples']:,} examples in {result['shards']:,} "
        f"shards · {result['settings']['workers']} loader processes, page cache dropped; ids checked against the order"
    )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
