"""The supervisor over short processes that stand for DeepSpeed's launcher: real exit codes, signals and leftovers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laser_dist.errors import UserError
from laser_dist.launch import launch, processes
from laser_dist.launch.attempt import Attempt
from laser_dist.launch.options import parse
from laser_dist.recipe import read_recipe
from laser_dist.run_page.account import account

# Reads what to do in this attempt from its line of `plan`: save a checkpoint, speak as rank 0, leave, hang, exit.
FAKE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
output, attempt = Path(os.environ["LASER_DIST_RUN"]), int(os.environ["LASER_DIST_ATTEMPT"])
def speak(code, reason="", rank=0):
    folder = output / f"launch/attempt-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"rank": rank, "ranks": 2, "host": "here", "code": code, "reason": reason, "time": time.time()}
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps(record))
def verdict(step, phase="forward", kind="died"):
    folder = output / f"launch/attempt-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    told = {"rank": 1, "host": "here", "step": step, "phase": phase, "kind": kind, "cause": "its process is gone",
            "told_by": 0, "queries": ["q7", "q8"]}
    (folder / "verdict.json").write_text(json.dumps(told))
def save(step):
    (output / "checkpoints").mkdir(exist_ok=True)
    (output / "checkpoints/latest").write_text(f"step-{step:06d}")
exec((output.parent / "plan").read_text().splitlines()[attempt - 1])
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the supervisor over a plan of one line of Python per attempt; returns its exit code and what it said."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/manifest.json").write_text("{}")
    (tmp_path / "recipe.toml").write_text(f'[model]\nname = "m"\n[data]\ntrain = "{tmp_path}/shards"\n')
    (tmp_path / "fake.py").write_text(FAKE)
    original = Attempt._command
    commands: list[list[str]] = []

    def command(self: Attempt) -> list[str]:
        commands.append(original(self))
        return [sys.executable, str(tmp_path / "fake.py")]

    monkeypatch.setattr(Attempt, "_command", command)

    def run(*plan: str, options: tuple[str, ...] = ("--max-restarts", "5")) -> int:
        (tmp_path / "plan").write_text("\n".join(plan) + "\n")
        recipe = [str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "run")]
        return launch.main(["--backoff", "0", *options, *recipe])

    run.output, run.commands = tmp_path / "run", commands  # type: ignore[attr-defined]
    return run


def test_a_failure_is_resumed_from_the_last_checkpoint(job, capfd: pytest.CaptureFixture) -> None:
    assert job("save(4); speak(1, 'RuntimeError: x'); sys.exit(1)", "speak(0)") == 0
    told = capfd.readouterr().err
    assert "attempt 1 of 6 failed" in told and "rank 0 on here: RuntimeError: x" in told
    assert "rank 1 ended without a word" in told
    assert "restart 1 of 5 in 0 s, from step 4" in told and "attempt 2 of 6 finished" in told
    assert [command[-1] for command in job.commands] == [str(job.output / "launch/recipe.toml"), "--resume"]


def test_ranks_do_not_meet_at_a_port_that_is_taken(job, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        monkeypatch.setattr(launch, "DEFAULT_PORT", taken)  # another run's
        assert job("speak(0)") == 0
        assert job.commands[0][job.commands[0].index("--master_port") + 1] != taken
        with pytest.raises(UserError, match=f"--master_port {taken}: another process"):
            job("speak(0)", options=("--master_port", taken))
    assert len(job.commands) == 1


def test_two_failures_without_progress_are_enough(job, capfd: pytest.CaptureFixture) -> None:
    plan = ("save(4); sys.exit(1)", "save(8); sys.exit(1)", "sys.exit(1)", "speak(0)")
    assert job(*plan) == 1
    told = capfd.readouterr().err
    assert len(job.commands) == 3 and "two failures in a row without a new checkpoint (step 8)" in told


def test_restarts_are_bounded(job) -> None:
    assert job(*(f"save({step}); sys.exit(1)" for step in range(1, 9)), options=("--max-restarts", "2")) == 1
    assert len(job.commands) == 3


def test_the_last_line_says_who_where_why_and_what_next(job, capfd: pytest.CaptureFixture) -> None:
    assert job("save(4); verdict(5); speak(1, 'RuntimeError: Connection closed'); sys.exit(256 - 9)", options=()) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    for part in (
        "attempt 1 of 1 failed",
        "rank 1 on here died in step 5, forward: its process is gone (SIGKILL)",
        "stacks of all ranks: ",
        "no restart was asked for with --max-restarts (step 4); --resume goes on from there",
    ):
        assert part in last
    assert "Connection closed" not in last


def test_a_step_that_kills_twice_is_named_with_its_queries(job, capfd: pytest.CaptureFixture) -> None:
    """Also when there was a checkpoint in between, so that each attempt made progress."""
    plan = ("save(4); verdict(6); sys.exit(1)", "save(5); verdict(6); sys.exit(1)", "speak(0)")
    assert job(*plan) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert len(job.commands) == 2
    assert "step 6 killed the run twice" in last and "queries of rank 1's micro-batch: q7, q8" in last


def test_a_poisoned_step_is_passed_over_if_asked(job, capfd: pytest.CaptureFixture) -> None:
    plan = ("save(4); verdict(6); sys.exit(1)", "verdict(6); sys.exit(1)", "speak(0)")
    assert job(*plan, options=("--max-restarts", "5", "--skip-poisoned-step")) == 0
    assert "step 6 killed the run twice and is passed over" in capfd.readouterr().err
    [told] = [json.loads(line) for line in (job.output / "launch/poisoned.jsonl").read_text().splitlines()]
    assert told["step"] == 6 and told["queries"] == ["q7", "q8"]
    assert read_recipe(job.output / "launch/recipe.toml").data.skip_steps == (6,)


def test_dying_twice_outside_of_steps_is_no_poisoned_step(job, capfd: pytest.CaptureFixture) -> None:
    plan = ("save(4); verdict(4, 'save'); sys.exit(1)", "save(6); verdict(4, 'save'); sys.exit(1)", "speak(0)")
    assert job(*plan) == 0
    assert "killed the run twice" not in capfd.readouterr().err


def test_a_rank_stopped_by_the_launcher_does_not_hide_who_died(job, capfd: pytest.CaptureFixture) -> None:
    """DeepSpeed's launcher sends SIGTERM to the ranks that are left: they end as if asked to."""
    assert job("verdict(0, 'load'); speak(75, 'SIGTERM came'); sys.exit(256 - 9)", "speak(0)") == 0
    assert "rank 1 on here died in load" in capfd.readouterr().err


