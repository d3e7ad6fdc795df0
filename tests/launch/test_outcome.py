import json
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from laser_dist.errors import UserError
from laser_dist.launch.outcome import ATTEMPT, Asked, folder, reported, say
from laser_dist.watch.verdict import Verdict


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


def test_a_signal_before_the_first_step_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTEMPT, "1")
    with reported(tmp_path) as outcome:
        raise Asked("SIGTERM came before the first step")
    assert outcome.code == 75
    [told] = [json.loads(path.read_text()) for path in folder(tmp_path, 1).iterdir()]
    assert (told["code"], told["reason"]) == (75, "SIGTERM came before the first step")


@pytest.mark.parametrize("caused_elsewhere", [True, False])
def test_a_message_about_a_lost_peer_gets_no_users_code(tmp_path: Path, caused_elsewhere: bool) -> None:
    """`cannot load its weights: connection closed` ended a run for good that a restart would have mended."""
    left: list[int] = []

    def leave(code: int, reason: str) -> NoReturn:
        left.append(code)
        raise SystemExit(code)

    fail = lambda error, code, reason, shown: 1 if caused_elsewhere else code  # noqa: E731
    watchdog = SimpleNamespace(active=True, fail=fail, leave=leave, start=lambda: None, close=lambda code: None)
    with pytest.raises(SystemExit if caused_elsewhere else UserError), reported(tmp_path, watchdog):  # type: ignore[arg-type]
        raise UserError("cannot load its weights")
    assert left == ([1] if caused_elsewhere else [])


def test_without_a_supervisor_the_last_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv(ATTEMPT, raising=False)
    told = Verdict(1, "here", 17, "forward", "stopped", "SIGSTOP", told_by=0)
    say(tmp_path, told)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step-000016\n")
    say(tmp_path, told)
    first, second = capsys.readouterr().err.splitlines()
    assert "rank 1 on here stopped in step 17, forward: SIGSTOP; there is no checkpoint yet" in first
    assert "--resume goes on from step-000016; stacks of all ranks: " in second
    monkeypatch.setenv(ATTEMPT, "1")
    say(tmp_path, told)
    assert capsys.readouterr().err == ""
