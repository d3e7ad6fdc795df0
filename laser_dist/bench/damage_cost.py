"""What it costs to hash every shard whenever it is read: the loader with and without, in alternating rounds."""

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from laser_dist.errors import UserError

if TYPE_CHECKING:
    from laser_dist.data.text import TextFormat


def cost(model: str | None, examples: int, rounds: int, workers: int, scratch: Path) -> dict[str, Any] | None:
    """Examples per second of the loader with and without hashes, of packed batches and of rows alone."""
    from laser_dist.data.streaming import store
    from laser_dist.model.embedded import CACHED_BACKBONE

    model = model or (str(CACHED_BACKBONE) if (CACHED_BACKBONE / "config.json").is_file() else None)
    if model is None:
        print("no --model: what the hashes cost is not measured", file=sys.stderr)
        return None
    text, folder = _paper_set(model, examples, scratch)
    passes = {"packed": lambda: _packed(folder, text, examples, workers), "rows": lambda: _rows(folder)}
    seconds: dict[tuple[str, bool], list[float]] = {}
    busy: dict[tuple[str, bool], list[float]] = {}
    for turn in range(rounds):
        for hashes in (True, False) if turn % 2 else (False, True):
            with mock.patch.object(store, "_matches", store._matches if hashes else lambda *_: True):
                for what, one_pass in passes.items():
                    began, used = time.perf_counter(), _processor_seconds()
                    if one_pass() != examples:
                        raise UserError(f"{what}: other examples came than were written: nothing is reported")
                    seconds.setdefault((what, hashes), []).append(time.perf_counter() - began)
                    busy.setdefault((what, hashes), []).append(_processor_seconds() - used)
    result: dict[str, Any] = {"examples": examples, "bytes": sum(path.stat().st_size for path in folder.glob("*.tar"))}
    for what in passes:
        pairs = [hashed / plain - 1 for hashed, plain in zip(busy[what, True], busy[what, False], strict=True)]
        result[what] = {
            "examples_per_second": examples / statistics.median(seconds[what, True]),
            "without_hashes": examples / statistics.median(seconds[what, False]),
            "more_processor_time": statistics.median(pairs),
            "pairs": pairs,
        }
    # The difference of two large numbers is mostly noise; what the hashes take is seen in passes that do little else.
    hashing = statistics.median(busy["rows", True]) - statistics.median(busy["rows", False])
    result["share_of_packed"] = hashing / statistics.median(busy["packed", True])
    return result


def _processor_seconds() -> float:
    """Of this process and of loader processes that have ended; other work on the machine does not lengthen it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _paper_set(model: str, examples: int, scratch: Path) -> "tuple[TextFormat, Path]":
    """Synthetic examples of the paper's lengths, and the format they are tokenised with."""
    from laser_dist.bench.synthetic import paper_examples
    from laser_dist.config import ModelConfig, TextConfig
    from laser_dist.data.shards import write_shards
    from laser_dist.data.text import TextFormat
    from laser_dist.model.backbone import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name=model))
    rows = paper_examples(examples, 1, tokenizer)
    write_shards(rows, scratch / "paper", source="synthetic, the paper's lengths", shard_examples=100)
    return TextFormat(tokenizer, TextConfig(), steps=3), scratch / "paper"


def _packed(folder: Path, text: "TextFormat", examples: int, workers: int) -> int:
    """Examples of one pass as packed batches of 4."""
    from laser_dist.config import DataConfig, RunConfig, TrainConfig
    from laser_dist.data.streaming.loader import training_batches
    from laser_dist.data.streaming.sets import open_folder

    config = RunConfig(data=DataConfig(train=str(folder), workers=workers), train=TrainConfig(queries_per_rank=4))
    total = examples // 4
    batches = training_batches(config, open_folder(folder), text, rank=0, world_size=1, start=0, total=total)
    return sum(batch.packed.queries for batch in batches) + examples % 4


def _rows(folder: Path) -> int:
    """Examples of one pass as bytes: reading, checking and finding them, and nothing else."""
    from laser_dist.data.shards import load_manifest, read_members

    return sum(len(read_members(folder, shard)) for shard in load_manifest(folder).shards)
