"""Running what came with a model, a chat template, in bounds: it cannot reach out of its sandbox, but may never end."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

from laser_dist.reading import LARGEST_JSON

_SECONDS, _BYTES = 2, 256 * 2**20  # of processor time and of memory beside what the process has already


def bounded(make: Callable[[], str]) -> str | None:
    """What `make` returns, made in a copy of this process; None if it raises, or takes too much time or memory.

    `make` must only compute: a copy has no threads, no GPU and no process group.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _work(make, reader, writer)  # ends the copy
    os.close(writer)
    with open(reader, "rb") as file:
        made = file.read(LARGEST_JSON)
    _, status = os.waitpid(child, 0)
    return made.decode("utf-8") if status == 0 else None


def _work(make: Callable[[], str], reader: int, writer: int) -> None:
    code = 1
    try:
        os.close(reader)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for kind, limit in ((resource.RLIMIT_CPU, _SECONDS), (resource.RLIMIT_AS, used + _BYTES)):
            most = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
        with open(writer, "wb") as file:
            file.write(make().encode("utf-8"))
        code = 0
    except BaseException:  # whatever it was, the copy must not go on where its original is
        pass
    finally:
        os._exit(code)
