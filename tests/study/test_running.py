import fcntl
import sys
import threading
import time

import pytest

from laser_dist.errors import UserError
from laser_dist.study.cells import read
from laser_dist.study.collect import Results
from laser_dist.study.running import CellFailed, Runner, Stopped
from laser_dist.study.slurm import write_arrays


def cells(workspace, method: str):
    return [row for row in Results(workspace).rows if row.cell.method == method]


@pytest.mark.parametrize("jobs", [1, 3])
def test_dev_chooses_and_test_is_measured_of_the_choice_only(make, go, pretended, jobs):
    workspace = make()
    go(workspace, jobs)
    results = Results(workspace)
    assert results.counts()["finished"] == len(results.rows) == 2 + 2 * 3 + 2 * 2
    laser = workspace.study.methods["laser"]
    assert workspace.choice("d", laser) == {"optimizer": {"learning_rate": 2e-4}}
    lost = [row for row in cells(workspace, "laser") if not row.chosen]
    assert [set(read(row.cell.folder / "result.json")["measured"]) for row in lost] == [{"dev/own"}]
    kept = [row for row in cells(workspace, "laser") if row.chosen]
    assert [row.cell.seed for row in kept] == [0, 1]
    assert all(set(row.measured) == {"dev/own", "test/own", "test/six", "test/oracle"} for row in kept)
    assert all("learning_rate=0.0002" in row.name for row in cells(workspace, "both-views"))


def test_a_second_call_has_nothing_to_do(make, go, pretended):
    go(make())
    pretended.calls.clear()
    go(make())
    assert pretended.calls == []


def test_only_what_changed_is_made_anew(make, go, pretended, text):
    go(make())
    pretended.calls.clear()
    said = go(make(text.replace("[methods.contrastive]", "[methods.contrastive]\noptimizer = { warmup = 0.2 }")))
    assert pretended.calls and all("/contrastive/" in call or "untrained" in call for call in pretended.calls)
    assert any("discarded" in line for line in said)
    pretended.calls.clear()
    go(make(rows="other rows"))
    assert sum("training" in call for call in pretended.calls) == 2 * 3 + 2 * 2


def test_a_new_test_measures_and_trains_only_where_the_checkpoint_is_gone(make, go, pretended, text):
    keep = 'keep = "best"\n' + text
    go(make(keep))
    pretended.calls.clear()
    go(make(keep + "[tests.two]\nsteps = 2\nmethods = ['laser']\n"))
    assert [call.split()[0] for call in pretended.calls] == ["measuring"] * 2
    go(make(text))  # keeps nothing
    pretended.calls.clear()
    go(make(text + "[tests.three]\nsteps = 3\nmethods = ['laser']\n"))
    assert [call.split()[0] for call in pretended.calls] == ["training", "measuring"] * 2


def test_another_precision_of_measuring_trains_nothing(make, go, pretended, text):
    keep = 'keep = "best"\n' + text
    go(make(keep))
    pretended.calls.clear()
    go(make('encode_dtype = "bfloat16"\n' + keep))
    chosen = [call for call in pretended.calls if "laser/learning_rate=0.0002" in call]
    assert chosen and not any("training" in call for call in chosen)


def test_a_failed_cell_is_noted_and_stops_no_other(make, go, pretended):
    pretended.fail = lambda call: (
        CellFailed("training", "error: out of memory") if call.startswith("training d/contrastive") else None
    )
    workspace = make()
    said = go(workspace)
    assert any("out of memory" in line for line in said)
    assert {row.state for row in cells(workspace, "contrastive")} == {"failed", "waiting"}
    assert {row.state for row in cells(workspace, "laser")} == {"finished"}
    pretended.fail = lambda call: None
    go(workspace)
    assert Results(workspace).counts()["failed"] == 0


