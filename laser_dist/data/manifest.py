"""manifest.json: what a folder of shards holds, and the only thing a reader trusts about it.

Version 2 adds where every example of a shard lies (`Shard.offsets`), where the rows came from, under which licence and
how they were prepared, and how long the texts are. Version 1 folders are read as before; they lack these.
"""

import dataclasses
import json
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError
from laser_dist.reading import decode_json

MANIFEST = "manifest.json"
VERSION = 2
LARGEST = 256 * 2**20  # bytes of a manifest that are read: about twenty million examples
_SHA256 = re.compile("[0-9a-f]{64}")
_FILE_NAME = re.compile(r"(?!\.\.?$)[^\x00-\x1f/\\:?#\ud800-\udfff]+")  # also as the end of an address
AGAIN = "write the folder again with `laser-dist prepare`"


def _no_offsets() -> array:
    return array("q")


@dataclass(frozen=True)
class Shard:
    """One tar file of the set. All its examples come from one source."""

    name: str
    examples: int
    bytes: int
    sha256: str
    source: int = 0  # index into Manifest.sources
    # (examples + 1,) int64 - example i lies in bytes offsets[i] .. offsets[i+1] - 1 of the file: a tar header of 512
    # bytes, the JSON text, and zeros up to a multiple of 512. Empty in version 1.
    offsets: array = field(default_factory=_no_offsets, hash=False, repr=False)


@dataclass(frozen=True)
class Source:
    """Where rows came from."""

    name: str  # path or hub id, as it was given
    rows: int = 0  # rows read, good or bad
    examples: int = 0  # rows that became training examples
    layout: str = ""
    sha256: str = ""  # of the file, or of the sorted "sha256  name" lines of a folder's files
    revision: str = ""  # commit of a hub dataset
    licence: str = ""
    weight: float = 1.0  # relative share of this source in training


@dataclass(frozen=True)
class DevSplit:
    """The held-out queries, as a collection for `laser-dist evaluate` in the folder dev/."""

    queries: int
    passages: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds."""

    examples: int
    without_rationale: int
    shards: tuple[Shard, ...]
    sources: tuple[Source, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows left out when the shards were written
    dev: DevSplit | None = None
    files: dict[str, str] = field(default_factory=dict)  # other files of the folder -> sha256
    lengths: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # see data.lengths
    settings: dict[str, Any] = field(default_factory=dict)  # what `prepare` was told
    created_with: str = ""
    version: int = VERSION

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def source(self) -> str:
        """The names of all sources, separated by commas."""
        return ", ".join(source.name for source in self.sources)


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON text; one line per shard, whose offsets would otherwise take a line each."""
    table = dataclasses.asdict(manifest)
    shards = ",\n    ".join(json.dumps(shard, default=list) for shard in table.pop("shards"))
    head = json.dumps(table, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n  "shards": [\n    {shards}\n  ]\n}}\n'.encode()


def parse_manifest(raw: bytes, path: Path | str) -> Manifest:
    """The manifest in `raw`, which was read from `path`. Raises UserError if it is damaged or of another version.

    Only what it says is checked, not the files it speaks of.
    """
    try:
        table = decode_json(raw)
        if (version := table.get("version")) not in (1, VERSION):
            raise UserError(f"{path} has version {version!r}, this program reads 1 and {VERSION}: {AGAIN}")
        if version == 1:
            table["sources"] = [{"name": table.pop("source"), "examples": table["examples"]}]
        table["shards"] = tuple(_shard(**shard) for shard in table["shards"])
        table["sources"] = tuple(Source(**source) for source in table["sources"])
        table["dev"] = DevSplit(**table["dev"]) if table.get("dev") else None
        manifest = Manifest(**table)
        _check_consistent(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {AGAIN}") from None
    return manifest


def _shard(offsets: list[int] | tuple[()] = (), **values: Any) -> Shard:
    return Shard(**values, offsets=array("q", offsets))


def _check_consistent(manifest: Manifest) -> None:
    if not manifest.shards or manifest.examples != sum(shard.examples for shard in manifest.shards):
        raise ValueError("its counts do not add up")
    for shard in manifest.shards:
        # A manifest is input like any other: it must not lead out of its folder.
        if shard.name != Path(shard.name).name or not _FILE_NAME.fullmatch(shard.name):
            raise ValueError(f"{shard.name!r} is not a file name")
        if not (type(shard.bytes) is type(shard.examples) is int and shard.bytes >= 0 < shard.examples):
            raise ValueError(f"{shard.name} has {shard.bytes!r} bytes and {shard.examples!r} examples")
        if not _SHA256.fullmatch(shard.sha256):  # names the copy in the cache
            raise ValueError(f"{shard.sha256!r} is not a sha256")
        if not 0 <= shard.source < len(manifest.sources):
            raise ValueError(f"{shard.name} names source {shard.source}, which is not listed")
        positions = shard.offsets
        ascending = all(a < b for a, b in zip(positions, positions[1:], strict=False))
        if manifest.version > 1 and not (
            len(positions) == shard.examples + 1 and ascending and 0 <= positions[0] and positions[-1] <= shard.bytes
        ):
            raise ValueError(f"the offsets of {shard.name} do not fit its examples and bytes")
    if outside := [n for n in manifest.files if "\0" in n or Path(n).is_absolute() or ".." in Path(n).parts]:
        raise ValueError(f"{outside[0]!r} does not lie in the folder")
