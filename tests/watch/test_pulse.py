import os
from pathlib import Path

import pytest

from laser_dist.watch import pulse
from laser_dist.watch.pulse import FIRST_STEPS, Limits, Pulse


@pytest.fixture
def own(tmp_path: Path) -> Pulse:
    return Pulse(pulse.path_of(tmp_path, 0), pulse.identity(), Limits(steps=3, seconds=5, data_seconds=30))


def test_what_is_written_is_read(own: Pulse, tmp_path: Path) -> None:
    assert own.enter("load") == "start" and own.enter("resume") == "load"
    own.tick(waiting=True)
    own.end(1, blames=3, kind="died", reason="ü" * 1000)
    found = pulse.read(pulse.path_of(tmp_path, 0))
    assert found == own.beat and (found.phase, found.ticks, found.waiting, found.blames) == ("resume", 1, True, 3)
    assert pulse.process(found.pid) == ("R", found.started)
    assert pulse.read(tmp_path / "none") is None
    path = pulse.path_of(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:100])
    assert pulse.read(path) is None


def test_the_first_steps_and_what_is_no_step_take_what_they_take(own: Pulse) -> None:
    patience = []
    for number in range(1, FIRST_STEPS + 2):
        with own.step(number):
            own.enter("forward")
            patience.append(own.beat.patience)
    assert patience[:FIRST_STEPS] == [None] * FIRST_STEPS
    assert patience[-1] == pytest.approx(5, abs=1)
    assert own.beat.step == number and own.beat.phase == "between steps" and own.beat.patience is None
    own.enter("save")
    assert own.beat.patience is None
    own.enter("data")
    assert own.beat.patience == 30


def test_a_median_step_counts_three_times(own: Pulse) -> None:
    own.seconds.extend([2.0] * 20)
    with own.step(21):
        pass
    own.enter("backward")
    assert own.beat.patience == own.beat.brief == pytest.approx(11)


def test_an_error_leaves_step_and_phase(own: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "current", own)
    with pytest.raises(RuntimeError), pulse.step(9), pulse.phase("data"), pulse.phase("wait"):
        raise RuntimeError
    assert (own.beat.step, own.beat.phase) == (9, "wait")


def test_the_queries_at_hand(own: Pulse, tmp_path: Path) -> None:
    path = pulse.path_of(tmp_path, 0)
    assert pulse.read_examples(path) == (0, [])
    own.beat.step = 4
    own.examples(["a", "ü\n"])
    assert pulse.read_examples(path) == (4, ["a", "ü\n"])
    own.examples([f"a rather long name of a query {i}" for i in range(1000)])
    step, ids = pulse.read_examples(path)
    assert step == 4 and 10 < len(ids) < 1000
    own.enter("forward")  # one does not overwrite the other
    assert pulse.read_examples(path)[0] == 4 and pulse.read(path).phase == "forward"


def test_a_full_disk_does_not_end_a_run(own: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    own.enter("forward")
    own.tick(waiting=False)


def test_nobody_watches_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "current", None)
    with pulse.step(1), pulse.phase("save"):
        pulse.examples(["a"])
