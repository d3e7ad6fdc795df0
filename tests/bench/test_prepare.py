import json

import pytest

from laser_dist.bench.prepare import main, write_rows
from laser_dist.data.preparation.prepare import main as prepare
from laser_dist.errors import UserError


def test_it_measures_a_whole_run_and_leaves_only_the_report(tmp_path, capsys):
    options = ["--rows", "1000", "--workers", "1", "--negatives", "1", "--folder", str(tmp_path)]
    assert main([*options, "--out", str(tmp_path / "report.json")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("prepare", "check"):
        assert report[name]["rows_per_second"] == pytest.approx(1000 / report[name]["seconds"])
        assert 50 < report[name]["mb_peak"] < 5000
    assert "1,000 rows" in capsys.readouterr().out


def test_rows_are_good_and_the_same_every_time(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name, 50, 2)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    arguments = ["--source", str(tmp_path / "a.jsonl"), "--duplicate-queries", "error", "--out", str(tmp_path / "out")]
    assert prepare(arguments) == 0


def test_too_few_rows_to_measure():
    with pytest.raises(UserError, match="--rows must be at least 1000"):
        main(["--rows", "10"])
