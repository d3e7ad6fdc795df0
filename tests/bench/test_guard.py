import json

import pytest

from laser_dist.cli import main


def test_rounds_with_and_without_the_guard_are_measured(tmp_path, capsys):
    out = tmp_path / "guard.json"
    flags = ("--no-anomalies", "--clean", "0", "--rounds", "1", "--steps", "2")
    assert main(["bench", "guard", *flags, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["overhead"]["step_seconds"] > 0
    assert "of a step's CPU time" in capsys.readouterr().out


def test_clean_steps_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("laser_dist.bench.guard.VARIANTS", (("short", 1.0, 1, ()),))
    assert main(["bench", "guard", "--no-anomalies", "--clean", "5", "--rounds", "0"]) == 0
    assert "0 false alarms in 5 clean steps" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--clean", "-1"), ("--steps", "0"), ("--queries", "1")])
def test_values_that_cannot_be_measured_with_are_refused(flags, capsys):
    assert main(["bench", "guard", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
