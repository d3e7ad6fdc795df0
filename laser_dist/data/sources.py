"""Where rows come from: JSON lines, Parquet, a saved `datasets` folder, or a dataset on the hub."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from laser_dist.data.schema import decode_row
from laser_dist.errors import UserError

_FORMS = "a .jsonl file, a .parquet file or folder, a folder written by save_to_disk, or a hub id such as org/name"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SAVED = {"dataset_info.json", "dataset_dict.json"}


def read_source(path_or_id: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, row): `where` is file and line (or row, from 1); `row` is not validated yet. Raises UserError."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        yield from _read_folder(path)
    elif path.suffix == ".jsonl" and path.is_file():
        yield from _read_jsonl(path)
    elif path.suffix == ".parquet" and path.is_file():
        yield from _read_parquet(path)
    elif path.exists():
        raise UserError(f"source {path_or_id}: this kind of file is not read; give {_FORMS}")
    elif _looks_like_file(path_or_id):
        raise UserError(f"source {path_or_id} does not exist (looked in {Path.cwd()}); give {_FORMS}")
    else:
        yield from _read_hub(path_or_id)


def _looks_like_file(name: str) -> bool:
    known = Path(name).suffix in {".jsonl", ".parquet", ".json", ".csv", ".tsv", ".txt", ".tar", ".gz", ".zst"}
    return known or not _HUB_ID.fullmatch(name)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    # Bytes, so that only \n ends a line (a text may hold U+2028) and a wrong encoding is named with its line.
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, decode_row(line, where)
    except OSError as error:
        raise UserError(f"source {path} cannot be read: {error.strerror}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256)
            yield from _numbered(str(path), (row for batch in batches for row in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"source {path} cannot be read as Parquet: {error}; download or write it again") from error


def _read_folder(path: Path) -> Iterator[tuple[str, Any]]:
    if any((path / name).is_file() for name in _SAVED):
        yield from _read_saved(path)
    elif files := sorted(path.rglob("*.parquet")):
        for file in files:
            yield from _read_parquet(file)
    elif (path / "manifest.json").is_file():
        raise UserError(f"source {path} already holds prepared shards: train on it with --data.train {path}")
    else:
        raise UserError(f"source {path} is a folder without .parquet files; give {_FORMS}")


def _read_saved(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"source {path} cannot be loaded with datasets.load_from_disk: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            splits = ", ".join(dataset)
            raise UserError(f"source {path} has the splits {splits} but no train: give {path}/SPLIT instead")
        dataset = dataset["train"]
    yield from _numbered(str(path), dataset)


def _read_hub(name: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        yield from _numbered(name, datasets.load_dataset(name, split="train", streaming=True))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f'source "{name}" is no file here, and the hub dataset of that name cannot be read: '
            f"{type(error).__name__}: {error}; check the spelling and the connection, or give {_FORMS}"
        ) from error


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", row
