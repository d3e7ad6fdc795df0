"""`laser-dist prepare --check`: everything that a manifest claims, against what is there; every defect is named."""

import hashlib
import io
import sys
import tarfile
from array import array
from functools import partial
from pathlib import Path
from typing import NamedTuple

from laser_dist.data.manifest import LARGEST, MANIFEST, Manifest, Shard, parse_manifest
from laser_dist.data.preparation.console import Bar
from laser_dist.data.preparation.convert import query_id_key
from laser_dist.data.preparation.keyset import KeySet
from laser_dist.data.preparation.lengths import Lengths, measure
from laser_dist.data.preparation.parallel import ordered_map
from laser_dist.data.schema import decode_example
from laser_dist.errors import UserError
from laser_dist.reading import read_file

_MOST_TOO_LONG = 64 * 2**20  # bytes that a file may have too many, and its members still be looked at


class Verified(NamedTuple):
    """What a shard was found to hold."""

    defects: list[str]
    ids: array  # uint64 key of every query id
    without_rationale: int
    lengths: Lengths


def check_folder(folder: Path, workers: int) -> int:
    """Print every defect; 0 if there is none, 1 otherwise. UserError if there is no manifest to check against."""
    path = Path(folder) / MANIFEST
    try:
        manifest = parse_manifest(read_file(path, LARGEST), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {folder} holds no complete set of shards") from None
    defects, bad, total, without, lengths, seen = [], 0, 0, 0, Lengths(), KeySet()
    with Bar("checking", [1]) as bar:
        verify = partial(verify_shard, Path(folder))
        tasks = list(zip(manifest.shards, _firsts(manifest), strict=True))
        for shard, found in zip(manifest.shards, ordered_map(verify, tasks, workers=workers), strict=True):
            repeated = sum(not seen.add(key) for key in found.ids)
            found.defects.extend([f"{shard.name}: {repeated} query ids occur before"] if repeated else [])
            defects += found.defects
            bad += bool(found.defects)
            without += found.without_rationale
            lengths.merge(found.lengths)
            total += shard.examples
            bar.share = total / manifest.examples
            bar.advance(shard.examples)
    defects += _check_files(Path(folder), manifest)
    if not bad:
        defects += _check_totals(manifest, without, lengths)
    if defects:
        print("\n".join(f"{folder}/{defect}" for defect in defects))
        print(f"{len(defects)} defects; {bad} of {len(manifest.shards)} shards are damaged", file=sys.stderr)
        return 1
    print(f"{folder}: {manifest.examples:,} examples in {len(manifest.shards)} shards, all as written")
    return 0


def verify_shard(folder: Path, task: tuple[Shard, int]) -> Verified:
    """Check size, hash, members, offsets and every row of a shard whose first example has this index."""
    shard, first = task
    found = Verified([], array("Q"), 0, Lengths())
    try:
        content = read_file(folder / shard.name, shard.bytes + _MOST_TOO_LONG)
    except OSError as error:
        found.defects.append(f"{shard.name}: cannot be read ({error.strerror})")
        return found
    if len(content) != shard.bytes:
        found.defects.append(f"{shard.name}: {len(content):,} bytes, the manifest says {shard.bytes:,}")
    elif hashlib.sha256(content).hexdigest() != shard.sha256:
        found.defects.append(f"{shard.name}: sha256 differs from the manifest's")
    members = _members(content, shard.name, found.defects)
    if len(members) != shard.examples:
        found.defects.append(f"{shard.name}: {len(members)} examples, the manifest says {shard.examples}")
    offsets = [offset for offset, _, _ in members]
    if shard.offsets and offsets != list(shard.offsets)[:-1]:
        found.defects.append(f"{shard.name}: examples lie elsewhere than the manifest's offsets say")
    without = 0
    for index, (_, name, text) in enumerate(members, first):
        where = f"{shard.name}: {name}"
        if name != f"{index:09d}.json":
            found.defects.append(f"{where}: the name should be {index:09d}.json")
            continue
        try:
            example = decode_example(text, where)
        except UserError as error:
            found.defects.append(str(error))
            continue
        found.ids.append(query_id_key(example.query_id))
        found.lengths.add(measure(example))
        without += not example.rationale
    return found._replace(without_rationale=without)


def _members(content: bytes, name: str, defects: list[str]) -> list[tuple[int, str, bytes]]:
    """(offset of the header, name, content) of every member up to the first that is damaged. Nothing is decoded."""
    members = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                text = file.read() if file else b""
                if file is None or len(text) != member.size:
                    defects.append(f"{name}: {member.name}: is cut off, or no plain file")
                    break
                members.append((member.offset, member.name, text))
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        defects.append(f"{name}: no readable tar file behind {len(members)} members ({error})")
    return members


def _firsts(manifest: Manifest) -> list[int]:
    firsts, first = [], 0
    for shard in manifest.shards:
        firsts.append(first)
        first += shard.examples
    return firsts


def _check_files(folder: Path, manifest: Manifest) -> list[str]:
    """Defects of the other files: those that are listed and wrong, and those that nobody listed."""
    from laser_dist.data.preparation.dev import CORPUS, QRELS, QUERIES
    from laser_dist.retrieval.collection import read_collection

    defects = []
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file():
            defects.append(f"{name}: is missing")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            defects.append(f"{name}: sha256 differs from the manifest's")
    known = {MANIFEST, *manifest.files, *(shard.name for shard in manifest.shards)}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    defects += [f"{name}: is not in the manifest" for name in sorted(present - known)]
    if manifest.dev and not defects:
        try:
            corpus, queries, _ = read_collection(*(folder / name for name in (CORPUS, QUERIES, QRELS)))
        except UserError as error:
            return [f"dev: {error}"]
        if (len(queries), len(corpus)) != (manifest.dev.queries, manifest.dev.passages):
            defects.append(f"dev: {len(queries)} queries and {len(corpus)} passages are not what the manifest says")
    return defects


def _check_totals(manifest: Manifest, without: int, lengths: Lengths) -> list[str]:
    defects = []
    if without != manifest.without_rationale:
        defects.append(f"{MANIFEST}: {without} examples lack a rationale, not {manifest.without_rationale}")
    claimed = {
        field: {unit: values for unit, values in units.items() if unit != "tokens"}
        for field, units in manifest.lengths.items()
    }
    if claimed and claimed != lengths.summary():
        defects.append(f"{MANIFEST}: the lengths are not those of the examples")
    by_source = [0] * len(manifest.sources)
    for shard in manifest.shards:
        by_source[shard.source] += shard.examples
    if by_source != [source.examples for source in manifest.sources]:
        defects.append(f"{MANIFEST}: the examples of the sources are not those of their shards")
    return defects
