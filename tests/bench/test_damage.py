"""The damage benchmark: what it reports is what happens, and our own reader gives out no wrong row."""

import json

import pytest

from laser_dist.bench import damage
from laser_dist.cli import main
from laser_dist.testing import tiny_model_folder


def test_ours_notices_all_and_a_stock_reader_two_of_the_eight(tmp_path):
    readings = {(r.damage, r.reader): r for r in damage.read_all(tmp_path)}
    assert len(readings) == 2 * len(damage.DAMAGES) == 28
    for kind in damage.DAMAGES:
        ours = readings[kind, "ours"]
        assert ours.noticed.startswith("UserError: shard ") and not ours.altered and not ours.lost, ours
    eight = list(damage.DAMAGES)[:8]
    noticed = [kind for kind in eight if readings[kind, "webdataset"].noticed]
    assert noticed == ["cut in a payload", "cut in the last payload"]
    silent = [readings[kind, "webdataset"] for kind in eight if kind not in noticed]
    assert all(reading.lost or reading.altered for reading in silent)


def test_a_reader_that_gives_out_a_wrong_row_is_told(tmp_path):
    written = {"a": b"1", "b": b"2"}
    reading = damage.read("x", "ours", iter([("a", b"1"), ("b", b"3")]), written)
    assert reading.first_wrong and reading.altered == 1 and not reading.noticed
    assert damage.read("x", "ours", iter([("a", b"1")]), written).lost == 1


def test_the_command_reports_and_writes(tmp_path, capsys):
    model = tiny_model_folder(tmp_path / "model")
    arguments = ["--model", str(model), "--examples", "100", "--rounds", "1", "--workers", "0"]
    assert main(["bench", "damage", *arguments, "--out", str(tmp_path / "new" / "damage.json")]) == 0
    told, result = capsys.readouterr().out, json.loads((tmp_path / "new" / "damage.json").read_text())
    assert "ours: 14 of 14 noticed before a wrong row came out (8 of the first 8)" in told
    assert "(2 of the first 8)" in told
    assert all(result["later"].values()) and len(result["later"]) == 2
    assert result["cost"]["share_of_packed"] < 1 and result["cost"]["packed"]["examples_per_second"] > 0
    assert len(result["cost"]["rows"]["pairs"]) == 1


@pytest.mark.parametrize("arguments", [["--examples", "1"], ["--rounds", "0"], ["--workers", "-1"]])
def test_what_cannot_be_measured_is_refused(arguments, capsys):
    assert main(["bench", "damage", *arguments]) == 2
    assert f"{arguments[0]} {arguments[1]}: must be at least" in capsys.readouterr().err
