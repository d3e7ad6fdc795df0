"""Processes that are forked: they end, are ended, print and see their environment as processes do that are started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laser_dist.testing import run_command, run_distributed, start_command
from laser_dist.testing.commands import popen
from laser_dist.testing.forked import end, fork, launched, lines, start


def forks(rank: int, world_size: int, log: Path) -> tuple:
    """In a process with one thread: codes of two forks of which one is killed, and of some that end by themselves."""
    asked: list[int] = []

    def patient() -> int:
        signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
        print(os.environ["WHO"], "waits", os.getpgid(0) == os.getpid(), "PATH" in os.environ, flush=True)
        while not asked:
            time.sleep(0.01)
        return 7

    def killed() -> None:
        while "waits" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def refuses() -> None:
        sys.exit("a word at the end")

    def fails() -> None:
        raise ValueError("a trace")

    with log.open("ab") as file:
        made = [fork(act, env={"WHO": act.__name__}, output=file.fileno()) for act in (patient, killed)]
        first = launched(made)
        others = [launched([fork(act, env={}, output=file.fileno())]) for act in (refuses, fails, list)]
    return first, [process.poll() for process in made], others


def test_forks_end_as_processes_do(tmp_path: Path) -> None:
    """The first code is that of the one that was killed; the other was asked to end, and did so in its own way."""
    log = tmp_path / "log"
    log.touch()
    [(first, codes, others)] = run_distributed(forks, 1, log)
    assert (first, codes, others) == (-9, [7, -9], [1, 1, 0])
    told = log.read_text()
    assert "patient waits True False" in told and "a word at the end" in told and "ValueError: a trace" in told


def orphan(rank: int, world_size: int, file: Path) -> None:
    """Killed while its fork still sleeps."""

    def sleeps() -> None:
        file.write_text(str(os.getpid()))
        time.sleep(600)

    fork(sleeps, env=dict(os.environ), output=2)
    while not file.is_file() or not file.read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it")
def test_a_fork_ends_with_the_process_that_made_it(tmp_path: Path) -> None:
    """Ranks of a supervisor that was killed once trained on."""
    with pytest.raises(RuntimeError, match="SIGKILL"):
        run_distributed(orphan, 1, tmp_path / "pid")
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


def test_lines_come_as_they_are_printed_and_what_does_not_end_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; print('one\\ntw', end='', flush=True); time.sleep(600)"],
        stdout=log.open("wb"),
        start_new_session=True,
    )
    read = lines(process, log, timeout=5)
    assert next(read) == "one" and process.poll() is None
    assert list(read) == ["tw"] and process.wait() == -9


def test_a_command_that_does_not_end_is_killed(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_command("bench", "loader", "--help", timeout=0)
    [process] = start_command("bench", "--help", output=tmp_path / "log")
    assert launched([process], 60) == 0 and "laser-dist bench step" in (tmp_path / "log").read_text()
    end(process)  # once more than needed


def test_what_is_read_at_an_import_is_read_anew(tmp_path: Path) -> None:
    """A fork of the server would have the server's value."""
    env = {**os.environ, "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = start(os.system, 'tr "\\0" "\\n" < /proc/$PPID/environ', env=env, output=tmp_path / "log")
    assert isinstance(process, subprocess.Popen) and process.wait() == 0
    assert "PYTHONDONTWRITEBYTECODE=1" in (tmp_path / "log").read_text().splitlines()


def test_only_modules_are_run_in_the_place_of_a_command(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), (tmp_path / "log").open("wb") as log:
        popen(["deepspeed", "-m", "x"], env={}, stdout=log, stderr=subprocess.STDOUT)


def test_a_command_that_ran_in_this_process_does_not_make_later_starts_slow(tmp_path, monkeypatch) -> None:
    """It named the accelerator, or imported scikit-learn: all later ranks imported everything for themselves."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("WDS_SECURE", "KMP_INIT_AT_FORK", "_RJEM_MALLOC_CONF"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(subprocess, "Popen", None)
    assert start(print, "here", env=os.environ, output=tmp_path / "output").wait() == 0
    assert (tmp_path / "output").read_text() == "here\n"
