"""`laser-dist bench loader`: this package's loader against plain pipelines on the same shards, in one run.

1. All must yield the same examples as the same tokens, each once; else nothing is reported.
2. They take turns, in reverse order every other round, so that a machine that slows down slows all of them. Each round
   is a pass over all shards with the same tokenisation and packing, from starting the loader processes to the last
   batch; cold rounds begin with the shards out of the page cache.
"""

import os
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_dist.bench.pages import evict, warm
from laser_dist.errors import UserError
from laser_dist.model.embedded import CACHED_BACKBONE

if TYPE_CHECKING:
    from laser_dist.batch import PackedBatch
    from laser_dist.data.text import TextFormat

HELP = """Measure how fast training batches are read, tokenised and packed: by this package, by a plain WebDataset
pipeline and by `datasets` in streaming mode, on the same shards; and how many loader processes feed one GPU.

Examples:
  laser-dist bench loader --paper-lengths
  laser-dist bench loader --data shards/ --model Qwen/Qwen3-0.6B --workers 1 2 4 --out loader.json
"""
LOADERS = ("ours", "webdataset", "datasets")
Load = Callable[[int], "Iterable[PackedBatch]"]  # workers -> batches of one pass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str | None = None
    """Hub id or folder of the tokenizer; unset: the backbone that `laser-dist quickstart` has cached."""
    data: Path | None = None
    """Folder written by `laser-dist prepare`; unset: the embedded sample."""
    paper_lengths: bool = False
    """Instead: synthetic examples of the paper's mean lengths (query 222, rationale 985 tokens; passages 400)."""
    examples: int = 2000
    """With --paper-lengths: how many."""
    queries: int = 8
    """B: queries per batch."""
    negatives: int = 1
    """Hard negatives per query."""
    steps: int = 3
    """K, the number of latent steps."""
    workers: tuple[int, ...] = (1, 2)
    """Loader processes; one measurement for each number."""
    rounds: int = 3
    """Passes per loader and number of workers, cold and warm each."""
    gpu_tflops: float = 989.0
    """Peak of the GPU to be fed, in TFLOP/s; the default is an H100 SXM in bfloat16, dense."""
    mfu: float = 0.4
    """Share of that peak which training reaches."""
    parameters: float = 0.44e9
    """Backbone parameters without embeddings; the default and the next two are Qwen3-0.6B's, the hungriest."""
    layers: int = 28
    """Layers of the backbone."""
    attention_width: int = 2048
    """Attention heads x head dimension."""
    out: Path | None = None
    """Also write the result to this JSON file, and a chart beside it (.png)."""

    def validate(self) -> None:
        """Raises UserError for values that nothing could be measured with."""
        for name in ("queries", "steps", "rounds", "examples", "parameters", "layers", "gpu_tflops"):
            if not getattr(self, name) >= 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not self.workers or min(self.workers) < 1:
            raise UserError(f"--workers {' '.join(map(str, self.workers))}: give numbers from 1 up")
        if self.negatives < 0:
            raise UserError(f"--negatives {self.negatives}: must be 0 or more")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu {self.mfu}: is a share of the peak, above 0 and at most 1")
        if self.data is not None and self.paper_lengths:
            raise UserError("give --data or --paper-lengths, not both")
        if self.out is not None and (self.out.is_dir() or self.out.suffix == ".png"):
            raise UserError(f"--out {self.out}: give the name of a JSON file; the chart goes beside it")
        if self.model is None and not (CACHED_BACKBONE / "config.json").is_file():
            raise UserError(
                f"no --model given, and {CACHED_BACKBONE} does not exist: give a hub id or a folder, "
                "or run `laser-dist quickstart` once, which makes it"
            )


@dataclass(frozen=True)
class Passed:
    """One pass of one loader."""

    loader: str
    workers: int
    cold: bool
    seconds: float  # from starting the loader processes to the last batch
    first_batch: float  # seconds until the first batch was there
    examples: int
    tokens: int
    cpu_seconds: float  # of the loader processes, which other work on the machine does not lengthen
    cached: float | None  # share of the shards in the page cache before; None if the system does not tell


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit code. UserError: wrong input, or loaders that disagree."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench loader", description=HELP)
    settings.validate()
    # Before they are imported: local files need no hub, and loader processes are the parallelism.
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "WDS_SECURE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from laser_dist.bench import loader_report
    from laser_dist.observability.console import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="laser-dist-bench-") as scratch:
        folder, text = prepare(settings, Path(scratch))
        lengths, passes = run_all(settings, folder, text)
    result = loader_report.summarise(settings, lengths, passes)
    loader_report.show(result)
    if settings.out is not None:
        loader_report.write(settings.out, result)
    return 0


