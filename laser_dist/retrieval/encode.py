"""`laser-dist encode`: a corpus as a folder of vectors that can be memory-mapped.

The folder: vectors.npy (row i belongs to id i), ids.json, and manifest.json, written last: a folder without it is not
finished. Work in progress is vectors.partial.npy, to which chunks are appended, and progress.json, which says what is
being made and how many rows are safely on disk; the same command continues there.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from laser_dist.errors import UserError
from laser_dist.files import write_json
from laser_dist.retrieval.collection import iter_passages

if TYPE_CHECKING:
    from laser_dist.retrieval.encoder import LaserEncoder

FORMAT = 1
_VECTORS, _PARTIAL, _IDS = "vectors.npy", "vectors.partial.npy", "ids.json"
_MANIFEST, _PROGRESS = "manifest.json", "progress.json"

HELP = """Encode a corpus into a folder: vectors.npy (memory-mappable), ids.json and manifest.json.

An interrupted run continues where it stopped when the same command is given again.

Examples:
  laser-dist encode --model mine --corpus corpus.jsonl --out vectors
  laser-dist encode --model mine --corpus corpus.jsonl --out vectors --dtype float16 --chunk 50000
"""


def encode_corpus(
    encoder: "LaserEncoder",
    corpus: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    chunk: int = 10000,
    weights: str | None = None,
) -> Path:
    """Encode the passages of a corpus.jsonl into the folder `out`, [n, D] unit rows of `dtype`; returns the folder.

    At most `chunk` passages are in memory; within a chunk the encoder batches by length. Chunks that an interrupted
    call finished are kept, if model, corpus, dtype and chunk are still the same. `weights` is a fingerprint (see
    `weights_hash`) that tells models apart whose descriptions are equal. Raises UserError for defects of the
    corpus, for a finished folder, and for one with work in progress on something else.
    """
    corpus, out = Path(corpus), Path(out)
    _refuse_finished(out)
    ids, corpus_hash = _check_corpus(corpus)
    identity = {
        "format": FORMAT,
        "passages": len(ids),
        "dim": int(encoder.dim),
        "dtype": np.dtype(dtype).name,
        "chunk": chunk,
        # Through JSON and back, so that it equals what a later call reads from disk.
        "encoder": json.loads(json.dumps(encoder.description())),
        "weights": weights,
        "corpus": {"file": corpus.name, "sha256": corpus_hash},
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_vectors(encoder, corpus, out, identity)
    write_json(out / _IDS, ids)
    (out / _PARTIAL).replace(out / _VECTORS)
    write_json(out / _MANIFEST, identity)
    (out / _PROGRESS).unlink()
    return out


def load_vectors(folder: str | Path) -> tuple[list[str], np.memmap]:
    """A finished folder as (ids, vectors [n, D] memory-mapped read-only); row i belongs to ids[i].

    Raises UserError if the folder is missing, unfinished, or its files do not agree with its manifest.
    """
    folder = Path(folder)
    if not (folder / _MANIFEST).is_file():
        state = "is not finished: give the same `laser-dist encode` command again to continue"
        raise UserError(f"{folder} {state if (folder / _PROGRESS).is_file() else 'is no folder of vectors'}")
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        ids = json.loads((folder / _IDS).read_text(encoding="utf-8"))
        vectors = np.load(folder / _VECTORS, mmap_mode="r", allow_pickle=False)
        expected = (manifest["format"], manifest["passages"], manifest["dim"], manifest["dtype"])
        found = (FORMAT, len(ids), vectors.shape[1], vectors.dtype.name)
        if found != expected or len(vectors) != len(ids):
            raise ValueError(f"manifest says (format, passages, dim, dtype) = {expected}, files say {found}")
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{folder} is damaged ({error}): encode again with --overwrite") from None
    return ids, vectors


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


def discard(out: str | Path) -> None:
    """Delete vectors, finished or in progress, from the folder; other files in it stay."""
    # The manifest first: what is left after an interruption must not look finished.
    for name in (_MANIFEST, _PROGRESS, _PARTIAL, _VECTORS, _IDS):
        (Path(out) / name).unlink(missing_ok=True)


def _refuse_finished(out: Path) -> None:
    if (out / _MANIFEST).is_file():
        raise UserError(
            f"{out} already holds finished vectors: choose another folder, or replace them with --overwrite"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder")


def _check_corpus(corpus: Path) -> tuple[list[str], str]:
    """All ids and the file's SHA-256, after checking every line, so that no defect shows up hours later."""
    ids = [passage_id for passage_id, _, _ in iter_passages(corpus)]
    with corpus.open("rb") as file:
        return ids, hashlib.file_digest(file, "sha256").hexdigest()


