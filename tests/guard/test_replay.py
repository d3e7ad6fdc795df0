"""A dump runs again in one process: the same numbers, the rows to blame, and an answer."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from laser_dist.cli import main
from laser_dist.errors import UserError
from laser_dist.guard.dump import Report
from laser_dist.guard.replay import Settings, largest_difference, replayed


@pytest.fixture(scope="module")
def dump(on_two_ranks) -> Path:
    """Two ranks, ZeRO-3, two micro-batches in chunks, LoRA with dropout; stopped in its third step."""
    assert "laser-dist replay" in on_two_ranks["stopped"], on_two_ranks["stopped"]
    return next((on_two_ranks["output"] / "stopped" / "alarms").iterdir())


def test_terms_and_gradients_are_those_of_the_run(dump: Path) -> None:
    """With dropout and chunks, which draw random numbers, from two ranks that each drew their own."""
    report = Report.read(dump)
    again, weights = replayed(Settings(dump=dump), report)
    assert weights.exact and report.step == 3
    assert largest_difference(report, again) < 1e-5
    for table, other in zip(report.tables, again.tables, strict=True):
        for row, new in zip(table, other, strict=True):
            assert new["shortest"] == pytest.approx(row["shortest"], rel=1e-5)
            assert new["train/positive_mean_rank"] == row["train/positive_mean_rank"]
    assert sorted(row.query_id for row in again.rows if row.micro_batch == 0) == sorted(
        query for of_rank in report.query_ids for query in of_rank[0]
    )
    losses = [row.loss for row in again.rows if (row.rank, row.micro_batch) == (1, 0)]
    assert sum(losses) / len(losses) == pytest.approx(report.tables[0][1]["loss/infonce_latent"], rel=1e-4)


def test_a_checkpoint_before_the_step_serves_where_no_weights_were_kept(dump: Path, tmp_path: Path) -> None:
    shutil.copytree(dump.parents[1], tmp_path / "run")
    copied = tmp_path / "run" / "alarms" / dump.name
    shutil.rmtree(copied / "model")
    report = Report.read(copied)
    again, weights = replayed(Settings(dump=copied), report)
    assert weights.exact and "step-000002" in weights.told
    assert largest_difference(report, again) < 1e-5
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    _, older = replayed(Settings(dump=copied), report)
    assert not older.exact and "1 updates before the alarm" in older.told


def test_the_command_shows_rows_and_answers(dump: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "replay.json"
    assert main(["replay", str(dump), "--rows", "3", "--dtype", "float64", "--out", str(out)]) == 0
    told, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "Does the anomaly come back? yes" in told and "3 of 8" in told
    assert result["reproduced"] is True and len(result["rows"]) == 8
    gradients = [row["gradient"] for row in result["rows"]]
    assert gradients == sorted(gradients, reverse=True)
    assert result["gradient_norm"] > 0


def test_what_does_not_come_back_is_said(dump: Path, tmp_path: Path, capsys) -> None:
    """A NaN that a rank's memory made is not in the examples."""
    copied = tmp_path / "dump"
    shutil.copytree(dump, copied)
    report = json.loads((copied / "alarm.json").read_text())
    report |= {"rule": "finite", "term": "kl_output"}
    (copied / "alarm.json").write_text(json.dumps(report))
    assert main(["replay", str(copied)]) == 0
    assert "come back? no: all terms and lengths are numbers" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["alarm.json", "rank_00001.safetensors"])
def test_what_is_no_dump_is_refused_by_name(dump: Path, tmp_path: Path, damage: str) -> None:
    copied = tmp_path / "dump"
    shutil.copytree(dump, copied)
    (copied / damage).unlink()
    with pytest.raises(UserError, match=damage):
        replayed(Settings(dump=copied), Report.read(copied))


def test_wrong_arguments_are_refused(dump: Path, tmp_path: Path, capsys) -> None:
    assert main(["replay", str(dump), "--checkpoint", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["replay", str(dump), "--rows", "0"]) == 2
    assert torch.get_default_dtype() == torch.float32