def prepare(settings: Settings, scratch: Path) -> tuple[Path, "TextFormat"]:
    """The folder of shards that is read, and the format that all loaders tokenise with."""
    from laser_dist.bench.synthetic import paper_examples
    from laser_dist.config import ModelConfig, TextConfig
    from laser_dist.data import sample_folder
    from laser_dist.data.schema import decode_example
    from laser_dist.data.shards import write_shards
    from laser_dist.data.text import TextFormat
    from laser_dist.model.backbone import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name=settings.model or str(CACHED_BACKBONE)))
    text = TextFormat(tokenizer, TextConfig(), steps=settings.steps)
    if settings.data is not None:
        return settings.data, text
    if settings.paper_lengths:
        examples = paper_examples(settings.examples, settings.negatives, tokenizer)
        source, count = "synthetic, the paper's lengths", settings.examples
    else:
        lines = (sample_folder() / "train.jsonl").read_bytes().splitlines()
        examples = (decode_example(line, f"train.jsonl:{i}") for i, line in enumerate(lines, 1))
        source, count = "the embedded sample", len(lines)
    folder = scratch / "shards"
    # Plain pipelines share out whole shards, so every worker needs some.
    write_shards(examples, folder, source=source, shard_examples=max(1, min(250, count // (4 * max(settings.workers)))))
    return folder, text


def loaders(settings: Settings, folder: Path, text: "TextFormat") -> dict[str, Load]:
    """Name -> what makes a pass, for each of LOADERS."""
    from laser_dist.batch import PackedBatch
    from laser_dist.config import DataConfig, RunConfig, TrainConfig
    from laser_dist.data.streaming.loader import training_batches
    from laser_dist.data.streaming.plain_loaders import datasets_batches, webdataset_batches
    from laser_dist.data.streaming.sets import open_folder
    from laser_dist.data.streaming.stream import draw_passages

    data = open_folder(folder)
    shards = [folder / shard.name for part in data.sets for shard in part.shards]

    def ours(workers: int) -> Iterator[PackedBatch]:
        config = RunConfig(
            data=DataConfig(train=str(folder), negatives=settings.negatives, workers=workers),
            train=TrainConfig(queries_per_rank=settings.queries),
        )
        total = -(-data.examples // settings.queries)
        batches = training_batches(config, data, text, rank=0, world_size=1, start=0, total=total)
        return (batch.packed for batch in batches)

    def pack(examples: Any) -> PackedBatch:
        passages = [draw_passages(example, settings.negatives, (0, 0)) for example in examples]
        return text.batch(examples, passages, with_rationale=True)

    return {
        "ours": ours,
        "webdataset": lambda workers: webdataset_batches(shards, pack, queries=settings.queries, workers=workers),
        "datasets": lambda workers: datasets_batches(shards, pack, queries=settings.queries, workers=workers),
    }


def run_all(settings: Settings, folder: Path, text: "TextFormat") -> tuple[dict[str, list[int]], list[Passed]]:
    """Tokens per row of every example, and all passes. UserError if the loaders disagree."""
    from laser_dist.data.shards import load_manifest

    manifest = load_manifest(folder)
    if max(settings.workers) > len(manifest.shards):
        raise UserError(
            f"{folder} has {len(manifest.shards)} shards, too few for {max(settings.workers)} workers of a plain "
            "pipeline: lower --workers, or prepare more and smaller shards"
        )
    contenders = loaders(settings, folder, text)
    _say("comparing what the loaders yield ...")
    expected = compare(
        # Ours goes on into the next epoch to fill its last batch.
        {name: rows_of(load(1), manifest.examples if name == "ours" else None) for name, load in contenders.items()}
    )
    tokens = sum(sum(lengths) for lengths, _ in expected.values())
    files, passes = [folder / shard.name for shard in manifest.shards], []
    for turn in range(settings.rounds):
        for cold in (True, False):
            for workers in settings.workers:
                for name in LOADERS[:: -1 if turn % 2 else 1]:
                    _say(f"round {turn + 1}: {name}, {workers} workers, {'cold' if cold else 'warm'} ...")
                    cached = evict(files) if cold else warm(files)
                    done = _time(contenders[name], name, workers, cold, cached)
                    if name != "ours" and (done.examples, done.tokens) != (len(expected), tokens):
                        raise UserError(f"{name}: with {workers} workers it yields other examples: nothing is reported")
                    passes.append(done)
    return {query_id: lengths for query_id, (lengths, _) in expected.items()}, passes


def _time(load: Load, name: str, workers: int, cold: bool, cached: float | None) -> Passed:
    examples = tokens = 0
    first = 0.0
    busy, began = _children_seconds(), time.perf_counter()
    for batch in load(workers):
        first = first or time.perf_counter() - began
        examples += batch.queries
        tokens += len(batch.tokens_T)
    seconds = time.perf_counter() - began  # the loader has ended its processes by now
    return Passed(name, workers, cold, seconds, first, examples, tokens, _children_seconds() - busy, cached)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


Rows = dict[str, tuple[list[int], int]]  # query id -> tokens of its row and of its passages, checksum of their ids


def rows_of(batches: "Iterable[PackedBatch]", examples: int | None) -> Rows:
    """What one pass yields, or the first `examples` of it. UserError for an example that comes twice."""
    rows: Rows = {}
    for batch in batches:
        parts = batch.tokens_T.split(batch.lengths_R.tolist())
        group = (len(parts) - batch.queries) // batch.queries
        for number, query_id in enumerate(batch.query_ids):
            if len(rows) == examples:
                return rows
            if query_id in rows:
                raise UserError(f"query {query_id!r} comes twice in one pass: nothing is reported")
            first = batch.queries + number * group
            own = [parts[number], *parts[first : first + group]]
            checksum = zlib.crc32(b"|".join(part.numpy().tobytes() for part in own))
            rows[query_id] = [len(part) for part in own], checksum
    return rows


def compare(found: dict[str, Rows]) -> Rows:
    """The rows that all loaders yield; UserError unless they are the same ids, tokens and counts."""
    reference = found[LOADERS[0]]
    for name, rows in found.items():
        if rows.keys() != reference.keys():
            odd = sorted(rows.keys() ^ reference.keys())
            raise UserError(
                f"{name} and {LOADERS[0]} yield different examples ({len(odd)}, the first is {odd[0]!r}): "
                "loaders that do different things are not compared, and nothing is reported"
            )
        if wrong := [query_id for query_id, row in rows.items() if row != reference[query_id]]:
            raise UserError(
                f"{name} and {LOADERS[0]} make different tokens of {len(wrong)} examples, the first is {wrong[0]!r}: "
                "loaders that do different things are not compared, and nothing is reported"
            )
    return reference


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
