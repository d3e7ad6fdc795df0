"""Shards that are damaged, and servers that fail, for rows whose fault is none of a process."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from laser_dist.bench.faults.table import Row
from laser_dist.testing.faulty_server import FaultyServer


def truncated(shards: list[Path]) -> None:
    shards[0].write_bytes(shards[0].read_bytes()[:-2000])


def flipped(shards: list[Path]) -> None:
    content = bytearray(shards[0].read_bytes())
    content[len(content) // 2] ^= 1
    shards[0].write_bytes(content)


def empty(shards: list[Path]) -> None:
    shards[0].write_bytes(b"")


def missing(shards: list[Path]) -> None:
    shards[0].unlink()


def swapped(shards: list[Path]) -> None:
    first, second = (path.read_bytes() for path in shards[:2])
    shards[0].write_bytes(second)
    shards[1].write_bytes(first)


DAMAGES: dict[str, Callable[[list[Path]], None]] = {
    "truncated": truncated,
    "with a flipped bit": flipped,
    "empty": empty,
    "missing": missing,
    "swapped with another": swapped,
}


@contextmanager
def served(row: Row, shards: Path, folder: Path) -> Iterator[list[str]]:
    """The flags for a row's data: the shards as they are, a damaged copy in `folder`, or a failing server."""
    if row.shards:
        shutil.copytree(shards, folder)
        DAMAGES[row.shards](sorted(folder.glob("*.tar")))
        yield ["--data.train", str(folder)]
    elif row.server:
        server = FaultyServer(shards)
        for path in shards.glob("*.tar"):
            server.faults[path.name] = list(row.server)
        try:
            yield ["--data.train", server.url, "--data.cache", str(folder)]
        finally:
            server.close()
    else:
        yield []
