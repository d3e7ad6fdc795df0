import json
from pathlib import Path

import pytest

from laser_dist.errors import UserError
from laser_dist.launch.outcome import ATTEMPT, folder, reported


def test_each_rank_leaves_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTEMPT, "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    errors = {0: None, 1: UserError("mend this\nand that"), 2: RuntimeError("lost\npeer")}
    for rank, error in errors.items():
        monkeypatch.setenv("RANK", str(rank))
        try:
            with reported(tmp_path) as outcome:
                outcome.code = 75
                if error:
                    raise error
        except (UserError, RuntimeError) as caught:
            assert caught is error
    told = [json.loads(path.read_text()) for path in sorted(folder(tmp_path, 3).iterdir())]
    assert [(row["rank"], row["code"], row["reason"]) for row in told] == [
        (0, 75, ""),
        (1, 2, "mend this"),
        (2, 1, "RuntimeError: lost"),
    ]
    assert all(row["ranks"] == 4 for row in told)


def test_without_a_supervisor_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ATTEMPT, raising=False)
    with reported(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
