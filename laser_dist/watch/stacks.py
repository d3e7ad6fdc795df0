"""Where every thread of a rank is, in OUTPUT/launch/attempt-N/stacks-R.txt: on a signal's request, or at a crash.

faulthandler's handler is C: it also answers for a rank whose interpreter is locked or whose training thread is stuck in
a library. For a process that is stopped, what the kernel tells of it stands there instead.
"""

import faulthandler
import os
import re
import signal
import sys
import threading
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

ASK = signal.SIGUSR2
_KERNEL = ("status", "wchan", "stack")
# Where Python is while a collective runs. DeepSpeed waits in many places, and does little else that takes time itself.
_COMMUNICATION = ("/torch/distributed/", "/deepspeed/", "/laser_kernels/ring.py")
_WAITING = (*_COMMUNICATION, "/torch/cuda/")
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank:05d}.txt"


class Stacks:
    """This rank's file. From here on a crash (SIGSEGV, SIGABRT, ...) and the signal ASK write into it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = path.open("w", encoding="utf-8")
        faulthandler.enable(self.file, all_threads=True)
        faulthandler.register(ASK, self.file, all_threads=True)

    def write(self, why: str) -> None:
        """All threads' stacks, by whichever thread calls."""
        with suppress(OSError):
            self._head(why)
            faulthandler.dump_traceback(self.file, all_threads=True)

    def error(self, error: BaseException, what: str) -> None:
        """An exception that nobody is told on the console."""
        with suppress(OSError):
            self._head(what)
            traceback.print_exception(error, file=self.file)
            self.file.flush()

    def neighbour(self, pid: int, rank: int) -> None:
        """What the kernel tells of another rank's process on this host, and that rank is asked for its own stacks."""
        with suppress(OSError):
            self._head(f"rank {rank}, process {pid}, by the kernel's account")
            for name in _KERNEL:
                with suppress(OSError):
                    content = Path(f"/proc/{pid}/{name}").read_text(errors="replace").strip()
                    self.file.write(f"--- {name}\n{content}\n")
            self.file.flush()
        with suppress(OSError):
            os.kill(pid, ASK)

    def close(self) -> None:
        """Back to the interpreter's own: the file may go."""
        faulthandler.unregister(ASK)
        faulthandler.disable()
        self.file.close()

    def _head(self, why: str) -> None:
        self.file.write(f"\n=== {datetime.now(UTC).isoformat(timespec='seconds')} {why}\n")
        self.file.flush()


def crash(path: Path) -> str:
    """What a rank's file says about its crash: 'Segmentation fault', say; '' if there was none."""
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Fatal Python error: "):
                return line.removeprefix("Fatal Python error: ")
    return ""


def in_collective() -> bool:
    """Whether a thread of this process waits for other ranks or for its device."""
    own = threading.get_ident()
    frames = [frame for ident, frame in sys._current_frames().items() if ident != own]
    return any(part in frame.f_code.co_filename for frame in frames for part in _WAITING)


def communication(error: BaseException | None) -> BaseException | None:
    """The error of a collective that `error` is, or is a message about; None if there is none.

    The loss of a peer looks like this, and is not this rank's fault.
    """
    while error is not None and not _is_communication(error):
        error = error.__cause__
    return error


def _is_communication(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError | ValueError):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    inside = bool(frames) and any(part in frames[-1][0].f_code.co_filename for part in _COMMUNICATION)
    return inside or bool(_LOST.search(str(error)))
