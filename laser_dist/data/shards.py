"""WebDataset shards and their manifest: written as a whole or not at all, and read only if every byte is as written.

End-of-file is no evidence with tar: most damage shortens or alters a shard without an error. Counts, sizes and hashes
therefore come from the manifest, and are checked before a row is used.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from laser_dist.batch import Example
from laser_dist.data.schema import example_to_row
from laser_dist.errors import UserError
from laser_dist.files import sync_folder

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar file of the set."""

    name: str
    examples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds."""

    source: str
    examples: int
    without_rationale: int
    shards: tuple[Shard, ...]
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows left out when the shards were written
    version: int = VERSION

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def write_shards(
    examples: Iterable[Example],
    out: Path,
    *,
    source: str,
    shard_examples: int = 1000,
    overwrite: bool = False,
    dropped: dict[str, int] | None = None,
) -> Manifest:
    """Write shards and manifest to the folder `out`, which appears only when all of it is on disk.

    The same examples give the same bytes. `dropped` is read after the last example. Raises UserError if `out` is
    occupied, an id repeats, or there is no example; whatever is raised, nothing is left behind.
    """
    out = Path(out).absolute()
    _check_target(out, overwrite)
    partial, old = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "old"))
    try:
        for stale in (partial, old):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        counted = _Counted(examples)
        shards = tuple(_write_all(counted, partial, shard_examples))
        if not shards:
            raise UserError(f"no example to write to {out}: the source is empty, or every row was dropped")
        manifest = Manifest(source, counted.examples, counted.without_rationale, shards, dict(dropped or {}))
        _write_durably(partial / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2).encode() + b"\n")
        sync_folder(partial)
        if out.is_dir() and any(out.iterdir()):
            out.rename(old)
        partial.rename(out)
        sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write shards to {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, after checking that every shard is there at its full length. Raises UserError."""
    path = Path(folder) / MANIFEST
    again = "write the folder again with `laser-dist prepare`"
    try:
        table = json.loads(path.read_bytes())
        if (version := table.get("version")) != VERSION:
            raise UserError(f"{path} has version {version!r}, this program reads {VERSION}: {again}")
        manifest = Manifest(**table | {"shards": tuple(Shard(**shard) for shard in table["shards"])})
        if not manifest.shards or manifest.examples != sum(shard.examples for shard in manifest.shards):
            raise ValueError("its counts do not add up")
        # A manifest is input like any other: it must not lead out of its folder.
        if outside := [shard.name for shard in manifest.shards if shard.name != Path(shard.name).name]:
            raise ValueError(f"{outside[0]!r} is not a file name")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {folder} is not a complete set of shards; {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {again}") from None
    for shard in manifest.shards:
        file = path.with_name(shard.name)
        if not file.is_file():
            raise UserError(f"shard {file} is missing: {again}")
        if (size := file.stat().st_size) != shard.bytes:
            raise UserError(f"shard {file} has {size:,} bytes, the manifest says {shard.bytes:,}: {again}")
    return manifest


def read_shard(folder: Path, shard: Shard) -> list[bytes]:
    """The JSON text of every example of a shard, in order. Raises UserError unless all of it is as written.

    Nothing is decoded here: stock decoders run pickles. Any member but .json is refused.
    """
    path = Path(folder) / shard.name
    again = "copy it again, or write the folder again with `laser-dist prepare --overwrite`"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({error.strerror}): {again}") from None
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise UserError(f"shard {path} is damaged: its sha256 differs from the manifest's; {again}")
    stream = {"url": shard.name, "stream": io.BytesIO(content)}
    try:
        samples = list(group_by_keys(tar_file_expander([stream])))
    except Exception as error:  # tarfile and zlib raise many kinds
        raise UserError(f"shard {path} is not a readable tar file ({error}): {again}") from None
    for sample in samples:
        if other := sample.keys() - {"__key__", "__url__", "json"}:
            raise UserError(f"shard {path}: {sample['__key__']}.{min(other)} is refused: only .json members are read")
    if len(samples) != shard.examples:
        raise UserError(f"shard {path} holds {len(samples)} examples, the manifest says {shard.examples}: {again}")
    return [sample["json"] for sample in samples]


class _Counted:
    """Passes examples on; counts them and refuses an id that repeats."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._source = examples
        self.examples = self.without_rationale = 0

    def __iter__(self) -> Iterator[Example]:
        seen: dict[str, int] = {}
        for example in self._source:
            self.examples += 1
            self.without_rationale += not example.rationale
            first = seen.setdefault(example.query_id, self.examples)
            if first != self.examples:
                raise UserError(
                    f'query_id "{example.query_id}" repeats: examples {first} and {self.examples}; ids must be unique'
                )
            yield example


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: give a folder")
    if any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is not empty: choose another folder, or replace it with --overwrite")
        if not (out / MANIFEST).is_file():
            raise UserError(f"{out} holds no shards but other files, which --overwrite would delete: empty it yourself")


def _write_all(examples: Iterable[Example], folder: Path, shard_examples: int) -> Iterator[Shard]:
    remaining, first, number = iter(examples), 0, 0
    while chunk := list(islice(remaining, shard_examples)):
        yield _write_shard(folder / f"shard-{number:06d}.tar", first, chunk)
        first, number = first + len(chunk), number + 1


def _write_shard(path: Path, first: int, chunk: list[Example]) -> Shard:
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0, user="", group="") as writer:
        for index, example in enumerate(chunk, first):
            text = json.dumps(example_to_row(example), ensure_ascii=False, separators=(",", ":"))
            writer.write({"__key__": f"{index:09d}", "json": text.encode()})
    content = buffer.getvalue()
    _write_durably(path, content)
    return Shard(path.name, len(chunk), len(content), hashlib.sha256(content).hexdigest())


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
