import json
from pathlib import Path

import pytest

from laser_dist.bench.faults.acts import ACTS
from laser_dist.bench.faults.command import markdown
from laser_dist.bench.faults.data import DAMAGES
from laser_dist.bench.faults.run import Ended
from laser_dist.bench.faults.table import ROWS, STEPS
from laser_dist.cli import main

KINDS = {"", "failed", "died", "stopped", "locked", "hung"}


def test_every_row_is_one_of_its_own_and_can_be_run() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 40
    for row in ROWS:
        assert row.act in ACTS or (row.shards in DAMAGES) + bool(row.server) + bool(row.machine) == 1, row.name
        assert row.kind in KINDS and row.rank in (0, 1) and 0 <= row.step < STEPS
        assert row.ends in ("recovered", "stopped") or not row.kind, row.name
    assert {row.act for row in ROWS} >= set(ACTS)


def test_rows_are_listed_and_chosen(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "faults", "--list", "--only", "killed | save"]) == 0
    assert capsys.readouterr().out == "killed | save, step 4 | rank 1: recovered\n"
    assert main(["bench", "faults", "--only", "kiled"]) == 2
    assert "--list" in capsys.readouterr().err


def test_a_row_that_ended_otherwise_is_told() -> None:
    right = Ended("a | b | c", "recovered", 0, 2, None, "", known=0.2, gone=3.0)
    wrong = Ended("d | e | f", "unharmed", 1, 1, None, "", problems=["exit code 1"])
    table = markdown([right, wrong])
    assert table.startswith("1 of 2 rows ended as they must")
    assert "| a | b | c | recovered | right | 0.2 | 3.0 |  |" in table and "| exit code 1 |" in table


@pytest.mark.slow
def test_real_runs_recover_and_name_the_rank(tmp_path: Path) -> None:
    """Whole runs under the supervisor: the restarted ones end with the weights of one that nothing struck."""
    main(["bench", "faults", "--only", "killed | backward", "stopped | backward", "--out", str(tmp_path)])
    ended = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert [end["verdict"]["kind"] for end in ended] == ["died", "stopped"]
    late = ("known after", "gone ")  # how soon is for the benchmark, on a machine that does nothing else
    for end in ended:
        assert [problem for problem in end["problems"] if not problem.startswith(late)] == [], end["output"][-30:]
