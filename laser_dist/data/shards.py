"""WebDataset shards and their manifest: written as a whole or not at all, and read only if every byte is as written.

End-of-file is no evidence with tar: most damage shortens or alters a shard without an error. Counts, sizes and hashes
therefore come from the manifest, and are checked before a row is used.
"""

import io
import re
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

from laser_dist.data.manifest import AGAIN, LARGEST, MANIFEST, Manifest, Shard, Source, parse_manifest
from laser_dist.data.preparation.partial import PartialSet
from laser_dist.data.schema import Example, encode_example
from laser_dist.data.streaming.store import Store, open_store
from laser_dist.errors import UserError
from laser_dist.redaction import shown

_OCTAL = re.compile(rb"[0-7]{11}")
_BLOCK = 512  # bytes: tar headers are one, contents are filled up to a multiple


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
    # A header that no other call has: what a killed call left behind is thrown away, not continued.
    partial = PartialSet(out, {"once": time.time_ns()}, overwrite=overwrite)
    counted = _Counted(examples)
    try:
        remaining, written = iter(counted), 0
        while texts := [encode_example(example) for example in islice(remaining, shard_examples)]:
            partial.commit(texts, {}, source=0, examples=written)
            written += len(texts)
        if not written:
            raise UserError(f"no example to write to {out}: the source is empty, or every row was dropped")
        origin = Source(source, rows=counted.examples, examples=counted.examples)
        shards = tuple(partial.shards)
        manifest = Manifest(counted.examples, counted.without_rationale, shards, (origin,), dict(dropped or {}))
        partial.publish(manifest)
    except OSError as error:
        raise UserError(f"cannot write shards to {out}: {error}") from error
    finally:
        partial.discard()
    return manifest


def load_manifest(folder: str | Path | Store, *, check_files: bool = True) -> Manifest:
    """The manifest of a folder or address, after checking that every shard is there at its full length.

    Raises UserError. Shards of a remote store are checked when they are fetched, without `check_files` when read.
    """
    store = open_store(folder)
    place = store.locate(MANIFEST)
    try:
        raw = store.read(MANIFEST, LARGEST)
    except FileNotFoundError:
        raise UserError(f"{place} does not exist: this is not a complete set of shards; {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror}): {AGAIN}") from None
    manifest = parse_manifest(raw, place)
    for shard in manifest.shards if check_files else ():
        file = store.locate(shard.name)
        try:
            size = store.size(shard.name)
        except OSError as error:
            raise UserError(f"shard {file} is missing ({error.strerror}): {AGAIN}") from None
        if size is not None and size != shard.bytes:
            raise UserError(f"shard {file} has {size:,} bytes, the manifest says {shard.bytes:,}: {AGAIN}")
    return manifest


def read_shard(folder: str | Path | Store, shard: Shard) -> list[bytes]:
    """The JSON text of every example of a shard, in order. Raises UserError unless all of it is as written."""
    return [text for _, text in read_members(folder, shard)]


def read_members(folder: str | Path | Store, shard: Shard) -> list[tuple[str, bytes]]:
    """Name and JSON text of every example of a shard, in order. Raises UserError unless all of it is as written.

    Nothing is decoded here: stock decoders run pickles. Any member but .json is refused.
    """
    store = open_store(folder)
    place = store.locate(shard.name)
    content = store.read_verified(shard)
    members = _members_at(content, shard.offsets) or _scan(content, place)
    if len(members) != shard.examples:
        again = "copy it again, or write the folder again with `laser-dist prepare --overwrite`"
        raise UserError(f"shard {place} holds {len(members)} examples, the manifest says {shard.examples}: {again}")
    return members


def _scan(content: bytes, place: str) -> list[tuple[str, bytes]]:
    """The members in the order of the archive. Raises UserError for any that is not a plain .json file.

    WebDataset's own reader unpacks gzip, bzip2 and xz wherever it finds them, fills the holes of sparse members, and
    passes over links without a word: a small shard could take any amount of memory, or be short of rows.
    """
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                if reason := _refusal(member, members):
                    raise UserError(f"shard {place}: {shown(member.name)} is refused: {reason}")
                file = tar.extractfile(member)
                members[member.name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        again = "copy it again, or write the folder again with `laser-dist prepare --overwrite`"
        raise UserError(f"shard {place} is not a readable tar file ({error}): {again}") from None
    return list(members.items())


def _refusal(member: tarfile.TarInfo, before: dict[str, bytes]) -> str:
    """Why a member of an archive is not read; "" if it is."""
    if not member.isreg() or member.issparse():
        return "it is a link, a device, a folder or has holes; only plain files are read"
    if "/" in member.name:
        return "members lie in no folder"
    if not member.name.endswith(".json") or member.name.count(".") != 1:
        return "only .json members are read"
    return "its name occurs twice" if member.name in before else ""


def _members_at(content: bytes, offsets: Sequence[int]) -> list[tuple[str, bytes]]:
    """The members where the manifest says they lie, several times faster than a scan of the archive.

    [] unless each place holds exactly one plain .json member and nothing follows: a scan then says what is wrong.
    """
    members = []
    for start, end in pairwise(offsets):
        header = content[start : start + _BLOCK]
        name, size = header[:100].rstrip(b"\0"), header[124:135]
        fits = name.endswith(b".json") and name.count(b".") == 1 and b"/" not in name and header[156:157] == b"0"
        if not (fits and _OCTAL.fullmatch(size) and -(-int(size, 8) // _BLOCK) * _BLOCK == end - start - _BLOCK):
            return []
        members.append((name.decode("ascii", "replace"), content[start + _BLOCK : start + _BLOCK + int(size, 8)]))
    return members if members and not content[offsets[-1] :].strip(b"\0") else []


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
