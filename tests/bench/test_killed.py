import json
from dataclasses import replace

import pytest

from laser_dist.bench.killed_runs import Life
from laser_dist.bench.saving_ranks import Trial
from laser_dist.cli import main
from laser_dist.errors import UserError


@pytest.mark.slow
def test_a_few_saves_are_killed_and_all_that_loads_is_whole(tmp_path, capsys):
    out = tmp_path / "saves.json"
    assert main(["bench", "killed-saves", "--kills", "4", "--seed", "3", "--out", str(out)]) == 0
    result, told = json.loads(out.read_text()), capsys.readouterr().out
    assert {row["how"] for row in result["trials"]} == {"moment", "byte", "call", "full disk"}
    assert sum(row["hit"] for row in result["trials"]) >= 2 and "none was a mixture" in told


@pytest.mark.slow
def test_a_run_is_killed_and_stays_the_same(tmp_path, capsys):
    out = tmp_path / "runs.json"
    assert main(["bench", "killed-runs", "--kills", "1", "--steps", "6", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["kills"] == 1 and result["steps compared"] >= 2 * 6
    assert "all are the whole run's" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["killed-saves", "killed-runs"])
@pytest.mark.parametrize("flag", ["--kills", "--ranks"])
def test_values_that_nothing_can_be_tried_with_are_refused(command, flag, capsys):
    assert main(["bench", command, flag, "0"]) == 2
    assert flag in capsys.readouterr().err


def test_a_run_without_a_checkpoint_cannot_be_resumed(capsys):
    assert main(["bench", "killed-runs", "--steps", "1"]) == 2
    assert "--steps 1: must be at least 2" in capsys.readouterr().err


def test_the_checks_can_fail(tmp_path):
    """Each of them, on what a trial must not leave behind."""
    trial = Trial(tmp_path, ranks=2, stage=3, how="moment", victim=-1, where=0, save=0)
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    trial.check([-9, -9], "")
    (tmp_path / "checkpoints" / "latest").write_text("step-000002")
    with pytest.raises(UserError, match="latest names 'step-000002', which is not complete"):
        trial.check([-9, -9], "")
    (tmp_path / "published").write_text("2")
    with pytest.raises(UserError, match="step 2 was published, and None is the newest complete"):
        trial.check([-9, -9], "")
    for how, codes in (("moment", [1, 0]), ("full disk", [2, 1]), ("full disk", [-9, 2])):
        with pytest.raises(UserError, match="ranks ended with"):
            replace(trial, how=how).check(codes, "")
    (tmp_path / "wrong").write_text("rank 0: what loads as step 2 is not the state of that step")
    with pytest.raises(UserError, match="is not the state of that step"):
        trial.check([-9, -9], "")


def test_another_number_in_a_resumed_run_is_found(tmp_path):
    life = Life(tmp_path, "run", 3, 12)
    life.output.mkdir()
    whole = {"0": [{"step": step, "loss": 1.0 / step} for step in (1, 2)]}
    rows = [dict(row) for row in whole["0"]]
    rows[1]["loss"] += 1e-16
    (life.output / "rank-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    with pytest.raises(UserError, match="rank 0, step 2: loss differ"):
        life.compare(whole, 1, whole_too=False)
