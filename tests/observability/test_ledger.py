"""Every second of a run is booked once, over all its attempts, whatever ended them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laser_dist.errors import UserError
from laser_dist.observability.ledger import RunLedger, supervised
from laser_dist.run_page.account import account


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_what_is_booked_is_not_training(tmp_path: Path) -> None:
    with RunLedger(tmp_path, start_step=0, total_steps=2, enabled=True) as ledger:
        for step in (1, 2):
            with ledger.booked("evaluate"):
                time.sleep(0.05)
            with ledger.booked("save"):
                time.sleep(0.05)
            ledger.book("data", 0.01)
            ledger.step(step)
    found = account(lines(tmp_path))
    assert found is not None and found.attempts[0].how == "finished"
    assert found.parts["evaluate"] >= 0.1 and found.parts["save"] >= 0.1
    assert found.parts["data wait"] == pytest.approx(0.02)
    assert sum(found.parts.values()) == pytest.approx(found.wall, abs=0.01)


def test_start_counts_from_the_process(tmp_path: Path) -> None:
    """Imports come before the first line of this class, and are part of the wall time."""
    with RunLedger(tmp_path, start_step=0, total_steps=1, enabled=True):
        pass
    start, end = lines(tmp_path)
    assert start["event"] == "start" and start["ready"] > 0
    assert start["time"] + start["ready"] <= end["time"] + 0.05


def test_an_error_and_a_signal_leave_their_end(tmp_path: Path) -> None:
    with pytest.raises(UserError), RunLedger(tmp_path / "..", start_step=0, total_steps=9, enabled=False):
        raise UserError("nothing is written by other ranks")
    assert not (tmp_path / "ledger.jsonl").exists()
    with pytest.raises(UserError), RunLedger(tmp_path, start_step=0, total_steps=9, enabled=True):
        raise UserError("step 3: not finite\nmore")
    with RunLedger(tmp_path, start_step=0, total_steps=9, enabled=True) as ledger:
        ledger.step(1)
    found = account(lines(tmp_path))
    assert found is not None
    assert [(a.how, a.why) for a in found.attempts] == [("failed", "step 3: not finite"), ("stopped", "")]


def test_a_folder_that_is_gone_does_not_end_a_run(tmp_path: Path) -> None:
    with RunLedger(tmp_path / "none", start_step=0, total_steps=1, enabled=True) as ledger:
        ledger.step(1)


_RUN = """
import sys, time
from pathlib import Path
from laser_dist.observability.ledger import RunLedger, supervised
first, total = int(sys.argv[2]), 6
with RunLedger(Path(sys.argv[1]), start_step=first, total_steps=total, enabled=True) as ledger:
    for step in range(first + 1, total + 1):
        time.sleep(0.2)
        if step % 2 == 0:
            with ledger.booked("save"):
                time.sleep(0.1)
        ledger.book("data", 0.05)
        ledger.step(step)
        print(step, flush=True)
        if first == 0 and step == 5:
            time.sleep(600)
