import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from laser_dist.data.preparation.parallel import WorkerKilled, ordered_map
from laser_dist.errors import UserError


def _slow_first(item: int) -> tuple[int, int]:
    time.sleep(0.2 if item == 0 else 0)
    return item, os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_results_keep_the_order_and_items_are_taken_as_needed(workers):
    items = itertools.count()
    results = ordered_map(_slow_first, items, workers=workers, ready=2)
    found = [next(results) for _ in range(20)]
    assert [item for item, _ in found] == list(range(20))
    assert next(items) <= 20 + 2 * workers + 1
    assert (os.getpid() in {pid for _, pid in found}) == (workers == 1)
    results.close()


def _refuse(item: int) -> int:
    if item == 3:
        raise UserError("a.jsonl:3: wrong")
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_a_user_error_comes_in_its_turn(workers):
    results = ordered_map(_refuse, range(9), workers=workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="a.jsonl:3: wrong"):
        next(results)


def _die(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_is_explained():
    with pytest.raises(WorkerKilled, match="lack of memory: use fewer --workers"):
        list(ordered_map(_die, range(4), workers=2))


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(r"""
        import os, sys, time
        from laser_dist.data.preparation.parallel import ordered_map
        def work(item):
            os.write(1, b"%d\n" % os.getpid())  # one write: two processes share the pipe
            return item
        def items():
            yield from range(4)
            time.sleep(60)
        list(ordered_map(work, items(), workers=2))
        """)
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        workers = {int(parent.stdout.readline()) for _ in range(4)}
        parent.kill()
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