def test_a_seed_that_fails_leaves_the_others(make, go, pretended):
    pretended.fail = lambda call: CellFailed("measuring", "x") if call.endswith("seed-1") and "laser" in call else None
    workspace = make()
    go(workspace)
    assert [row.state for row in cells(workspace, "laser") if row.chosen] == ["finished", "failed"]
    entry = Results(workspace).entry("d", "laser")
    assert entry is not None and len(entry.runs) == 1 and entry.spread("ndcg@10") is None


def test_a_signal_is_no_failure(make, go, pretended):
    pretended.fail = lambda call: Stopped("stopped") if call.startswith("training d/laser") else None
    workspace = make()
    with pytest.raises(Stopped):
        go(workspace)
    assert Results(workspace).counts()["failed"] == 0
    pretended.fail = lambda call: None
    go(workspace)
    assert Results(workspace).counts()["finished"] == len(Results(workspace).rows)


def test_checkpoints_go_when_nothing_needs_them(make, go, pretended):
    workspace = make()
    pretended.fail = lambda call: CellFailed("training", "x") if "offline" in call else None
    go(workspace)
    left = {path.relative_to(workspace.out / "cells" / "d").parts[0] for path in workspace.out.rglob("latest")}
    assert left == {"both-views"}  # its pupil is not done
    pretended.fail = lambda call: None
    go(workspace)
    assert not list(workspace.out.rglob("latest"))


def test_a_dropped_teacher_is_trained_again(make, go, pretended, text):
    go(make(text.replace('teacher = "both-views"\n', "")))
    assert not list((make().out / "cells/d/both-views").rglob("latest"))
    pretended.calls.clear()
    go(make())
    trained = [call for call in pretended.calls if call.startswith("training")]
    assert [call.split("/")[1] for call in trained] == ["both-views", "offline-teacher"] * 2


def test_two_processes_do_not_share_a_part(make, go, pretended):
    workspace = make()
    lock = workspace.out / "cells" / "d" / ".laser.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            go(workspace)


def test_slurm_arrays_follow_the_needs(make, tmp_path):
    study = make().study
    groups = [("d", name) for name in ("bm25", *study.methods)]
    scripts = write_arrays(study, groups, ["laser-dist", "study", "a b.toml"], tmp_path / "jobs")
    texts = [script.read_text() for script in scripts]
    assert ["parts=(" + part + ")" in text for part, text in zip(
        ("d/bm25 d/contrastive d/laser", "d/both-views", "d/offline-teacher"), texts, strict=True)]  # fmt: skip
    assert "--array=0-2" in texts[0] and "'a b.toml'" in texts[0] and "afterok" in texts[1]


@pytest.fixture
def cell(make):
    made = next(row.cell for row in Results(make()).rows if row.cell.method == "laser")
    made.folder.mkdir(parents=True)
    return made


def test_the_last_line_of_a_process_says_why_it_failed(make, cell):
    code = "import sys; print('step 1'); print('error: no memory\\n', file=sys.stderr); sys.exit(3)"
    with pytest.raises(CellFailed, match=r"error: no memory \(exit code 3, .*log.txt\)"):
        Runner(make(), print)._call(cell, "training", [sys.executable, "-c", code])
    assert "step 1" in (cell.folder / "log.txt").read_text()


def test_stop_ends_what_runs_and_begins_nothing(make, cell):
    """What a scheduler's SIGTERM does: the cell's process gets it, and is no failure."""
    runner = Runner(make(), print)

    def when_it_runs() -> None:
        deadline = time.monotonic() + 60
        while not runner.processes and time.monotonic() < deadline:
            time.sleep(0.05)
        runner.stop()

    threading.Thread(target=when_it_runs).start()
    with pytest.raises(Stopped, match="stopped by a signal"):
        runner._call(cell, "training", [sys.executable, "-c", "import time; time.sleep(120)"])
    assert not runner.processes
    with pytest.raises(Stopped, match="not begun"):
        runner._call(cell, "training", [sys.executable, "-c", ""])
