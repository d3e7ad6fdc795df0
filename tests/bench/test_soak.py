import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from laser_dist.bench.faults.acts import ACTS as KNOWN
from laser_dist.bench.soak import rank
from laser_dist.bench.soak.judge import hold
from laser_dist.bench.soak.rank import Pace, fits
from laser_dist.bench.soak.run import Strike, _wrong
from laser_dist.bench.soak.strikes import ACTS, Act
from laser_dist.cli import main
from laser_dist.testing import run_command
from laser_dist.watch.pulse import Beat
from laser_dist.watch.verdict import Verdict

SEED = 1
"""With it the loader is first."""
BEAT = Beat(1, 2, "here", 1, 1, 1, step=7, phase="forward", patience=6.0)


@pytest.mark.slow
def test_a_struck_run_ends_as_one_that_nothing_struck(tmp_path: Path) -> None:
    """A failure, and a request to stop: the same weights and losses, and every second accounted for.

    The loader dies in a step, and the job is asked to stop as soon as it has started again.
    """
    flags = ("--minutes", 0.07, "--pace", 0.5, "--every", 0.5, "--faults", 2, "--seed", SEED)
    done = run_command("bench", "soak", *flags, "--only", "loader killed", "SIGTERM", "--out", tmp_path, timeout=900)
    assert (tmp_path / "soak.json").is_file(), done.stdout + done.stderr
    told = json.loads((tmp_path / "soak.json").read_text())
    problems = [text for text in told["problems"] if not text.startswith("the ledger is")]  # to 1 %, on an idle machine
    assert problems == [], done.stdout + done.stderr
    assert [fault["act"] for fault in told["faults"]] == ["loader killed", "SIGTERM to the job"] and told["jobs"] == 2
    assert told["weights equal"] and told["steps compared"] == 8 and told["values compared"] > 100
    assert told["ledger"]["restart"] > 0 and abs(sum(told["ledger"].values()) - told["wall"]) < 10
    assert "equal to those without faults" in (tmp_path / "soak.md").read_text()
    assert (tmp_path / "run.html").is_file() and list(tmp_path.glob("jobs/*/attempt-*/stacks-*.txt"))


def test_every_act_is_known_and_has_its_end() -> None:
    assert len({act.name for act in ACTS}) == len(ACTS)
    for act in ACTS:
        assert bool(act.number) != (act.name in KNOWN), act
        assert bool(act.kind) == (act.ends in ("restart", "mended")), act
        fits(act.when, BEAT)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--every", "-1"], "--every"),
        (["--minutes", "0.01"], "no time for two steps"),
        (["--faults", "-1"], "--faults"),
        (["--only", "kiled"], "SIGKILL"),
    ],
)
def test_what_cannot_be_tried_is_refused(flags: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "soak", *flags]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("when", "here", "saving", "loading"),
    [
        ("any", True, True, True),
        ("met", True, True, False),
        ("step", True, False, False),
        ("watched", True, False, False),
        ("unwatched", False, True, True),
        ("save", False, True, False),
    ],
)
def test_a_strike_waits_for_its_phase(when: str, here: bool, saving: bool, loading: bool) -> None:
    phases = (BEAT, replace(BEAT, phase="save", patience=None), replace(BEAT, phase="start", patience=None))
    assert [fits(when, beat) for beat in phases] == [here, saving, loading]


def test_steps_take_their_share_of_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(rank, "time", clock)
    pace = Pace(until=110.0, steps=10, longest=2.0)
    for step in (1, 2):
        for phase in ("bookkeeping", "data", "wait", "data", "forward", "loss", "backward", "optimizer", "save"):
            pace.wait(replace(BEAT, step=step, phase=phase))
    assert now[0] == pytest.approx(102.0)
    now[0] = 109.0  # a restart took seven seconds, and step 2 comes again
    for phase in ("data", "wait", "data", "forward", "loss", "backward", "optimizer"):
        pace.wait(replace(BEAT, step=3, phase=phase))
    assert now[0] == pytest.approx(109.0 + 1 / 8)
    late = Pace(until=100.0, steps=10, longest=2.0)
    late.wait(BEAT)
    assert now[0] == pytest.approx(109.125)


DIED = Verdict(1, "here", 3, "forward", "died", "its process is gone", told_by=0)


@pytest.mark.parametrize(
    ("ends", "kind", "told", "lines", "code", "wrong"),
    [
        ("restart", "died", DIED, 2, 0, ""),
        ("restart", "died", DIED, 1, 1, ""),  # the supervisor saw no use in another attempt
        ("restart", "died", DIED, 1, 2, "exit code 2"),
        ("restart", "died", DIED, 0, 1, "did not say"),
        ("restart", "died", replace(DIED, rank=0), 2, 0, "verdict: rank 0"),
        ("restart", "hung", DIED, 2, 0, "verdict: rank 1 on here died"),
        ("restart", "died", None, 2, 0, "verdict: none"),
        ("requeue", "", None, 1, 75, ""),
        ("requeue", "", None, 2, 0, "exit code"),
        ("requeue", "", DIED, 1, 75, "verdict: rank 1"),
        ("mended", "died", DIED, 1, 2, ""),
        ("mended", "died", replace(DIED, rank=0, cause="cannot be saved: rank 1: no space"), 1, 2, ""),
        ("mended", "died", replace(DIED, rank=0, cause="cannot be saved: rank 0: no space"), 1, 2, "verdict: rank 0"),
        ("nothing", "", None, 0, None, ""),
        ("nothing", "", None, 1, 0, ""),  # it finished
        ("nothing", "", DIED, 2, None, "it ended the attempt"),
    ],
)
def test_a_wrong_end_is_told(
    ends: str, kind: str, told: Verdict | None, lines: int, code: int | None, wrong: str
) -> None:
    act = Act("x", ends, kind)  # type: ignore[arg-type]
    job = SimpleNamespace(verdict=lambda attempt: told, verdicts=["launch: attempt"] * lines, code=code)
    found = _wrong(Strike(1, act, 1, 1, 1, 3, "forward", 0.0), job)  # type: ignore[arg-type]
    assert bool(found) == bool(wrong) and wrong in "; ".join(found)


def test_other_weights_losses_and_seconds_are_found(tmp_path: Path) -> None:
    ledger = [
        {"event": "start", "time": 100.0, "ready": 10.0, "step": 0, "ranks": 2},
        {"event": "end", "time": 200.0, "step": 2, "how": "finished", "train": 90.0},
    ]
    for name in ("whole", "struck"):
        folder = tmp_path / name / "checkpoints/step-000002"
        folder.mkdir(parents=True)
        files = {"model/model.safetensors": {"sha256": "a"}}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
        rows = [{"step": s, "loss/total": 1 / s, "time/data": s} for s in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / name / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger))
    struck, whole = tmp_path / "struck", tmp_path / "whole"
    held = hold(struck, whole, 2, wall=101.5, jobs=1)
    assert held.problems == [] and (held.steps, held.scalars) == (2, 2)
    assert hold(struck, whole, 2, wall=103.0, jobs=1).problems == ["the ledger is +3.0 s from 103.0 s"]
    with (struck / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "loss/total": 0.5, "time/data": 9}) + "\n")
    assert hold(struck, whole, 2, wall=100.0, jobs=1).other == ["loss/total of step 2"]  # it stands there twice
    (struck / "checkpoints/step-000002/manifest.json").write_text(json.dumps({"files": {}}))
    assert "other weights than without faults" in hold(struck, whole, 2, wall=100.0, jobs=1).problems
