import json

import pytest

from laser_dist.cli import main


def test_clean_steps_and_rounds_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("laser_dist.bench.guard.VARIANTS", (("short", 1.0, 1, ()),))
    out = tmp_path / "guard.json"
    flags = ("--no-anomalies", "--clean", "5", "--rounds", "1", "--steps", "2")
    assert main(["bench", "guard", *flags, "--out", str(out)]) == 0
    result, told = json.loads(out.read_text()), capsys.readouterr().out
    assert result["clean"][0]["steps"] == 5 and result["clean"][0]["alarm"] == ""
    assert "0 false alarms in 5 clean steps" in told and "of a step's CPU time" in told


@pytest.mark.parametrize("flags", [("--clean", "-1"), ("--steps", "0"), ("--queries", "1")])
def test_values_that_cannot_be_measured_with_are_refused(flags, capsys):
    assert main(["bench", "guard", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