@pytest.mark.parametrize("plan", ["speak(2, 'no such shard'); sys.exit(2)", "speak(2, 'no such shard'); sys.exit(1)"])
def test_a_user_error_is_final(job, capfd: pytest.CaptureFixture, plan: str) -> None:
    """Also when another rank, which lost its peer by it, gives the launcher its exit code."""
    assert job(plan) == 2
    assert len(job.commands) == 1 and "no such shard" in capfd.readouterr().err


def test_a_clean_stop_is_final(job) -> None:
    assert job("save(3); speak(75); sys.exit(75)") == 75
    assert len(job.commands) == 1


def test_exit_code_0_without_a_finished_rank_is_a_failure(job, capfd: pytest.CaptureFixture) -> None:
    """DeepSpeed's launcher exits with 0 when the processes under it were killed by a signal."""
    assert job("sys.exit(0)", "speak(0)") == 0
    assert len(job.commands) == 2 and "no rank said why" in capfd.readouterr().err


def test_nothing_outlives_an_attempt(job) -> None:
    left = f"subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'], start_new_session=True)"
    assert job(f"{left}; os.kill(os.getpid(), 9)", "speak(0)") == 0
    assert not processes.processes(str(job.output))


def test_a_second_start_into_the_same_folder_is_refused(job) -> None:
    environment = {**os.environ, processes.MARK: str(job.output)}
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)
    try:
        with pytest.raises(UserError, match="still there"):
            job("speak(0)")
        assert other.poll() is None
        assert job("speak(0)", options=("--takeover",)) == 0
        assert other.wait(timeout=10) == -signal.SIGKILL
    finally:
        other.kill()


def test_a_signal_asks_ranks_to_save_and_ends_the_supervision(job, tmp_path: Path, capfd) -> None:
    rank = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w'), exit(75))); "
        "print(1, flush=True); time.sleep(60)"
    )
    plan = (
        f"p = subprocess.Popen([{sys.executable!r}, '-c', {rank!r}], cwd=output.parent, stdout=subprocess.PIPE, "
        "env={**os.environ, 'RANK': '0'}); p.stdout.readline(); os.kill(os.getppid(), signal.SIGTERM); "
        "p.wait(); speak(75); sys.exit(75)"
    )
    began = time.monotonic()
    assert job(plan) == 75
    assert time.monotonic() - began < 50 and (tmp_path / "saved").exists()
    told = capfd.readouterr().err
    assert "SIGTERM: asked the ranks to save and stop" in told and "1 on this host" in told


def test_a_signal_between_two_attempts_is_a_clean_stop(job, capfd: pytest.CaptureFixture) -> None:
    """It ended with the failed attempt's code, and a scheduler that starts a run again after 75 did not."""
    later = """
import os, signal, sys, time
while '"over"' not in open(sys.argv[2]).read():
    time.sleep(0.05)
time.sleep(2)
os.kill(int(sys.argv[1]), signal.SIGTERM)
"""
    watcher = [sys.executable, "-c", later]
    told = "[str(os.getppid()), str(output / 'ledger.jsonl')]"
    left = f"subprocess.Popen({watcher!r} + {told}, env={{}}, start_new_session=True)"
    assert job(f"save(4); {left}; sys.exit(1)", "speak(0)", options=("--max-restarts", "5", "--backoff", "200")) == 75
    assert len(job.commands) == 1 and "SIGTERM: no restart; --resume goes on" in capfd.readouterr().err


def test_attempts_stand_in_the_ledger(job) -> None:
    assert job("sys.exit(1)", "save(4); speak(75); sys.exit(75)") == 75
    found = account(json.loads(line) for line in (job.output / "ledger.jsonl").read_text().splitlines())
    assert found is not None and [(a.started, a.how) for a in found.attempts] == [(False, "failed"), (False, "stopped")]
    assert found.parts["restart"] > 0 and abs(found.unaccounted) < 0.01


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--hostfle", "hosts", "r.toml"], ["--hostfle", "--hostfile"]),
        (["--max-restarts", "many", "r.toml"], ["--max-restarts many", "whole number"]),
        (["--hostfile", "/no/such", "r.toml"], ["/no/such", "no such file"]),
        (["--launcher", "pdhs"], ["recipe"]),
        (["--num_gpus"], ["--num_gpus needs a value"]),
        (["--no_ssh", "--max-restarts", "2", "r.toml"], ["scheduler"]),
        (["--launcher", "pdhs", "r.toml"], ['"pdsh"']),
        (["--launcher", "openmpi", "r.toml"], ["--launcher openmpi needs --master_addr"]),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    (tmp_path / "recipe.toml").rename(tmp_path / "r.toml")
    training = ["--output", str(tmp_path / "run")] if "r.toml" in arguments else []
    with pytest.raises(UserError) as caught:
        parse([*arguments, *training])
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not (tmp_path / "run").exists()
