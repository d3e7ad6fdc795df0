"""What a fault does to the process that it strikes: each act is called in the training thread, as a phase begins."""

import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laser_dist.bench.faults import machine
from laser_dist.errors import UserError
from laser_dist.watch import pulse

LONG = 600.0
VERY_SLOW = 9.0
"""Seconds; more than a step may take here, and 20 times what a step or a save takes."""


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LONG)


def segmentation_fault() -> None:
    ctypes.string_at(0)


def exits() -> None:
    os._exit(0)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hangs() -> None:
    time.sleep(LONG)


def spins() -> None:
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        pass


def locks() -> None:
    """A C function that waits for ever, for a semaphore, without letting go of the interpreter."""
    ctypes.PyDLL(None).sem_wait(ctypes.create_string_buffer(64))


def raises() -> None:
    raise RuntimeError("injected")


def mistake() -> None:
    raise UserError("injected mistake: mend it")


def out_of_memory() -> None:
    """No page more than there is now; then the process asks for a lot."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
    hold = [bytearray(2**28) for _ in range(64)]
    raise AssertionError(f"{len(hold)} x 256 MiB were there")


def disk_full() -> None:
    """Whatever is written grows to 4 KiB at most: as on a full disk, a write fails in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def no_writes() -> None:
    """As when the kernel mounts a disk again, read-only, after an error. Of a run: its folder."""
    machine.make_read_only(Path(os.environ[machine.FOLDER]))


def loader_killed() -> None:
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)


def loader_stopped() -> None:
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGSTOP)


def slow() -> None:
    time.sleep(2.0)


def very_slow() -> None:
    time.sleep(VERY_SLOW)


def whole_job_paused() -> None:
    """All ranks stop and go on VERY_SLOW seconds later, as when a laptop's lid is closed."""
    pids = _ranks()
    code = (
        "import contextlib, os, signal, sys, time\n"
        "pids = list(map(int, sys.argv[2:]))\n"
        "for number, pause in ((signal.SIGSTOP, float(sys.argv[1])), (signal.SIGCONT, 0)):\n"
        "    for pid in pids:\n"
        "        with contextlib.suppress(ProcessLookupError): os.kill(pid, number)\n"
        "    time.sleep(pause)\n"
    )
    subprocess.Popen([sys.executable, "-Ic", code, str(VERY_SLOW), *map(str, pids)], start_new_session=True)
    time.sleep(1.0)


def clock_jumps() -> None:
    """The wall clock of this process, an hour on; that of a whole machine would take root."""
    real = time.time
    time.time = lambda: real() + 3600.0


def spoil(value: float) -> Callable[[], None]:
    """The first weight of this rank's part becomes `value`."""

    def act() -> None:
        import torch

        with torch.no_grad():
            parameter = engines[-1].trained[0]
            getattr(parameter, "ds_tensor", parameter).view(-1)[0] = value

    return act


engines: list[Any] = []
"""The engine that this process trains with; rank.py puts it here."""


def _ranks() -> list[int]:
    """Process ids, from the pulses beside this rank's."""
    assert pulse.current
    beats = [pulse.read(path) for path in pulse.current.path.parent.glob("pulse-*")]
    return [beat.pid for beat in beats if beat]


ACTS: dict[str, Callable[[], None]] = {
    "killed": killed,
    "segmentation fault": segmentation_fault,
    "abort": os.abort,
    "exits with 0": exits,
    "stopped": stopped,
    "hangs": hangs,
    "spins": spins,
    "locks the interpreter": locks,
    "raises": raises,
    "a mistake of the user": mistake,
    "out of memory": out_of_memory,
    "disk full": disk_full,
    "disk takes no writes": no_writes,
    "loader killed": loader_killed,
    "loader stopped": loader_stopped,
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "a weight is NaN": spoil(float("nan")),
    "a weight is infinite": spoil(float("inf")),
    "slow": slow,
    "very slow": very_slow,
    "the whole job is paused": whole_job_paused,
    "the clock jumps": clock_jumps,
}
