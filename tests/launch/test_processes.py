import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laser_dist.launch import processes

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def run(tmp_path: Path):
    """Starts processes that belong to a run; ends them all."""
    started = []

    def start(command: list[str], **environment: str) -> subprocess.Popen:
        env = {**os.environ, processes.MARK: str(tmp_path), **environment}
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stop_reaches_ranks_only(tmp_path: Path, run) -> None:
    """A loader process inherits RANK from its rank; ended by a signal it would take the rank with it."""
    child = f"import subprocess, time; subprocess.Popen({SLEEP!r}); time.sleep(60)"
    rank = run([sys.executable, "-c", child], RANK="0")
    launcher = run(SLEEP)
    wait_until(lambda: len(processes.processes(str(tmp_path))) == 3)
    assert processes.ranks(str(tmp_path)) == [rank.pid]
    assert processes.stop(str(tmp_path)) == 1
    assert rank.wait(timeout=10) == -signal.SIGTERM
    assert launcher.poll() is None and len(processes.processes(str(tmp_path))) == 2


def test_end_leaves_nothing_and_touches_no_other_run(tmp_path: Path, run) -> None:
    ignores = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    mine = run([sys.executable, "-c", ignores], RANK="0")
    other = run(SLEEP, **{processes.MARK: str(tmp_path) + "-other"})
    assert mine.stdout.readline() == "1\n"
    script = [sys.executable, "-I", processes.__file__, str(tmp_path)]
    assert subprocess.check_output([*script, "count"], text=True) == "1\n"
    assert subprocess.check_output([*script, "end"], text=True) == "1\n"
    assert mine.wait(timeout=10) == -signal.SIGKILL
    assert other.poll() is None
    assert subprocess.check_output([*script, "count"], text=True) == "0\n"
