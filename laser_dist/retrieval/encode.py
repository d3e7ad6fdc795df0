"""`laser-dist encode`: a corpus, or queries, as a folder of vectors that can be memory-mapped; on one process or many.

1. The file is checked line by line and indexed once (see `rows`), by rank 0.
2. Its rows are cut into chunks, always alike. Rank r of W encodes chunks r, r + W, ... that are not yet on disk, and
   puts each in its place in one file (see `vectors`). So any number of ranks gives the same bytes, also after a kill.
3. Rank 0 waits for the others and gives the files their names.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from laser_dist.errors import UserError
from laser_dist.retrieval.rows import RowIndex, What, index_rows
from laser_dist.retrieval.vectors import FORMAT, INDEX, Unfinished, discard, refuse_finished, refuse_foreign

if TYPE_CHECKING:
    from laser_dist.retrieval.encoder import LaserEncoder

T = TypeVar("T")
CHUNK = 4096

HELP = """Encode a corpus into a folder: vectors.npy (memory-mappable), ids.jsonl and manifest.json.

An interrupted run continues where it stopped when the same command is given again, on any number of processes.

Examples:
  laser-dist encode --model mine --corpus corpus.jsonl --out vectors
  laser-dist encode --model mine --corpus corpus.jsonl --out vectors --dtype float16 --dim 256
  laser-dist encode --model mine --corpus queries.jsonl --what queries --out query-vectors
  torchrun --nproc-per-node 8 -m laser_dist.retrieval.encode --model mine --corpus corpus.jsonl --out vectors
