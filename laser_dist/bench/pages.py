"""Files in and out of the system's page cache, for cold and warm measurements."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    """Share of the files' pages in memory, as mincore(2) tells it; None where the system does not.

    Reading a page to see whether it is there (`RWF_NOWAIT`) starts readahead: the question would warm the file.
    """
    mincore: Any = getattr(ctypes.CDLL(None), "mincore", None)
    pages, resident = 0, 0
    for path in files if mincore else ():
        with _opened(path) as descriptor, mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as mapped:
            told = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(mapped)  # its address; mmap cannot close while it lives
            failed = mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), told)
            del start
            if failed:
                return None
            pages += len(told)
            resident += sum(byte & 1 for byte in bytes(told))
    return resident / pages if pages else None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
