"""Three real ranks without torch: what happens to one of them, and what the others make of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laser_dist.watch import pulse, stacks, verdict

# A rank: meets the others by files, makes some steps, and then waits in a collective, or does what is asked of it.
RANK = """
import ctypes, os, pickle, signal, sys, threading, time
from pathlib import Path
from laser_dist.errors import UserError
from laser_dist.launch.outcome import own_folder, reported
from laser_dist.watch import pulse, stacks
from laser_dist.watch.pulse import Limits
from laser_dist.watch.watchdog import Watchdog

output, act = Path(sys.argv[1]), sys.argv[2]
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def gather(own):
    (output / f".meet-{rank}").write_bytes(pickle.dumps(own))
    (output / f".meet-{rank}").rename(output / f"meet-{rank}")
    while len(met := sorted(output.glob("meet-*"))) < ranks:
        time.sleep(0.01)
    return [pickle.loads(path.read_bytes()) for path in met]

def collective(seconds=120):
    time.sleep(seconds)

LOST = compile("raise RuntimeError('Connection closed by peer')", "/lib/torch/distributed/c10d.py", "exec")
stacks.in_collective = lambda: any(f.f_code.co_name == "collective" for f in sys._current_frames().values())
watchdog = Watchdog(own_folder(output), Limits(steps=3, seconds=1.0, data_seconds=1.0))
with reported(output, watchdog):
    watchdog.meet(gather)
    for number in range(1, 5):
        with pulse.step(number), pulse.phase("forward"):
            time.sleep(0.02)
    with pulse.step(5), pulse.phase("backward"):
        (output / f"ready-{rank}").touch()
        if rank == 1:
            exec(act)
        else:
            exec(os.environ.get("OTHERS", "collective()"))
"""


class Job:
    """Three ranks; rank 1 acts."""

    def __init__(self, output: Path, act: str, others: str = "collective()"):
        self.output, self.folder = output, output / "launch/attempt-0"
        output.mkdir()
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(output), act],
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "OTHERS": others},
                stderr=(output / f"stderr-{rank}").open("w"),
            )
            for rank in range(3)
        ]

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.output.glob(pattern))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def codes(self) -> list[int]:
        return [process.wait(timeout=60) for process in self.ranks]

    def told(self) -> str:
        return "".join((self.output / f"stderr-{rank}").read_text() for rank in range(3))

    def stacks(self, rank: int) -> str:
        return stacks.path_of(self.folder, rank).read_text()


@pytest.fixture
def job(tmp_path: Path):
    started: list[Job] = []

    def start(*arguments: str) -> Job:
        started.append(Job(tmp_path / "run", *arguments))
        return started[-1]

    yield start
    for process in started[0].ranks:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("act", "kind", "code", "cause"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "died", -9, "gone without a word"),
        ("os._exit(0)", "died", 0, "gone without a word"),
        ("ctypes.string_at(0)", "died", -11, "Segmentation fault"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "stopped", -9, "SIGSTOP"),
        ("time.sleep(120)", "hung", 1, "no progress"),
        ("ctypes.PyDLL(None).sem_wait(bytes(64))", "locked", -9, "interpreter is locked"),
        ("raise KeyError('x')", "failed", 1, "KeyError: 'x'"),
        ("raise UserError('mend this')", "failed", 1, "mend this"),
        # Then no thread can be started either.
        (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**20, 2**40)); bytearray(2**28)",
            "failed",
            1,
            "MemoryError",
        ),
        ("collective()", "hung", 1, "all ranks wait for each other"),
    ],
)
def test_what_one_rank_does_ends_all_and_is_told_once(job, act: str, kind: str, code: int, cause: str) -> None:
    """However it fails, and although the others wait for it in a collective that never returns."""
    run = job(act)
    assert run.codes() == [1, code, 1]
    told = verdict.read(run.folder)
    culprit = 0 if act == "collective()" else 1
    assert (told.rank, told.kind, told.step, told.phase) == (culprit, kind, 5, "backward")
    assert cause in told.cause and told.mendable == ("UserError" in act)
    lines = [line for line in run.told().splitlines() if line.startswith("laser-dist: ")]
    assert lines == ([] if told.mendable else [line for line in lines if told.line in line][:1])
    assert all("in collective" in run.stacks(rank) for rank in (0, 2))
    if kind in ("hung", "locked"):
        assert "<string>" in run.stacks(1)
    if kind == "stopped":
        assert "State:\tT" in run.stacks(told.told_by)


def test_the_lost_rank_is_named_and_not_the_one_that_complains(job) -> None:
    """gloo's peers see the end of a connection before anybody sees that the process has ended."""
    run = job("time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(0.2); exec(LOST)")
    assert run.codes() == [1, -9, 1]
    told = verdict.read(run.folder)
    assert (told.rank, told.kind) == (1, "died")
    assert "Traceback" not in run.told() and run.told().count("laser-dist: rank 1") == 1
    assert "Connection closed by peer" in run.stacks(0)


