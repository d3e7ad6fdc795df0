"""`laser-dist bench damage`: shards damaged in the ways that disks, copies and uploads damage them, and who notices.

1. Each kind of damage is done to one shard of a set, which is then read by a stock WebDataset pipeline and as training
reads it: did the reader complain before a wrong row came out, how many rows were lost or altered without a word?
2. The same for what happens after a first look: a file that changes between two epochs, a cached copy that rots.
3. What noticing costs: the loader with and without its hashes, in alternating rounds.
"""

import io
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laser_dist.bench.damage_cost import cost
from laser_dist.errors import UserError
from laser_dist.files import write_json

HELP = """Damage shards in 14 ways, read them with this package and with WebDataset, and measure what checking costs.

Examples:
  laser-dist bench damage
  laser-dist bench damage --rounds 9 --examples 2000 --out damage.json
"""
SHARD = 1  # the one that is damaged; not the first, so that readers have begun
Damage = Callable[[Path, list[Path], list[int]], object]  # shard, all shards, offsets of its members


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str | None = None
    """Hub id or folder of the tokenizer for the costs; unset: the quickstart's backbone, or else no costs."""
    examples: int = 400
    """Examples of the paper's lengths, in shards of 100, for the costs."""
    rounds: int = 7
    """Passes with and without hashes each, in alternating order."""
    workers: int = 1
    """Loader processes."""
    out: Path | None = None
    """Also write the result to this JSON file."""

    def validate(self) -> None:
        """Raises UserError for values that nothing could be measured with."""
        for name, least in (("examples", 100), ("rounds", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True)
class Reading:
    """What came of reading a damaged set."""

    damage: str
    reader: str
    noticed: str  # the complaint, "" if there was none
    lost: int  # rows that should have come and did not, without a complaint
    altered: int  # rows that came out with other bytes than were written
    first_wrong: bool  # a wrong row came out before any complaint


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns 1 if a wrong row came out of our reader, else 0."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench damage", description=HELP)
    settings.validate()
    with tempfile.TemporaryDirectory(prefix="laser-dist-bench-") as scratch:
        readings = read_all(Path(scratch))
        found: dict[str, Any] = {"readings": [asdict(reading) for reading in readings]}
        found["later"] = later(Path(scratch))
        found["cost"] = cost(settings.model, settings.examples, settings.rounds, settings.workers, Path(scratch))
    show(readings, found)
    if settings.out is not None:
        write_json(settings.out, found | {"settings": asdict(settings) | {"out": str(settings.out)}})
    ours = [reading for reading in readings if reading.reader == "ours"]
    return int(any(reading.first_wrong or not reading.noticed for reading in ours) or not all(found["later"].values()))


# --- damage ----------------------------------------------------------------------------------------------------------


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _cut(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:at])


def _zero(path: Path, at: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes(1024) + content[at + 1024 :])


def _swap(path: Path, other: Path) -> None:
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def _add_member(path: Path) -> None:
    with tarfile.open(path, mode="a:") as archive:
        info = tarfile.TarInfo("999999999.json")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"{}"))


def _rewrite(path: Path, at: int) -> None:
    """Another word in a text, header and JSON as valid as before."""
    content = bytearray(path.read_bytes())
    place = content.index(b"row", at)
    content[place : place + 3] = b"owr"
    path.write_bytes(content)


