"""Files in and out of the system's page cache, for cold and warm measurements."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def evict(files: list[Path]) -> float | None:
    """Ask the system to drop the files from its page cache; returns what share of them it kept."""
    for path in files if hasattr(os, "posix_fadvise") else ():
        with _opened(path) as descriptor:
            os.fsync(descriptor)  # pages that are not yet on disk stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(files)


def warm(files: list[Path]) -> float | None:
    """Read the files once; returns what share of them is in the page cache."""
    for path in files:
        path.read_bytes()
    return cached_share(files)


def cached_share(files: list[Path]) -> float | None:
    """Share of the files' pages in memory, by a probe every 256 KiB; None where the system does not tell."""
    probes, hits, page = 0, 0, bytearray(1)
    for path in files:
        with _opened(path) as descriptor:
            for offset in range(0, path.stat().st_size, 256 * 1024):
                probes += 1
                try:
                    hits += os.preadv(descriptor, [page], offset, os.RWF_NOWAIT)
                except BlockingIOError:
                    pass
                except (OSError, AttributeError):
                    return None
    return hits / max(1, probes)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