def test_a_message_made_of_a_lost_connection_is_not_the_users_to_mend(job) -> None:
    """A rank killed while the model loaded: the other said `cannot load its weights`, and the run was not restarted."""
    others = """
try:
    exec(LOST)
except RuntimeError as error:
    raise UserError("model.name: cannot load its weights") from error
"""
    run = job("time.sleep(0.5); os._exit(0)", f"time.sleep(0.2){others}")
    assert run.codes() == [1, 0, 1]
    told = verdict.read(run.folder)
    assert (told.rank, told.kind, told.mendable) == (1, "died", False)
    assert "Traceback" not in run.told() and run.told().count("laser-dist: rank 1") == 1
    assert "cannot load its weights" in run.stacks(0)


def test_all_ranks_that_fail_alike_speak_for_themselves(job) -> None:
    run = job("raise UserError('mend this')", "time.sleep(0.5); raise UserError('mend this')")
    assert run.codes() == [1, 1, 1]  # Python's own code for an error that nobody catches
    assert run.told().count("UserError: mend this") == 3 and "laser-dist: " not in run.told()


def test_a_pause_of_the_whole_job_is_no_alarm(job) -> None:
    run = job("collective(2)", "collective(2)")
    run.wait_for("ready-*")
    for process in run.ranks:
        process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    for process in run.ranks:
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    assert run.codes() == [0, 0, 0]
    assert verdict.read(run.folder) is None and run.told() == ""


def test_a_long_save_is_no_alarm_to_those_who_wait(job) -> None:
    save = "\nwith pulse.phase('save'):\n    {}(4)"
    run = job(save.format("time.sleep"), save.format("collective"))
    assert run.codes() == [0, 0, 0] and verdict.read(run.folder) is None


def test_ranks_of_an_earlier_run_are_nobody(job, tmp_path: Path) -> None:
    """Pulses of processes that are long gone lie where this run's will be."""
    folder = tmp_path / "run/launch/attempt-0"
    run = job("collective(1)", "collective(1)")
    assert run.codes() == [0, 0, 0]
    left = pulse.read(pulse.path_of(folder, 1))
    assert left.code == 0 and pulse.process(left.pid) is None


WAITS = """
import hashlib, os, signal, sys
from pathlib import Path
from laser_dist.launch.outcome import own_folder, reported
from laser_dist.watch.pulse import Limits
from laser_dist.watch.watchdog import Watchdog

output = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: None)  # what it would do waits for the call below
own_folder(output).mkdir(parents=True)
with reported(output, Watchdog(own_folder(output), Limits(steps=3, seconds=1.0, data_seconds=1.0))):
    (output / "ready").touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # an hour in C, as when ranks wait for one that never comes
"""


def test_a_rank_that_waits_to_meet_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    """It once waited on, until the launcher killed it 30 seconds later, and was blamed for the one that was lost."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LASER_DIST_ATTEMPT": "1"}
    waiting = subprocess.Popen([sys.executable, "-c", WAITS, str(tmp_path)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(timeout=60) == 75
    finally:
        waiting.kill()
    folder = tmp_path / "launch/attempt-1"
    assert "before the ranks had met" in (folder / "rank-00000.json").read_text()
    beat = pulse.read(pulse.path_of(folder, 0))
    assert beat is not None and beat.code == 75 and beat.ticks > 0
