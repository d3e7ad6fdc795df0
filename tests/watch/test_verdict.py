import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from laser_dist.watch import pulse, stacks, verdict
from laser_dist.watch.pulse import Limits, Pulse

BEAT = replace(pulse.identity(), host="gpu-a", step=17, phase="backward", changes=90)


def leave(folder: Path, rank: int, **values: object) -> None:
    own = Pulse(pulse.path_of(folder, rank), replace(BEAT, rank=rank, **values), Limits())
    own.examples([f"query-{rank}"])
    os.close(own._file)


def test_a_line_says_rank_host_step_phase_and_cause(tmp_path: Path) -> None:
    leave(tmp_path, 1)
    told = verdict.of(tmp_path, replace(BEAT, rank=1), "hung", "no progress for 12 s", 0)
    assert told.line == "rank 1 on gpu-a hung in step 17, backward: no progress for 12 s"
    assert told.queries == ["query-1"]
    before = verdict.of(tmp_path, replace(BEAT, rank=1, step=0, phase="load"), "failed", "x", 1)
    assert before.line == "rank 1 on gpu-a failed in load: x" and before.queries == []


def test_there_is_one_verdict(tmp_path: Path) -> None:
    first, second = (verdict.of(tmp_path, replace(BEAT, rank=r), "hung", "x", r) for r in (0, 1))
    assert verdict.write_once(tmp_path / "launch", first)
    assert not verdict.write_once(tmp_path / "launch", second)
    assert verdict.read(tmp_path / "launch") == first
    assert [path.name for path in (tmp_path / "launch").iterdir()] == [verdict.FILE]
    assert verdict.read(tmp_path) is None


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([{}, {"changes": 80}], (1, "died")),  # the one furthest behind
        ([{"code": 1, "blames": 1, "kind": "stopped", "reason": "x"}, {}], (1, "died")),
        ([{"code": 1, "blames": 0, "kind": "failed", "reason": "x"}, {}], (0, "failed")),
        ([{"code": 1, "blames": 1, "kind": "hung"}, {"code": 1, "blames": 1, "kind": "hung"}], (1, "hung")),
        ([{"code": 75}, {"code": 0}], None),
        ([], None),
    ],
)  # fmt: skip
def test_when_nobody_was_left_to_say_it(tmp_path: Path, ranks: list[dict], expected: tuple[int, str] | None) -> None:
    for rank, values in enumerate(ranks):
        leave(tmp_path, rank, **values)
    told = verdict.inferred(tmp_path)
    assert (told and (told.rank, told.kind)) == expected


CRASH = """
import ctypes, sys
from pathlib import Path
from laser_dist.watch.stacks import Stacks
stacks = Stacks(Path(sys.argv[1]))
def here():
    ctypes.string_at(0)
here()
"""


def test_a_crash_says_what_it_was(tmp_path: Path) -> None:
    leave(tmp_path, 1)
    path = stacks.path_of(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", CRASH, str(path)], check=False)
    assert done.returncode == -11
    assert "in here" in path.read_text()
    told = verdict.of(tmp_path, replace(BEAT, rank=1), "died", "its process is gone", 0)
    assert told.cause == "its process is gone: Segmentation fault"