"""


def encode_corpus(
    encoder: "LaserEncoder",
    corpus: str | Path,
    out: str | Path,
    *,
    what: What = "passages",
    dtype: str = "float32",
    chunk: int = CHUNK,
    weights: str | None = None,
) -> Path:
    """Encode the rows of a corpus.jsonl (or queries.jsonl) into the folder `out`, [n, D] of `dtype`; returns it.

    In a process group all ranks must call it alike. At most `chunk` texts are in memory per process; within a chunk
    the encoder batches by length. Chunks that an interrupted call finished are kept, if model, corpus, dtype and chunk
    are still the same. `weights` is a fingerprint (see `weights_hash`) that tells models apart whose descriptions are
    equal. Raises UserError for defects of the corpus, for a finished folder, and for one with work on something else.
    """
    corpus, out = Path(corpus), Path(out)

    def prepare() -> tuple[RowIndex, Unfinished]:
        refuse_finished(out)
        index = index_rows(corpus, out / INDEX, what)
        identity = {
            "format": FORMAT,
            "what": what,
            "rows": index.rows,
            "dim": int(encoder.dim),
            "dtype": np.dtype(dtype).name,
            "chunk": chunk,
            # Through JSON and back, so that it equals what a later call reads from disk.
            "encoder": json.loads(json.dumps(encoder.description())),
            "weights": weights,
            "corpus": {"file": corpus.name, "sha256": index.sha256},
        }
        vectors = Unfinished(out, identity)
        vectors.start()
        return index, vectors

    def finish() -> None:
        index.check_unchanged(corpus)
        vectors.finish()

    index, vectors = _on_first_rank(prepare)
    _encode_chunks(encoder, corpus, index, vectors)
    _barrier()
    _on_first_rank(finish)
    return out


def weights_hash(model: str | Path) -> str | None:
    """SHA-256 over the safetensors files of a model folder, which retraining changes and nothing else about it may.

    None where there are none, as with a hub id.
    """
    digest = hashlib.sha256()
    files = sorted(Path(model).glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


def _encode_chunks(encoder: "LaserEncoder", corpus: Path, index: RowIndex, vectors: Unfinished) -> None:
    """This rank's share. Rank 0 shows how far all of them are, and how long it will take."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from laser_dist.distributed.collectives import rank, world_size

    columns = (TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # The default looks back 30 seconds, in which a large model may not finish a chunk.
    bar = Progress(*columns, console=Console(stderr=True), disable=rank() != 0, speed_estimate_period=600)
    done = vectors.done()
    with bar:
        task = bar.add_task("encode", total=index.rows, completed=_rows(vectors, done))
        for chunk in range(rank(), vectors.chunks, world_size()):
            if done[chunk]:
                continue
            first, last = vectors.rows_of(chunk)
            rows = index.read(corpus, vectors.folder / INDEX, first, last)
            try:
                vectors.write(chunk, _encode(encoder, index.what, rows))
            except UserError as error:
                raise UserError(f"{corpus}, rows {first + 1} to {last}: {error}") from error
            bar.update(task, completed=_rows(vectors, vectors.done()))


def _encode(encoder: "LaserEncoder", what: What, rows: list[tuple[str, str | None]]) -> np.ndarray:
    texts = [text for text, _ in rows]
    if what == "queries":
        return encoder.encode_queries(texts, instructions=[instruction for _, instruction in rows])
    return encoder.encode_passages(texts, titles=[title or "" for _, title in rows])


def _rows(vectors: Unfinished, done: np.ndarray) -> int:
    return sum(last - first for first, last in map(vectors.rows_of, np.flatnonzero(done).tolist()))


def _on_first_rank(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank. Its UserError ends all ranks, and rank 0 tells it."""
    from laser_dist.distributed.collectives import gather_objects, rank

    result: Any = None
    error: UserError | None = None
    if rank() == 0:
        try:
            result = action()
        except UserError as raised:
            error = raised
    result, failed = gather_objects((result, error is not None))[0]
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
    return result


def _barrier() -> None:
    from laser_dist.distributed.collectives import barrier

    barrier()


@contextmanager
def _process_group() -> Iterator[None]:
    """A process group of what torchrun or deepspeed has started; nothing for a process on its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from datetime import timedelta

    import torch.distributed as dist

    # On CPUs: nothing but plans and barriers goes over it. A rank may wait for the slowest for long.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `laser-dist encode`."""

    model: str
    """Folder of the model: an export, a checkpoint, or a run (its newest checkpoint)."""
    corpus: Path
    """corpus.jsonl: id, text and optionally title per line; with --what queries: id, text, optionally instruction."""
    out: Path
    """Folder to write; for several machines, on a disk that all share."""
    what: What = "passages"
    """Queries are encoded otherwise than passages: with an instruction."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision of the stored vectors."""
    dim: int | None = None
    """Keep only the first components of each vector, renormalised; unset: all."""
    steps: int | None = None
    """Latent steps; unset: as many as in training."""
    model_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the model; unset: float32 on a CPU, bfloat16 on a GPU."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one, each rank its own."""
    batch_tokens: int = 4096
    """Tokens per forward pass; a GPU wants more, 32768 say."""
    chunk: int = CHUNK
    """Texts in memory at a time, and between two points to continue from."""
    overwrite: bool = False
    """Replace the vectors that the folder holds."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for wrong input, before the model is loaded."""
    import tyro

    # The launcher's own argument; the environment says the same.
    argv = [argument for argument in argv if not argument.startswith("--local_rank")]
    args = tyro.cli(Arguments, args=argv, prog="laser-dist encode", description=HELP)
    for name in ("chunk", "batch_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    (refuse_foreign if args.overwrite else refuse_finished)(args.out)
    with _process_group():
        return _run(args)


def _run(args: Arguments) -> int:
    def prepare() -> tuple[str, str | None]:
        index_rows(args.corpus, args.out / INDEX, args.what)
        from laser_dist.retrieval.folders import model_folder

        # Once: a run's newest checkpoint may be another one a moment later.
        model = model_folder(args.model)
        return model, weights_hash(model)

    model, weights = _on_first_rank(prepare)
    encoder = _load(args, model)
    if args.overwrite:
        _on_first_rank(lambda: discard(args.out, index=False))
    encode_corpus(encoder, args.corpus, args.out, what=args.what, dtype=args.dtype, chunk=args.chunk, weights=weights)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"vectors in {args.out}")
    return 0


def _load(args: Arguments, model: str) -> "LaserEncoder":
    import torch

    from laser_dist.retrieval.encoder import LaserEncoder

    device = args.device
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return LaserEncoder.from_pretrained(
        model, steps=args.steps, dim=args.dim, device=device, dtype=args.model_dtype, batch_tokens=args.batch_tokens
    )


if __name__ == "__main__":
    from laser_dist.cli import run

    sys.exit(run("laser_dist.retrieval.encode", sys.argv[1:]))
