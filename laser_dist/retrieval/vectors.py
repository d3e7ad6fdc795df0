"""Folders of vectors on disk: what is finished is memory-mapped, what is not is continued by any number of processes.

Finished: vectors.npy (row i belongs to id i), ids.jsonl with ids.offsets (see `rows`), and manifest.json, written last:
a folder without it is not finished.

In progress: vectors.partial.npy has its full size from the start, and holes where nothing was written; progress.json
says what is being made; done.bin has one byte per chunk of rows, 1 once the chunk is safely on disk. Processes write
different chunks, each at its place, so nothing has to be merged.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laser_dist.errors import UserError
from laser_dist.files import sync_folder, write_json
from laser_dist.reading import read_object
from laser_dist.retrieval.rows import ID_OFFSETS, IDS, Ids

FORMAT = 2
INDEX = "index"
_VECTORS, _PARTIAL, _DONE = "vectors.npy", "vectors.partial.npy", "done.bin"
_MANIFEST, _PROGRESS = "manifest.json", "progress.json"


def load_vectors(folder: str | Path) -> tuple[Ids, np.memmap]:
    """A finished folder as (ids, vectors [n, D] memory-mapped read-only); row i belongs to ids[i].

    Raises UserError if the folder is missing, unfinished, or its files do not agree with its manifest.
    """
    folder = Path(folder)
    if not is_finished(folder):
        state = "is not finished: give the same `laser-dist encode` command again to continue"
        raise UserError(f"{folder} {state if (folder / _PROGRESS).is_file() else 'is no folder of vectors'}")
    try:
        manifest = read_object(folder / _MANIFEST)
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this laser_dist reads {FORMAT}")
        ids, vectors = Ids(folder), np.load(folder / _VECTORS, mmap_mode="r", allow_pickle=False)
        expected = ([manifest["rows"], manifest["dim"]], manifest["rows"], manifest["dtype"])
        found = (list(vectors.shape), len(ids), vectors.dtype.name)
        if found != expected:
            raise ValueError(f"manifest says (shape, ids, dtype) = {expected}, files say {found}")
    except (OSError, EOFError, ValueError, KeyError, IndexError, OverflowError, MemoryError, TypeError) as error:
        raise UserError(f"{folder} is damaged ({error}): encode again with --overwrite") from None
    return ids, vectors


def is_finished(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file()


def refuse_foreign(out: Path) -> None:
    """UserError for what is no folder, and for a folder whose manifest is of something else, shards for instance."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder")
    try:
        manifest = read_object(out / _MANIFEST)
    except (OSError, ValueError):
        return
    if manifest and "encoder" not in manifest:
        raise UserError(f"{out} holds something else than vectors ({_MANIFEST}): choose another folder")


def refuse_finished(out: Path) -> None:
    """UserError for a folder that no new vectors can be put into; unfinished ones are continued."""
    refuse_foreign(out)
    if is_finished(out):
        raise UserError(
            f"{out} already holds finished vectors: choose another folder, or replace them with --overwrite"
        )
    if (out / _VECTORS).exists() and not (out / _PROGRESS).is_file():
        raise UserError(f"{out / _VECTORS} was made by something else: choose another folder, or give --overwrite")


def discard(out: str | Path, *, index: bool = True) -> None:
    """Delete vectors, finished or in progress, from the folder; other files in it stay."""
    # The manifest first: what is left after an interruption must not look finished.
    for name in (_MANIFEST, _PROGRESS, _DONE, _PARTIAL, _VECTORS, IDS, ID_OFFSETS):
        (Path(out) / name).unlink(missing_ok=True)
    if index:
        shutil.rmtree(Path(out) / INDEX, ignore_errors=True)


