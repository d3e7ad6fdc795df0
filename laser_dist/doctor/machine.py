"""Memory, limits, processors and the clock of this machine."""

import os
import resource
import shutil
import time
from pathlib import Path

from laser_dist.doctor.finding import GIB, Context, Finding, failed, ok, skipped, warning

SHARED_MEMORY = Path("/dev/shm")
_LEAST_FILES, _GOOD_FILES = 1024, 4096
_LEAST_MEMORY = 4 * GIB
_BUILT = 1_760_000_000
"""Seconds since the epoch when this was written, October 2025: a clock that shows less is wrong."""


def memory(_: Context) -> Finding:
    available, limit = _available(), _cgroup_limit()
    free = min(available, limit) if limit else available
    where = " (limit of this container)" if limit and limit < available else ""
    if free < _LEAST_MEMORY:
        return warning(
            f"{free / GIB:.1f} GiB can be had{where}",
            "end other programs, or ask the scheduler for more: importing torch and a small model take some 4 GiB",
        )
    return ok(f"{free / GIB:.1f} GiB can be had{where}")


def shared_memory(_: Context) -> Finding:
    if not SHARED_MEMORY.is_dir():
        return warning(f"{SHARED_MEMORY} does not exist", "loader processes and NCCL use it: mount a tmpfs there")
    usage = shutil.disk_usage(SHARED_MEMORY)
    found = f"{SHARED_MEMORY}: {usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free"
    remedy = (
        "docker run --shm-size=8g (or --ipc=host), or mount -o remount,size=8G /dev/shm; data.workers = 0 needs none"
    )
    if not os.access(SHARED_MEMORY, os.W_OK):
        return failed(f"{SHARED_MEMORY} cannot be written to", "chmod 1777 /dev/shm, as root")
    if usage.free < 60 * 2**20:
        return failed(found, remedy)
    return warning(found, remedy) if usage.free < GIB else ok(found)


def open_files(_: Context) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    remedy = f"ulimit -n {_GOOD_FILES if hard == resource.RLIM_INFINITY else min(hard, 65536)} before the run"
    if hard != resource.RLIM_INFINITY and hard < _GOOD_FILES:
        remedy = "raise nofile in /etc/security/limits.conf (or docker run --ulimit nofile=65536)"
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        return failed(f"at most {soft:,} open files a process (can be raised to {top})", remedy)
    if soft != resource.RLIM_INFINITY and soft < _GOOD_FILES:
        return warning(f"at most {soft:,} open files a process (can be raised to {top})", remedy)
    return ok(f"at most {'unlimited' if soft == resource.RLIM_INFINITY else f'{soft:,}'} open files a process")


def processes(_: Context) -> Finding:
    """Threads count: a rank with its loader processes and libraries has some hundred."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NPROC)
    limits = [] if soft == resource.RLIM_INFINITY else [soft]
    text = _read("/sys/fs/cgroup/pids.max")
    limits += [int(text)] if text.isdigit() else []
    if limits and min(limits) < 1024:
        return warning(
            f"at most {min(limits):,} processes and threads",
            "ulimit -u 65536 (or docker run --pids-limit=-1): a rank and its loader processes have some hundred",
        )
    return ok(f"at most {min(limits):,} processes and threads" if limits else "no limit of processes")


def locked_memory(context: Context) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not context.facts.get("gpus"):
        return skipped("only GPUs, offload and RDMA need page-locked memory")
    if soft == resource.RLIM_INFINITY:
        return ok("page-locked memory is unlimited")
    return warning(
        f"at most {soft / 2**20:,.0f} MiB of page-locked memory",
        "offload and InfiniBand need it: ulimit -l unlimited, or memlock in /etc/security/limits.conf",
    )


def processors(_: Context) -> Finding:
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    found = f"{cores} cores, OMP_NUM_THREADS {threads or 'unset'}, load {os.getloadavg()[0]:.1f}"
    if threads.isdigit() and int(threads) > cores:
        return warning(found, f"threads that share a core wait for each other: export OMP_NUM_THREADS={cores} or less")
    if os.getloadavg()[0] > 2 * cores:
        return warning(found, "other programs use this machine: end them, or expect steps to take longer")
    return ok(found)


def clock(context: Context) -> Finding:
    """The host's own clock, and the one of the file system: a network drive has its server's."""
    from laser_dist.doctor.storage import probe_file
    from laser_dist.launch.facts import CLOCK_TOLERANCE

    now = time.time()
    if now < _BUILT:
        return failed(f"this host believes it is {time.ctime(now)}", "set the clock: timedatectl set-ntp true")
    try:
        with probe_file(context.output) as path:
            path.write_bytes(b"x")
            skew = path.stat().st_mtime - time.time()
    except OSError as error:
        return skipped(f"no file can be written in {context.output}: {error.strerror}")
    if abs(skew) > CLOCK_TOLERANCE:
        remedy = "set both clocks (timedatectl set-ntp true): time stamps of shared files would confuse"
        return warning(f"files in {context.output} are dated {skew:+.1f} s from this host's clock", remedy)
    return ok(f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, files are dated {skew:+.2f} s from it")


def _available() -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limit() -> int:
    """What this container may still take; 0 without a limit."""
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    return max(1, int(limit) - int(used or 0)) if limit.isdigit() else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
