"""The processes of a run on this host. Run by path on every host, so it needs nothing but Python:

    python -I processes.py OUTPUT count     print how many there are
    python -I processes.py OUTPUT stop      SIGTERM to the ranks: they save and stop
    python -I processes.py OUTPUT end       SIGKILL to all, and wait until they are gone

A process belongs to a run if LASER_DIST_RUN in its environment is the run's output folder: what a rank started, and
what outlived its launcher, is found too.
"""

import os
import signal
import sys
import time

MARK = "LASER_DIST_RUN"


def processes(run: str) -> dict[int, dict[str, str]]:
    """Process id -> environment it was started with."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                pairs = (item.partition(b"=") for item in file.read().split(b"\0"))
                environment = {os.fsdecode(key): os.fsdecode(value) for key, _, value in pairs}
        except OSError:  # ended meanwhile, or somebody else's
            continue
        if environment.get(MARK) == run and int(name) != os.getpid():
            found[int(name)] = environment
    return found


def ranks(run: str) -> list[int]:
    """The ranks themselves: not their launcher, and not the loader processes, which inherit RANK from their rank."""
    found = processes(run)
    numbered = {pid for pid, environment in found.items() if "RANK" in environment}
    return [pid for pid in numbered if _parent(pid) not in numbered]


def send(pids: list[int], number: int) -> int:
    """Send a signal; how many processes got it."""
    sent = 0
    for pid in pids:
        try:
            os.kill(pid, number)
            sent += 1
        except ProcessLookupError:
            pass
    return sent


def stop(run: str) -> int:
    """Ask the ranks to save and stop; how many were asked."""
    return send(ranks(run), signal.SIGTERM)


def end(run: str, seconds: float = 10) -> int:
    """Kill everything of the run and wait until it is gone; how many processes there were."""
    seen: set[int] = set()
    deadline = time.monotonic() + seconds
    while (alive := list(processes(run))) and time.monotonic() < deadline:
        seen |= set(alive)
        send(alive, signal.SIGKILL)
        time.sleep(0.05)
    return len(seen)


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])  # the name before it may hold anything
    except OSError:
        return 0


if __name__ == "__main__":
    act = {"count": lambda run: len(processes(run)), "stop": stop, "end": end}[sys.argv[2]]
    print(act(sys.argv[1]))