# The first eight are those that stock readers were tried with; `middle` is where the middle member's header begins.
DAMAGES: dict[str, Damage] = {
    "cut between members": lambda path, all_, offsets: _cut(path, offsets[len(offsets) // 2]),
    "cut in a header": lambda path, all_, offsets: _cut(path, offsets[len(offsets) // 2] + 100),
    "cut in a payload": lambda path, all_, offsets: _cut(path, offsets[len(offsets) // 2] + 512 + 40),
    "cut in the last payload": lambda path, all_, offsets: _cut(path, offsets[-1] + 512 + 40),
    "a bit in an early header": lambda path, all_, offsets: _flip(path, offsets[1] + 3),
    "a bit in a middle header": lambda path, all_, offsets: _flip(path, offsets[len(offsets) // 2] + 3),
    "1 KiB of zeros": lambda path, all_, offsets: _zero(path, offsets[len(offsets) // 2]),
    "a bit in a payload": lambda path, all_, offsets: _flip(path, offsets[len(offsets) // 2] + 512 + 20),
    "a word in a payload": lambda path, all_, offsets: _rewrite(path, offsets[len(offsets) // 2] + 512),
    "empty": lambda path, all_, offsets: path.write_bytes(b""),
    "missing": lambda path, all_, offsets: path.unlink(),
    "a member too many": lambda path, all_, offsets: _add_member(path),
    "another shard's content": lambda path, all_, offsets: path.write_bytes(all_[0].read_bytes()),
    "swapped with another shard": lambda path, all_, offsets: _swap(path, all_[0]),
}


def make_set(folder: Path, examples: int = 300) -> list[Path]:
    """Shards of 100 short examples; the paths in order."""
    from laser_dist.data.schema import Example, Passage
    from laser_dist.data.shards import write_shards

    rows = (
        Example(f"q{n}", f"query {n}", f"thought of row {n}", (Passage(f"p{n}", f"text of row {n} " * 9),), ())
        for n in range(examples)
    )
    manifest = write_shards(rows, folder, source="made", shard_examples=100)
    return [folder / shard.name for shard in manifest.shards]


def damage(kind: str, shards: list[Path]) -> None:
    """Do it to one of the shards."""
    with tarfile.open(shards[SHARD], mode="r:") as archive:
        offsets = [member.offset for member in archive]
    DAMAGES[kind](shards[SHARD], shards, offsets)


# --- who notices -----------------------------------------------------------------------------------------------------

Rows = Iterator[tuple[str, bytes]]  # name of the member, which no other in the set has, and its bytes


def ours(shards: list[Path]) -> Rows:
    """The rows as training reads them, shard after shard."""
    from laser_dist.data.shards import load_manifest, read_members

    folder = shards[0].parent
    for shard in load_manifest(folder, check_files=False).shards:
        yield from read_members(folder, shard)


def stock(shards: list[Path]) -> Rows:
    """The rows as a plain WebDataset pipeline gives them."""
    from laser_dist.data.streaming.plain_loaders import webdataset_rows

    return webdataset_rows(shards)


READERS: dict[str, Callable[[list[Path]], Rows]] = {"ours": ours, "webdataset": stock}


def read_all(scratch: Path) -> list[Reading]:
    """Every kind of damage, read by every reader."""
    readings = []
    for number, kind in enumerate(DAMAGES):
        shards = make_set(scratch / f"set-{number}")
        written = dict(ours(shards))
        if dict(stock(shards)) != written:
            raise UserError("the two readers give different rows of an intact set: nothing is reported")
        damage(kind, shards)
        readings += [read(kind, name, rows(shards), written) for name, rows in READERS.items()]
    return readings


def read(kind: str, reader: str, rows: Iterable[tuple[str, bytes]], written: dict[str, bytes]) -> Reading:
    """Compare what comes with what was written, until the reader complains or ends."""
    seen, noticed = {}, ""
    try:
        for name, text in rows:
            seen[name] = text
    except Exception as error:  # readers complain in many kinds
        noticed = f"{type(error).__name__}: {str(error)[:160]}"
    altered = sum(written.get(name) != text for name, text in seen.items())
    lost = 0 if noticed else len(written.keys() - seen.keys())
    return Reading(kind, reader, noticed, lost, altered, altered > 0)


def later(scratch: Path) -> dict[str, bool]:
    """What happens to a file after it was read and found good: whether a second epoch notices, or gets it right."""
    from laser_dist.config import DataConfig
    from laser_dist.data.streaming.sets import open_data
    from laser_dist.data.streaming.stream import ExampleStream
    from laser_dist.testing.faulty_server import FaultyServer

    def epochs(place: str, between: Callable[[], object]) -> list[bytes]:
        """Query ids of two epochs, one example at a time; `between` is called when the first has passed."""
        data = open_data(DataConfig(train=place, cache=str(scratch / "cache"), shuffle_shards=1, attempts=2))
        options = {"seed": 0, "queries_per_rank": 1, "shuffle_shards": 1}
        first = ExampleStream(data, total_batches=data.examples, **options)  # type: ignore[arg-type]
        ids = [micro.items[0][1].rationale for micro in first]
        between()
        second = ExampleStream(data, total_batches=data.examples, start=data.examples, **options)  # type: ignore[arg-type]
        return [text.encode() for text in (*ids, *(micro.items[0][1].rationale for micro in second))]

    shards = make_set(scratch / "later")
    try:
        epochs(str(shards[0].parent), lambda: damage("a word in a payload", shards))
        noticed = False
    except UserError:
        noticed = True

    remote = make_set(scratch / "remote")
    server = FaultyServer(remote[0].parent)

    def rot() -> None:
        for copy in (scratch / "cache").glob("*.tar"):
            _rewrite(copy, 600)

    try:
        read_back = sorted(epochs(server.url, rot))
        fetched_again = read_back == sorted(2 * [f"thought of row {n}".encode() for n in range(300)])
    finally:
        server.close()
    return {
        "a file that changed between epochs is refused": noticed,
        "a cached copy that rots is fetched again": fetched_again,
    }


def show(readings: list[Reading], found: dict[str, Any]) -> None:
    """Print the table, what holds later, and the cost."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="One damaged shard of three, 300 rows", caption_justify="left")
    for heading in ("damage", "reader", "noticed", "rows lost silently", "altered rows given out"):
        table.add_column(heading, justify="right" if "row" in heading else "left")
    for reading in readings:
        noticed = reading.noticed.partition(":")[0] or "NO"
        table.add_row(reading.damage, reading.reader, noticed, str(reading.lost), str(reading.altered))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    for name in READERS:
        own = [reading for reading in readings if reading.reader == name]
        before = sum(bool(reading.noticed) and not reading.first_wrong for reading in own)
        eight = sum(bool(r.noticed) and not r.first_wrong for r in own[:8])
        console.print(f"{name}: {before} of {len(own)} noticed before a wrong row came out ({eight} of the first 8)")
    for what, holds in found["later"].items():
        console.print(f"{what}: {'yes' if holds else 'NO'}")
    for what in ("packed", "rows") if found["cost"] else ():
        row = found["cost"][what]
        console.print(
            f"{what}: {row['examples_per_second']:,.0f} examples/s with hashes, {row['without_hashes']:,.0f} without; "
            f"processor time {row['more_processor_time']:+.2%} (median of {len(row['pairs'])} pairs, from "
            f"{min(row['pairs']):+.2%} to {max(row['pairs']):+.2%})"
        )
    if found["cost"]:
        console.print(f"hashing takes {found['cost']['share_of_packed']:.2%} of the processor time of packed batches")
