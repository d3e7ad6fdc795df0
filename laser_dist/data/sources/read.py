"""Where rows come from: JSON lines, Parquet, a saved `datasets` folder, a BEIR folder, or a dataset on the hub.

A source gives its rows in chunks, undecoded where that is possible: decoding is the work of `prepare`'s processes. It
can start at any row, and says what identifies its content. Nothing in a source is unpickled or executed.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from laser_dist.data.schema import Example, parse_example
from laser_dist.data.sources.chunks import Chunk, line_chunks, parquet_chunks, to_arrow
from laser_dist.data.sources.layouts import RowForm
from laser_dist.errors import UserError
from laser_dist.files import sha256

FORMS = (
    "a .jsonl (.gz, .zst) or .parquet file, a folder of such files, a folder written by save_to_disk, "
    "a BEIR folder, or a hub id such as org/name"
)
SHOWN = 5  # defects named before giving up: enough to mend several at once, few enough to read
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_SAVED = {"dataset_info.json", "dataset_dict.json", "state.json"}


class Origin(Protocol):
    """An opened source."""

    @property
    def name(self) -> str:
        """Path or hub id, as it was given."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold the content, if it is here."""

    def chunks(self, skip: int = 0) -> Iterator[Chunk]:
        """All rows behind the first `skip`, in order; blank lines count as rows. Raises UserError."""

    def identity(self) -> dict[str, str]:
        """What tells whether the content is the same: sha256, or revision. Raises UserError."""

    def licence(self) -> str:
        """The licence that the source itself names, or ""."""


def open_source(name: str, form: RowForm | None = None) -> Origin:
    """The source of this name, not read yet. Raises UserError if there is none."""
    from laser_dist.data.sources.beir import Beir, is_beir
    from laser_dist.data.sources.hub import Hub

    form = form or RowForm()
    path = Path(name).expanduser()
    if form.layout == "beir" or (form.layout == "auto" and path.is_dir() and is_beir(path)):
        return Beir(name, path, form)
    if path.is_dir():
        return _open_folder(name, path)
    if path.is_file() and (path.name.endswith(_JSONL) or path.suffix == ".parquet"):
        return Files(name, (path,))
    if path.exists():
        raise UserError(f"source {name}: this kind of file is not read; give {FORMS}")
    if _looks_like_file(name):
        raise UserError(f"source {name} does not exist (looked in {Path.cwd()}); give {FORMS}")
    return Hub(name)


def read_examples(source: str, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any], Example]]:
    """Yield (where, row, example) of the first `limit` rows.

    After a defect nothing more is yielded; the UserError at the end names up to five.
    """
    defects: list[str] = []
    for where, row in islice(read_source(source), limit):
        try:
            example = parse_example(row, where)
        except UserError as error:
            defects.append(str(error))
            if len(defects) == SHOWN:
                defects.append("(stopped here; there may be more)")
                break
            continue
        if not defects:
            yield where, row, example
    if defects:
        raise UserError("\n".join(defects))


def read_source(path_or_id: str, form: RowForm | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (where, row): `where` is file and line (or row, from 1); `row` is not validated yet. Raises UserError."""
    form = form or RowForm()
    for chunk in open_source(path_or_id, form).chunks():
        for number, row in chunk.decoded():
            if isinstance(row, UserError):
                raise row
            yield f"{chunk.file}:{number}", row


def _open_folder(name: str, path: Path) -> Origin:
    from laser_dist.data.sources.hub import Saved

    if any((path / known).is_file() for known in _SAVED):
        return Saved(name, path)
    if (path / "manifest.json").is_file():
        raise UserError(f"source {name} already holds prepared shards: train on it with --data.train {name}")
    for pattern in ("*.parquet", *(f"*{suffix}" for suffix in _JSONL)):
        if files := tuple(sorted(path.rglob(pattern))):
            if {"corpus.jsonl", "queries.jsonl"} <= {file.name for file in files}:
                raise UserError(
                    f"source {name} holds a corpus and queries, but no qrels/train.tsv (or train_qrels.tsv), which "
                    "says what to train on: add it, or give the file with the training rows itself"
                )
            return Files(name, files)
    raise UserError(f"source {name} is a folder without rows; give {FORMS}")


def _looks_like_file(name: str) -> bool:
    known = Path(name).suffix in {".jsonl", ".parquet", ".json", ".csv", ".tsv", ".txt", ".tar", ".gz", ".zst"}
    return known or not _HUB_ID.fullmatch(name)


@dataclass(frozen=True)
class Files:
    """JSON lines or Parquet, one file or the files of a folder in the order of their names."""

    name: str
    files: tuple[Path, ...]

    def chunks(self, skip: int = 0) -> Iterator[Chunk]:
        sizes = [file.stat().st_size for file in self.files]
        total, before = max(1, sum(sizes)), 0
        for file, size in zip(self.files, sizes, strict=True):
            read = parquet_chunks if file.suffix == ".parquet" else line_chunks
            for first, rows, count, share in read(file):
                if skip >= count:
                    skip -= count
                    continue
                rest = rows[skip:] if isinstance(rows, list) else to_arrow(rows.slice(skip))
                yield Chunk(str(file), first + skip, rest, (before + share * size) / total)
                skip = 0
            before += size

    def identity(self) -> dict[str, str]:
        return {"sha256": hash_files(self.files)}

    def licence(self) -> str:
        return card_licence(self.files[0].parent / "README.md")


def hash_files(files: Iterable[Path]) -> str:
    """sha256 of a file; of several, that of the lines `sha256  name`. Raises UserError."""
    lines = []
    for path in files:
        try:
            lines.append((sha256(path), path.name))
        except OSError as error:
            raise UserError(f"source {path} cannot be read: {error.strerror}") from error
    if len(lines) == 1:
        return lines[0][0]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in lines).encode()).hexdigest()


def card_licence(card: Path) -> str:
    """`license:` of a dataset card's front matter."""
    try:
        with card.open(encoding="utf-8") as file:
            front = file.read(65536).partition("\n---")[0]
    except (OSError, UnicodeDecodeError):
        return ""
    found = re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", front, re.MULTILINE) if front.startswith("---") else None
    return found[1] if found else ""
