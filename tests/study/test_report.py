import csv
import io
import tarfile

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laser_dist.study import command
from laser_dist.study.collect import Results, holm
from laser_dist.study.report import write_report
from laser_dist.study.running import CellFailed
from laser_dist.study.store import note, store


@pytest.fixture(scope="module")
def written(finished):
    return finished, write_report(Results(finished), finished.out / "report")


def test_tables_say_what_was_measured(written):
    workspace, file = written
    text, results = file.read_text(), Results(workspace)
    laser = results.entry("d", "laser")
    assert f"| laser | {laser.mean('ndcg@10'):.3f} ± {laser.spread('ndcg@10'):.3f} |" in text
    row = next(line for line in text.splitlines() if line.startswith("| laser |"))
    assert row.split(" | ")[5] == f"{laser.unshared[0]:.3f} ± 0.000"
    assert next(line for line in text.splitlines() if line.startswith("| contrastive |")).split(" | ")[5] == "–"
    comparison, p = results.against_baseline["d", "laser", "own"]
    assert f"{comparison.difference:+.3f} ({comparison.interval[0]:+.3f}" in text and p >= comparison.p_randomisation
    assert comparison.difference == pytest.approx(
        laser.mean("ndcg@10") - results.entry("d", "contrastive").mean("ndcg@10")
    )
    against = results.compare(("d", "bm25"), ("d", "laser"))
    assert "| laser against | ndcg@10 |" in text
    assert f"| BM25 | {against.difference:+.3f} ({against.interval[0]:+.3f}" in text
    assert "| rewrite-then-retrieve |" in text and "### Ablations" in text and "### Asked otherwise" in text
    assert "goes" in text and "% of that way" in text
    assert "**optimizer.learning_rate = 0.0002**" in text and "## Failed" not in text
    assert "All 12 cells are finished." in text


def test_every_chart_and_file_is_there(written):
    workspace, file = written
    names = {path.name for path in file.parent.iterdir()}
    charts = {"methods.png", "latency.png", "curves.png", "loss.png", "steps.png", "rewriting.png"}
    assert names == charts | {"report.md", "results.csv", "tensorboard"}
    assert all(f"]({name})" in file.read_text() for name in charts)
    rows = list(csv.DictReader(io.StringIO((file.parent / "results.csv").read_text())))
    assert {row["state"] for row in rows} == {"finished"} and len(rows) == sum(
        len(row.measured) for row in Results(workspace).rows
    )


def test_hparams_hold_what_differs(written):
    _, file = written
    folders = sorted((file.parent / "tensorboard").iterdir())
    assert len(folders) == 10
    events = EventAccumulator(str(next(f for f in folders if "laser.learning_rate=0.0002.seed-1" in f.name)))
    events.Reload()
    assert "test/own/ndcg@10" in events.Tags()["scalars"]
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer.learning_rate" in start and b"optimizer.eps" not in start


def test_the_same_runs_make_the_same_report(written):
    workspace, file = written
    before = {path.name: path.read_bytes() for path in file.parent.iterdir() if path.is_file()}
    write_report(Results(workspace), file.parent)
    assert before == {path.name: path.read_bytes() for path in file.parent.iterdir() if path.is_file()}


def test_stored_runs_make_the_same_report_elsewhere(written, tmp_path):
    """Without data, checkpoints and backbone, with one command; and the same runs are stored as the same bytes."""
    workspace, file = written
    note(workspace)
    for name in ("a.tar.gz", "b.tar.gz"):
        store(workspace.out, tmp_path / name)
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "out", filter="data")
    assert not [name for name in names if "checkpoints" in name or name.endswith(("recipe.toml", "measure.json"))]
    (tmp_path / "s.toml").write_text(workspace.study.file.read_text())
    assert command.main([str(tmp_path / "s.toml"), "--out", str(tmp_path / "out"), "--report-only"]) == 0
    for name in ("report.md", "results.csv", "methods.png", "curves.png"):
        assert (tmp_path / "out/report" / name).read_bytes() == (file.parent / name).read_bytes(), name


def test_an_ablation_with_fewer_seeds_is_compared_over_those(make, go, pretended, text):
    """Of the other's two seeds the shared one counts: else a seed's luck would look like the method's."""
    workspace = make(text.replace("seeds = [0, 1]", "seeds = [0, 1]\nablation_seeds = [0]"))
    go(workspace)
    results = Results(workspace)
    both, laser = results.entry("d", "both-views"), results.entry("d", "laser")
    assert list(both.by_seed) == [0] and list(laser.by_seed) == [0, 1]
    found = results.compare(("d", "laser"), ("d", "both-views"))
    assert found.difference == pytest.approx(both.values("ndcg@10")[0] - laser.values("ndcg@10")[0])
    assert "All 10 cells are finished." in write_report(results, workspace.out / "report").read_text()


def test_failures_and_gaps_are_shown(make, go, pretended):
    pretended.fail = lambda call: CellFailed("training", "error: it diverged") if "d/contrastive" in call else None
    workspace = make()
    go(workspace)
    text = write_report(Results(workspace), workspace.out / "report").read_text()
    assert "| contrastive | failed |" in text and "error: it diverged" in text and "**Not complete:**" in text


def test_a_report_of_nothing_yet(make):
    workspace = make()
    text = write_report(Results(workspace), workspace.out / "report").read_text()
    assert "| laser | not run |" in text and "waiting" in text and "## Charts" not in text


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_what_is_no_longer_asked_is_not_shown(make, go, pretended, text):
    go(make(text))
    go(make(text.replace("[tests.six]\nsteps = 6", "[tests.six]\nsteps = 7")))
    workspace = make(text.replace("[tests.six]\nsteps = 6", "[tests.nine]\nsteps = 9"))
    shown = write_report(Results(workspace), workspace.out / "report").read_text()
    assert "| laser | oracle |" in shown and "| six |" not in shown and "nine" not in shown
    other = make(text.replace("[tests.six]\nsteps = 6", "[tests.six]\nsteps = 8"))
    assert ("d", "laser", "six") not in Results(other).entries
