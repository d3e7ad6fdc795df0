"""A small study with real processes: what is trained, a failed cell, a second call, and the command's modes."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from laser_dist.data import sample_folder
from laser_dist.errors import UserError
from laser_dist.study import command, running
from laser_dist.testing import tiny_model_folder
from laser_dist.testing.commands import popen

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("study")
    tiny_model_folder(root / "model", tied=True)
    rows = [json.loads(line) for line in (sample_folder() / "train.jsonl").read_text().splitlines()[:12]]
    for row in rows:
        row["query"], row["rationale"] = row["query"][:60], row["rationale"][:120]
        for passage in row["positives"] + row["negatives"]:
            passage["text"] = passage["text"][:60]
    data = root / "small"
    data.mkdir()

    def lines(name: str, made: list[dict]) -> None:
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in made))

    lines("train.jsonl", rows)
    lines("corpus.jsonl", [{"id": f"d{i}", "text": row["positives"][0]["text"]} for i, row in enumerate(rows)])
    for split, some in (("dev_", range(3)), ("", range(3, 8))):
        asked = [{"id": f"q{i}", "text": rows[i]["query"], "rationale": rows[i]["rationale"]} for i in some]
        lines(f"{split}queries.jsonl", asked)
        judged = "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in some)
        (data / f"{split}qrels.tsv").write_text(judged)
    (root / "study.toml").write_text(f"""
seeds = [1]
curve_passages = 4
encode_dtype = "bfloat16"
[base]
model = {{ name = "{root}/model", dtype = "float32", activation_checkpointing = false }}
train = {{ queries_per_rank = 2, max_steps = 2, deepspeed = "zero0" }}
evaluation = {{ every = 1 }}
[datasets.small]
[methods.contrastive]
[methods.laser]
[methods.broken]
model = {{ attention = "flash" }}
[tests.oracle]
rationale = "oracle"
view = "explicit"
methods = ["laser"]
[tests.rewritten]
rationale = "generated"
methods = ["laser"]
[rewriting]
tokens = 4
""")
    return root


def study(setting: Path, *flags: object) -> int:
    arguments = [setting / "study.toml", "--data", setting, "--out", setting / "out", *flags]
    return command.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def ran(setting) -> Path:
    """Parts of it; all but BM25's in processes that are forked."""
    assert study(setting, "--only", "small/bm25") == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(running, "subprocess", SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT))
        assert study(setting, "--only", "small/laser") == 0
        assert study(setting, "--only", "small/broken") == command.EXIT_FAILED
    return setting


def test_cells_are_trained_measured_and_reported(ran):
    out = ran / "out"
    cells = sorted((out / "cells" / "small" / "laser" / "only").iterdir())
    assert [cell.name for cell in cells] == ["seed-1"]
    found = [json.loads((cell / "result.json").read_text())["measured"] for cell in cells]
    assert all(set(tasks) == {"dev/own", "test/own", "test/oracle", "test/rewritten"} for tasks in found)
    assert all(0 <= task["recall_unshared"] <= 1 for task in found[0].values())
    assert all(0 <= task["metrics"]["ndcg@10"] <= 1 and len(task["per_query"]) == 5 - 2 * (name == "dev/own")
               for tasks in found for name, task in tasks.items())  # fmt: skip
    assert {task["dtype"] for task in found[0].values()} == {"bfloat16"}
    rewritten = found[0]["test/rewritten"]
    assert rewritten["seconds_per_query"] > rewritten["seconds_of_writing"] > 0  # its own encoding comes on top
    assert "seconds_of_writing" not in found[0]["test/own"] and found[0]["test/own"]["seconds_per_query"] > 0
    assert not list(out.rglob("model.safetensors"))  # checkpoints are dropped
    curve = [json.loads(line) for line in (cells[0] / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve if "dev/ndcg@10" in row] == [1, 2]
    report = (out / "report" / "report.md").read_text()
    assert {"curves.png", "rewriting.png", "methods.png"} <= {path.name for path in (out / "report").iterdir()}
    assert "| BM25 |" in report and "| contrastive | not run |" in report


def test_a_failed_cell_is_shown_with_its_last_line(ran):
    report = (ran / "out" / "report" / "report.md").read_text()
    assert "| broken | failed |" in report
    assert re.search(r"`small/broken/seed-1`, training: error: .*flash", report)


def test_the_same_again_starts_no_process(ran, monkeypatch):
    monkeypatch.setattr("laser_dist.study.running.subprocess", None)
    assert study(ran, "--only", "small/bm25", "small/laser") == command.EXIT_FAILED  # broken still is


def test_modes_that_run_nothing(ran, capsys, monkeypatch):
    monkeypatch.setattr("laser_dist.study.running.subprocess", None)
    assert study(ran, "--list") == 0
    assert "5 cells: 2 finished, 1 failed, 2 waiting" in capsys.readouterr().out
    assert study(ran, "--dry-run") == 0
    assert "2 runs left to train: 4 steps at" in capsys.readouterr().out
    assert study(ran, "--slurm") == 0
    assert "study-1.slurm" in capsys.readouterr().out
    assert study(ran, "--report-only") == command.EXIT_FAILED


def test_mistakes_before_anything_runs(setting):
    with pytest.raises(UserError, match='small/lasre.*Did you mean "small/laser"'):
        study(setting, "--only", "small/lasre")
    with pytest.raises(UserError, match="--data FOLDER"):
        command.main([str(setting / "study.toml"), "--data", str(setting / "nowhere"), "--out", str(setting / "x")])
    with pytest.raises(UserError, match="not with --list"):
        study(setting, "--list", "--store", setting / "x")
    assert not (setting / "x").exists()
