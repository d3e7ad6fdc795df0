"""A JSONL file of passages or queries, checked line by line once and then read by ranges of rows; never held in memory.

What the check leaves behind is a folder: rows.offsets (where each row begins in the file), ids.jsonl (one id per line,
as JSON), ids.offsets (where each begins there) and index.json, written last. Offsets are uint64, little-endian, one
more than there are rows. The check that ids are unique takes 16 bytes of memory per row, once.
"""

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from laser_dist.errors import UserError
from laser_dist.files import sha256, write_json
from laser_dist.reading import decode_json, read_object
from laser_dist.retrieval.collection import decode_line, parse_row, passage_of, query_of, raw_lines

What = Literal["passages", "queries"]
IDS, ID_OFFSETS = "ids.jsonl", "ids.offsets"
_ROW_OFFSETS, _INDEX = "rows.offsets", "index.json"
_COLUMNS = {"passages": passage_of, "queries": query_of}


class Ids(Sequence[str]):
    """The ids of a folder, read from disk when asked for; equal to a list of the same ids."""

    def __init__(self, folder: Path):
        """Raises OSError or ValueError where the two files do not agree."""
        self._path = folder / IDS
        self._offsets = np.memmap(folder / ID_OFFSETS, "<u8", "r")
        self._bytes = np.memmap(self._path, np.uint8, "r")
        if self._offsets[-1] != len(self._bytes):
            raise ValueError(f"{IDS} has {len(self._bytes)} bytes, {ID_OFFSETS} says {self._offsets[-1]}")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        row = range(len(self))[key]
        start, end = self._offsets[row : row + 2].tolist()
        return self._id(self._bytes[start:end].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self._id(line) for _, line in raw_lines(self._path))

    def _id(self, line: bytes) -> str:
        try:
            value = decode_json(line)
        except ValueError:
            value = None
        if not isinstance(value, str):
            raise UserError(f"{self._path}: {line[:40]!r} is no id: encode again with --overwrite")
        return value

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RowIndex:
    """A checked file: how many rows of what it has, and its state when it was read."""

    what: What
    rows: int
    sha256: str
    size: int
    modified_ns: int

    def check_unchanged(self, path: Path) -> None:
        """UserError if the file holds other bytes than when it was checked."""
        if (self.size, self.modified_ns) != _state(path) and sha256(path) != self.sha256:
            raise UserError(f"{path} changed while it was encoded: encode again with --overwrite")

    def read(self, path: Path, folder: Path, first: int, last: int) -> list[tuple[str, str | None]]:
        """Rows first to last (exclusive): (text, title) of passages, (text, instruction) of queries."""
        offsets = np.memmap(folder / _ROW_OFFSETS, "<u8", "r")
        with path.open("rb") as file:
            file.seek(start := int(offsets[first]))
            block = file.read(int(offsets[last]) - start)
        found: list[tuple[str, str | None]] = []
        for number, raw in enumerate(block.split(b"\n")):
            where = f"{path}, row {first + len(found) + 1}"
            if line := decode_line(where, raw, first=start == number == 0):
                found.append(_COLUMNS[self.what](where, parse_row(where, line)[0]))
        if len(found) != last - first:
            raise UserError(f"{path} changed while it was encoded: encode again with --overwrite")
        return found


def index_rows(path: Path, folder: Path, what: What) -> RowIndex:
    """Check every line of the file and leave its index in `folder`; an index of the same bytes is kept.

    Raises UserError at the first defect, so that none shows up hours later, and then leaves no index.
    """
    if (kept := _kept(path, folder, what)) is not None:
        return kept
    size, modified_ns = _state(path)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        rows, sha256 = _scan(path, staging, what)
        index = RowIndex(what, rows, sha256, size, modified_ns)
        index.check_unchanged(path)
        write_json(staging / _INDEX, asdict(index))
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return index


def open_index(folder: Path) -> RowIndex:
    """The index that `index_rows` has left."""
    try:
        return RowIndex(**read_object(folder / _INDEX))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / _INDEX} is damaged ({error}): encode again with --overwrite") from None


def _kept(path: Path, folder: Path, what: What) -> RowIndex | None:
    if not all((folder / name).is_file() for name in (_INDEX, _ROW_OFFSETS, IDS, ID_OFFSETS)):
        return None
    index, (size, modified_ns) = open_index(folder), _state(path)
    if (index.what, index.size) != (what, size):
        return None
    return RowIndex(what, index.rows, index.sha256, size, modified_ns) if sha256(path) == index.sha256 else None


def _scan(path: Path, folder: Path, what: What) -> tuple[int, str]:
    """Write offsets and ids; returns the number of rows and the file's SHA-256."""
    from rich.console import Console
    from rich.progress import track

    digest, columns = hashlib.sha256(), _COLUMNS[what]
    hashes, lines = (
        array("q"),
        track(raw_lines(path), "check", console=Console(stderr=True), total=None, transient=True),
    )
    with (
        (folder / _ROW_OFFSETS).open("wb") as row_offsets,
        (folder / ID_OFFSETS).open("wb") as id_offsets,
        (folder / IDS).open("wb") as ids,
    ):
        id_offsets.write(_packed(0))
        end = 0
        for number, (offset, raw) in enumerate(lines, start=1):
            end = offset + len(raw)
            digest.update(raw)
            where = f"{path}:{number}"
            if line := decode_line(where, raw, first=number == 1):
                row, row_id = parse_row(where, line)
                columns(where, row)
                hashes.append(hash(row_id))
                row_offsets.write(_packed(offset))
                ids.write(json.dumps(row_id, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
                id_offsets.write(_packed(ids.tell()))
        row_offsets.write(_packed(end))
    if not hashes:
        raise UserError(f'{path}: the file is empty: write one object with "id" and "text" per line')
    _check_unique(path, hashes)
    return len(hashes), digest.hexdigest()


def _check_unique(path: Path, hashes: array) -> None:
    """UserError for the first id that an earlier line has; ids are compared where their 64-bit hashes are equal."""
    ordered = np.sort(np.frombuffer(hashes, np.int64))
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: dict[str, str] = {}
    for number, (_, raw) in enumerate(raw_lines(path) if twice else (), start=1):
        where = f"{path}:{number}"
        if line := decode_line(where, raw, first=number == 1):
            row_id = parse_row(where, line)[1]
            if hash(row_id) not in twice:
                continue
            if row_id in seen:
                raise UserError(
                    f"{where}: id {row_id!r} was used on an earlier line ({seen[row_id]}): ids must be unique"
                )
            seen[row_id] = f"{number}"


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    return status.st_size, status.st_mtime_ns


def _packed(value: Any) -> bytes:
    return int(value).to_bytes(8, "little")
