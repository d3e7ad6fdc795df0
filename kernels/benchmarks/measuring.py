"""What the benchmarks here share: a process per measurement, its times and its own peak of memory, rows in a file."""

import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laser_dist.observability.clock import StepClock

# Both would change what a process measures behind the back of its options.
OVERRIDES = ("LASER_KERNELS", "TRITON_INTERPRET")


class Failed(Exception):
    """A measurement has no result; the message says why."""


@dataclass(frozen=True)
class Measured:
    """`extra_bytes`: the peak of memory during the calls above that before them."""

    seconds: list[float]
    # Of all threads, mean per call: what a CPU that is shared with other work does not distort as it does `seconds`.
    cpu_seconds: float
    extra_bytes: int


def measure(call: Callable[[], None], device: torch.device, repeats: int) -> Measured:
    """Times of a call that leaves nothing behind, after one that compiles and warms up.

    Memory on a GPU is what torch's allocator gave out. On a CPU it is the process's resident memory (Linux only), whose
    high-water mark is set back first and heaps trimmed, so that neither inputs nor warm-up are in it.
    """
    call()
    before = _start_of_peak(device)
    clock, seconds, started = StepClock(device), [], time.process_time()
    for _ in range(repeats):
        with clock.phase("call"):
            call()
        seconds.append(clock.reset()["call"])
    cpu_seconds = (time.process_time() - started) / repeats
    return Measured(seconds, cpu_seconds, max(_peak(device) - before, 0))


def _start_of_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(which: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{which}:\s+(\d+) kB", status)
    assert found is not None, f"/proc/self/status has no {which}"
    return int(found[1]) * 1024


def in_a_process(script: str, job: dict[str, Any]) -> dict[str, Any]:
    """What `script --child` answers to a job. Raises Failed with its last words."""
    environment = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    child = subprocess.run(
        [sys.executable, script, "--child"], input=json.dumps(job), capture_output=True, text=True, env=environment
    )
    if child.returncode == -9:
        raise Failed("its process was killed: out of memory?")
    if child.returncode:
        raise Failed((child.stderr.strip().splitlines() or [f"exit code {child.returncode}, no message"])[-1])
    return json.loads(child.stdout.splitlines()[-1])


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side: a job from the standard input, its answer as the last line of the output."""
    try:
        found = work(json.load(sys.stdin))
    except Failed as failed:
        sys.exit(str(failed))
    print(json.dumps(found))


def environment(device: torch.device) -> dict[str, Any]:
    """What every row says about where and when it was measured."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({_processor()})"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "torch": torch.__version__,
        "triton": triton,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def times(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds of one measurement."""
    seconds = [s for outcome in outcomes for s in outcome["seconds"]]
    p20, p50, p80 = np.percentile(seconds, [20, 50, 80]).tolist()
    cpu_s = float(np.mean([outcome["cpu_seconds"] for outcome in outcomes]))
    return {"p20_s": p20, "p50_s": p50, "p80_s": p80, "cpu_s": cpu_s, "repeats": len(seconds)}


def available_bytes(device: torch.device) -> int:
    """What a measurement may take unless told otherwise: nine tenths of a free GPU, six tenths of what a host has."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(0.6 * int(free[1]) * 1024) if free else 8 * 2**30


def append(rows: list[dict[str, Any]], out: Path | None) -> None:
    if out is not None and rows:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