"""


def test_ledger_of_a_killed_and_resumed_process_is_its_wall_time(tmp_path: Path) -> None:
    """Held to clocks outside the process: from its start to the kill, and from the restart to the end."""
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    began = time.time()
    first = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(tmp_path), "0"], stdout=subprocess.PIPE, env=path, text=True
    )
    assert first.stdout is not None
    while first.stdout.readline().strip() != "5":
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"step": 6, "ti')  # half a line, as a kill leaves it
    time.sleep(1)
    subprocess.run([sys.executable, "-c", _RUN, str(tmp_path), "4"], check=True, env=path, capture_output=True)
    ended = time.time()

    texts = (tmp_path / "ledger.jsonl").read_text().splitlines()
    whole = [json.loads(text) for text in texts if not text.endswith('"ti')]
    assert len(whole) == len(texts) - 1
    found = account(whole)
    assert found is not None
    assert abs(found.unaccounted) < 0.01 * found.wall
    assert found.wall <= ended - began + 0.05
    assert found.parts["lost"] == pytest.approx(next(x for x in whole if x["step"] == 5)["train"] + 0.05, abs=1e-3)
    assert found.parts["restart"] >= 1  # the pause, and the second process's way to its first step
    assert found.parts["save"] >= 0.3 and found.parts["paused"] == 0
    assert [(a.first, a.last, a.how) for a in found.attempts] == [(0, 5, "no end"), (4, 6, "finished")]


def test_time_between_a_clean_stop_and_the_next_start_is_no_loss() -> None:
    found = account(
        [
            {"event": "start", "time": 100.0, "ready": 10.0, "step": 0, "ranks": 2},
            {"step": 1, "time": 115.0, "train": 4.0, "data": 1.0},
            {"event": "end", "time": 115.0, "step": 1, "how": "stopped"},
            {"event": "start", "time": 1115.0, "ready": 5.0, "step": 1, "ranks": 2},
            {"step": 2, "time": 1125.0, "train": 5.0},
            {"event": "end", "time": 1125.0, "step": 2, "how": "finished"},
        ]
    )
    assert found is not None
    assert found.parts["paused"] == 1000 and found.parts["start"] == 15 and found.parts["restart"] == 0
    assert found.wall == 1025 and found.goodput == pytest.approx(9 / 25)


def test_attempts_that_came_to_no_step_stand_in_the_account(tmp_path: Path) -> None:
    """Killed while the model loaded, they were the run's pause, or nothing if they were the first."""
    found = account(
        [
            {"event": "attempt", "time": 90.0, "step": 0},
            {"event": "over", "time": 98.0, "step": 0, "how": "failed"},
            {"event": "attempt", "time": 99.0, "step": 0},
            {"event": "start", "time": 102.0, "ready": 10.0, "step": 0, "ranks": 2},
            {"step": 1, "time": 115.0, "train": 2.0, "save": 1.0},
            {"event": "end", "time": 115.5, "step": 1, "how": "stopped", "train": 0.5},
            {"event": "over", "time": 116.0, "step": 1, "how": "stopped"},
            {"event": "attempt", "time": 1116.0, "step": 1},
            {"event": "over", "time": 1156.0, "step": 1, "how": "failed"},
            {"event": "attempt", "time": 1160.0, "step": 1},
            {"event": "start", "time": 1161.0, "ready": 5.0, "step": 1, "ranks": 2},
            {"step": 2, "time": 1170.0, "train": 4.0},
            {"event": "over", "time": 1190.0, "step": 1, "how": "failed"},
        ]
    )
    assert found is not None and found.parts == {
        "train": 6.5, "data wait": 0, "save": 1, "evaluate": 0, "rehearsal": 0, "lost": 0, "start": 0,
        "restart": 8 + 1 + 13 + 40 + 4 + 6 + 20, "paused": 1000.5,
    }  # fmt: skip
    assert found.wall == 1100 and found.unaccounted == 0
    ended = [(a.started, a.how, a.first, a.last) for a in found.attempts]
    assert ended == [(False, "failed", 0, 0), (True, "stopped", 0, 1), (False, "failed", 1, 1), (True, "failed", 1, 2)]


def test_what_an_attempt_lost_shows_when_the_next_one_that_starts_begins_before_it() -> None:
    rows = [{"step": step, "time": 110.0 + step, "train": 1.0} for step in (1, 2, 3)]
    found = account(
        [
            {"event": "start", "time": 100.0, "ready": 10.0, "step": 0, "ranks": 1},
            *rows,
            {"event": "attempt", "time": 120.0, "step": 3},
            {"event": "over", "time": 121.0, "step": 3, "how": "failed"},
            {"event": "attempt", "time": 122.0, "step": 3},  # its newest checkpoint is damaged
            {"event": "start", "time": 123.0, "ready": 1.0, "step": 2, "ranks": 1},
        ]
    )
    assert found is not None and (found.parts["train"], found.parts["lost"]) == (2, 1)


def test_a_clock_that_is_set_back_makes_no_part_negative() -> None:
    found = account(
        [
            {"event": "start", "time": 100.0, "ready": 10.0, "step": 0, "ranks": 1},
            {"step": 1, "time": 3715.0, "train": 5.0},
            {"event": "start", "time": 117.0, "ready": 3.0, "step": 1, "ranks": 1},
            {"step": 2, "time": 125.0, "train": 5.0},
        ]
    )
    assert found is not None and found.parts["restart"] == 3 and found.parts["train"] == 10
    assert found.unaccounted == pytest.approx(2)


def test_a_supervisor_writes_beside_the_ranks(tmp_path: Path) -> None:
    output = tmp_path / "new"
    supervised(output, "attempt", 0)
    with RunLedger(output, start_step=0, total_steps=2, enabled=True) as ledger:
        ledger.step(1)
    with (output / "ledger.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')
    supervised(output, "over", 0, how="failed")
    texts = (output / "ledger.jsonl").read_text().splitlines()
    found = account(json.loads(text) for text in texts if not text.endswith('"ti'))
    assert len(texts) == 6 and found is not None
    assert [(a.started, a.how) for a in found.attempts] == [(True, "failed")]


@pytest.mark.parametrize(
    "damage",
    [
        {"time": 1.0},
        {"step": "x", "time": 2.0},
        {"step": 1, "time": None},
        {"step": 1, "time": float("nan"), "train": 3},
        {"step": 1, "time": 120.0, "train": "a lot", "unknown": 3},
    ],
)
def test_lines_that_make_no_sense_are_left_out(damage: dict) -> None:
    start = {"event": "start", "time": 100.0, "ready": 1.0, "step": 0, "ranks": 1}
    found = account([damage, start, damage, {"step": 2, "time": 103.0, "train": 2.0}])
    assert found is not None and found.parts["train"] == 2.0
    assert account([damage]) is None
