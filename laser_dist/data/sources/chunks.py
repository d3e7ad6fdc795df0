"""Rows in chunks: lines of a file, compressed or not, and batches of a Parquet file, read without decoding them."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_dist.data.schema import decode_row
from laser_dist.errors import UserError
from laser_dist.reading import LONGEST_ROW

if TYPE_CHECKING:
    import pyarrow

ROWS = 256  # of a chunk
MAX_LINE = LONGEST_ROW  # bytes; what is longer is no row but a file without line breaks
_MOST_UNPACKED, _FREE = 200, 4 * 2**20  # times a file's size that are unpacked of it, and bytes that always are
_PARQUET_ROWS = 16  # decoded at once: a column may hold one long text in a million rows, and take no space for it
_BYTES = 4 * 2**20  # of a chunk, about


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of one file."""

    file: str  # path or hub id
    first: int  # number of the first row in it, from 1
    rows: list[Any] | bytes  # undecoded lines or decoded rows; bytes: an Arrow stream of rows
    share: float  # of the source that is read when this chunk is

    def decoded(self) -> Iterator[tuple[int, Any | UserError]]:
        """(number, row) of every row that is not a blank line; what cannot be decoded is a UserError."""
        rows = _from_arrow(self.rows) if isinstance(self.rows, bytes) else self.rows
        for number, row in enumerate(rows, self.first):
            if isinstance(row, UnicodeDecodeError):
                yield number, UserError(f"{self.file}:{number}: a text is not UTF-8 ({row.reason}): write it again")
            elif not isinstance(row, bytes):
                yield number, row
            elif row.strip():
                yield number, self._json(row, number)

    def __len__(self) -> int:
        return _table(self.rows).num_rows if isinstance(self.rows, bytes) else len(self.rows)

    def _json(self, line: bytes, number: int) -> Any | UserError:
        where = f"{self.file}:{number}"
        if len(line) > MAX_LINE:
            return UserError(f"{where}: the line is longer than {MAX_LINE >> 20} MiB: one JSON object per line")
        try:
            return decode_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where)
        except UserError as error:
            return error


_Piece = tuple[int, Any, int, float]  # number of the first row, rows, how many, share of the file read


def line_chunks(path: Path) -> Iterator[_Piece]:
    try:
        with path.open("rb") as raw:
            size = max(1, path.stat().st_size)
            for first, lines in grouped(_lines(_decompressed(raw, path), raw, path), 1):
                # A decompressor closes the file at its end.
                yield first, lines, len(lines), 1.0 if raw.closed else min(1.0, raw.tell() / size)
    except OSError as error:
        raise UserError(f"source {path} cannot be read: {error.strerror or error}; is it complete?") from error


def _decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    if path.suffix == ".jsonl":
        return raw
    import pyarrow

    codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, codec), 2**20)


def _lines(stream: io.BufferedIOBase, raw: io.BufferedReader, path: Path) -> Iterator[bytes]:
    # Bytes, so that only \n ends a line (a text may hold U+2028) and a wrong encoding is named with its line.
    unpacked, packed = 0, 0
    while line := stream.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            unpacked += len(line)
            line = stream.readline(MAX_LINE + 1)
        unpacked += len(line)
        packed = packed if raw.closed else max(packed, raw.tell())  # a decompressor closes the file at its end
        if unpacked > max(_FREE, _MOST_UNPACKED * packed):
            raise UserError(
                f"source {path}: unpacks to more than {_MOST_UNPACKED} times its size, as no text does: unpack it "
                "yourself if it is what you want"
            )


def parquet_chunks(path: Path) -> Iterator[_Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            rows, total = 0, max(1, file.metadata.num_rows)
            for table in _tables(file.iter_batches(batch_size=_PARQUET_ROWS, use_threads=False)):
                count = table.num_rows
                yield rows + 1, table, count, (rows + count) / total
                rows += count
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"source {path} cannot be read as Parquet: {error}; download or write it again") from error


def _tables(batches: "Iterable[pyarrow.RecordBatch]") -> "Iterator[pyarrow.Table]":
    """Batches put together to groups of bounded number and size."""
    import pyarrow

    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if sum(len(b) for b in group) >= ROWS or sum(b.nbytes for b in group) >= _BYTES:
            yield pyarrow.Table.from_batches(group)
            group = []
    if group:
        yield pyarrow.Table.from_batches(group)


def grouped(rows: Iterable[Any], first: int) -> Iterator[tuple[int, list[Any]]]:
    """(number of the first, rows) in groups of bounded number and size."""
    group: list[Any] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row) if isinstance(row, bytes) else 0
        if len(group) == ROWS or size >= _BYTES:
            yield first, group
            first, group, size = first + len(group), [], 0
    if group:
        yield first, group


def to_arrow(rows: "pyarrow.Table | pyarrow.RecordBatch") -> bytes:
    # Pickling a slice would send the whole table along.
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        writer.write(rows)
    return sink.getvalue().to_pybytes()


def _table(stream: bytes) -> "pyarrow.Table":
    import pyarrow

    return pyarrow.ipc.open_stream(stream).read_all()


def _from_arrow(stream: bytes) -> list[dict[str, Any] | UnicodeDecodeError]:
    table = _table(stream)
    try:
        return table.to_pylist()
    except UnicodeDecodeError:  # Arrow checks no text when it reads
        return [_row(table.slice(number, 1)) for number in range(len(table))]


def _row(table: "pyarrow.Table") -> dict[str, Any] | UnicodeDecodeError:
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error