@dataclass(frozen=True)
class Unfinished:
    """Vectors in the making. `start` on one process, before any writes; `finish` on one, after all have."""

    folder: Path
    identity: dict[str, Any]  # what makes the vectors what they are: the manifest to be

    @property
    def chunks(self) -> int:
        return -(-self.identity["rows"] // self.identity["chunk"])

    def rows_of(self, chunk: int) -> tuple[int, int]:
        """First row of a chunk and the row after its last."""
        first = chunk * self.identity["chunk"]
        return first, min(first + self.identity["chunk"], self.identity["rows"])

    def start(self) -> None:
        """Make the files, or check that those there are of the same work. Raises UserError."""
        if (self.folder / _PROGRESS).is_file():
            return self._check_same()
        discard(self.folder, index=False)
        size = len(self._header()) + self._bytes(self.identity["rows"])
        if (free := shutil.disk_usage(self.folder).free) < size:
            raise UserError(
                f"{self.folder}: the vectors take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
            )
        (self.folder / _DONE).write_bytes(bytes(self.chunks))
        with (self.folder / _PARTIAL).open("wb") as file:
            file.write(self._header())
            file.truncate(size)
        write_json(self.folder / _PROGRESS, self.identity)
        return None

    def done(self) -> np.ndarray:
        """For each chunk whether it is safely on disk."""
        return np.frombuffer((self.folder / _DONE).read_bytes(), np.uint8) == 1

    def write(self, chunk: int, vectors: np.ndarray) -> None:
        """Put a chunk's vectors, [rows, dim], in their place, and only then note it as done."""
        first, last = self.rows_of(chunk)
        if vectors.shape != (last - first, self.identity["dim"]) or not np.isfinite(vectors).all():
            raise ValueError(f"the encoder gave {vectors.shape} or values that are not finite, after row {first}")
        data = vectors.astype(self.identity["dtype"], copy=False).tobytes()
        # Writing, not storing through a memory map: a full disk is then an error message and not a crash (SIGBUS).
        _write(self.folder / _PARTIAL, len(self._header()) + self._bytes(first), data)
        _write(self.folder / _DONE, chunk, b"\1")

    def finish(self) -> None:
        """Give the files their names; interrupted anywhere, the next call of `start` and `finish` does the rest."""
        if not self.done().all():
            raise ValueError(f"{self.folder}: {int((~self.done()).sum())} chunks are missing")
        (self.folder / _PARTIAL).replace(self.folder / _VECTORS)
        for name in (IDS, ID_OFFSETS):
            (self.folder / INDEX / name).replace(self.folder / name)
        sync_folder(self.folder)
        write_json(self.folder / _MANIFEST, self.identity)
        for name in (_PROGRESS, _DONE):
            (self.folder / name).unlink()
        shutil.rmtree(self.folder / INDEX)

    def _check_same(self) -> None:
        try:
            before = read_object(self.folder / _PROGRESS)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / _PROGRESS} is damaged ({error}): start anew with --overwrite") from None
        theirs, ours = _flat(before), _flat(self.identity)
        differing = [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]
        if differing:
            told = ", ".join(f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}" for key in differing)
            parts = ", ".join(dict.fromkeys(key.partition(".")[0] for key in differing))
            raise UserError(
                f"{self.folder} holds unfinished vectors made with another {parts}: {told}; "
                "repeat that command, choose another folder, or start anew with --overwrite"
            )
        if (self.folder / _VECTORS).is_file():  # interrupted after the last chunk, before the manifest
            (self.folder / _VECTORS).replace(self.folder / _PARTIAL)
        sizes = {_PARTIAL: len(self._header()) + self._bytes(self.identity["rows"]), _DONE: self.chunks}
        for name, size in sizes.items():
            if not (self.folder / name).is_file() or (self.folder / name).stat().st_size != size:
                raise UserError(f"{self.folder / name} has not the size it was made with: start anew with --overwrite")

    def _bytes(self, rows: int) -> int:
        return rows * self.identity["dim"] * np.dtype(self.identity["dtype"]).itemsize

    def _header(self) -> bytes:
        """The .npy header of the whole array."""
        from io import BytesIO

        descr = np.lib.format.dtype_to_descr(np.dtype(self.identity["dtype"]))
        shape = (self.identity["rows"], self.identity["dim"])
        header = BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
        return header.getvalue()


def _write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