def _write_vectors(encoder: "LaserEncoder", corpus: Path, out: Path, identity: dict[str, Any]) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    total, chunk = identity["passages"], identity["chunk"]
    row_bytes = identity["dim"] * np.dtype(identity["dtype"]).itemsize
    done = _rows_done(out, identity)
    columns = (TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Appending, not writing through a memory map: a full disk is then an error message and not a crash (SIGBUS).
    with (out / _PARTIAL).open("r+b" if done else "w+b") as file, Progress(*columns, console=_stderr()) as bar:
        kept = _write_header(file, identity) + done * row_bytes
        if file.seek(0, os.SEEK_END) < kept:
            raise UserError(f"{out / _PARTIAL} is shorter than {_PROGRESS} says: start anew with --overwrite")
        file.truncate(kept)
        file.seek(kept)
        task = bar.add_task("encode", total=total, completed=done)
        for passages in _chunks(corpus, chunk, skip=done):
            _, texts, titles = map(list, zip(*passages, strict=True))
            vectors = encoder.encode_passages(texts, titles=titles).astype(identity["dtype"], copy=False)
            if vectors.shape != (len(passages), identity["dim"]) or not np.isfinite(vectors).all():
                raise ValueError(f"the encoder gave {vectors.shape} or values that are not finite, after row {done}")
            file.write(vectors.tobytes())
            file.flush()
            os.fsync(file.fileno())
            done += len(passages)
            write_json(out / _PROGRESS, {**identity, "done": done})
            bar.update(task, completed=done)
    if done != total:
        raise UserError(f"{corpus} changed while it was encoded: encode again with --overwrite")


def _rows_done(out: Path, identity: dict[str, Any]) -> int:
    """Rows that an interrupted call left safely on disk; 0 starts anew. Raises UserError for work on something else."""
    progress = out / _PROGRESS
    if not progress.is_file():
        return 0
    before = json.loads(progress.read_text(encoding="utf-8"))
    if differing := [key for key, value in identity.items() if before.get(key) != value]:
        raise UserError(
            f"{out} holds unfinished vectors made with another {', '.join(differing)}: repeat that command, "
            "choose another folder, or start anew with --overwrite"
        )
    if (out / _VECTORS).is_file():
        # Interrupted after the last chunk, before the manifest.
        (out / _VECTORS).replace(out / _PARTIAL)
    return before["done"] if (out / _PARTIAL).is_file() else 0


def _write_header(file: Any, identity: dict[str, Any]) -> int:
    """Write the .npy header of the whole array at the start of the file; returns its length in bytes."""
    descr = np.lib.format.dtype_to_descr(np.dtype(identity["dtype"]))
    shape = (identity["passages"], identity["dim"])
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.tell()


def _chunks(corpus: Path, size: int, skip: int) -> Iterator[list[tuple[str, str, str]]]:
    passages = islice(iter_passages(corpus), skip, None)
    while chunk := list(islice(passages, size)):
        yield chunk


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `laser-dist encode`."""

    model: str
    """Folder of the model: an export, a checkpoint, or a run (its newest checkpoint)."""
    corpus: Path
    """corpus.jsonl: id, text and optionally title per line."""
    out: Path
    """Folder to write."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision of the stored vectors."""
    chunk: int = 10000
    """Passages in memory at a time, and between two points to continue from."""
    steps: int | None = None
    """Latent steps; unset: as many as in training."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one."""
    overwrite: bool = False
    """Replace the vectors that the folder holds."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for wrong input, before the model is loaded."""
    import tyro

    args = tyro.cli(Arguments, args=argv, prog="laser-dist encode", description=HELP)
    if args.chunk < 1:
        raise UserError(f"--chunk {args.chunk}: must be at least 1")
    if not args.overwrite:
        _refuse_finished(args.out)
    _check_corpus(args.corpus)

    from laser_dist.retrieval.encoder import LaserEncoder, model_folder

    # Once: a run's newest checkpoint may be another one a moment later.
    model = model_folder(args.model)
    encoder = LaserEncoder.from_pretrained(model, steps=args.steps, device=args.device)
    if args.overwrite:
        discard(args.out)
    encode_corpus(encoder, args.corpus, args.out, dtype=args.dtype, chunk=args.chunk, weights=weights_hash(model))
    print(f"vectors in {args.out}")
    return 0
