"""Whole runs of a tiny model over data that comes from a failing server, is damaged, or goes on in other batches."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from laser_dist.data import sample_folder
from laser_dist.testing import run_command, tiny_model_folder
from laser_dist.testing.faulty_server import FaultyServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and 24 training examples in four shards."""
    root = tmp_path_factory.mktemp("setting")
    tiny_model_folder(root / "model", tied=True)
    rows = [json.loads(line) for line in (sample_folder() / "train.jsonl").read_text().splitlines()[:24]]
    for row in rows:  # short texts: these tests are about the data's way
        row["query"], row["rationale"] = row["query"][:60], row["rationale"][:120]
        for passage in row["positives"] + row["negatives"]:
            passage["text"] = passage["text"][:60]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    laser_dist("prepare", "--source", root / "train.jsonl", "--out", root / "shards", "--shard-examples", 6)
    (root / "recipe.toml").write_text(
        f"""
[model]
name = "{root}/model"
dtype = "float32"
[data]
train = "{root}/shards"
[train]
queries_per_rank = 2
max_steps = 6
deepspeed = "zero3-test"
[checkpoint]
every = 2
"""
    )
    return root


def laser_dist(*arguments: object, ranks: int = 0, check: bool = True) -> subprocess.CompletedProcess:
    result = run_command(*arguments, ranks=ranks, env={"OMP_NUM_THREADS": "1"})
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder: Path, step: int) -> dict:
    return json.loads((folder / f"checkpoints/step-{step:06d}/trainer.json").read_text())


@pytest.fixture(scope="module")
def whole(setting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run from disk."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    laser_dist("train", setting / "recipe.toml", "--output", folder, "--checkpoint.keep", 9)
    return folder


@pytest.fixture
def damaged(setting: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(setting / "shards", folder)
    (folder / "shard-000001.tar").write_bytes(b"")
    return folder


def test_damage_is_skipped_reported_and_counted_on_all_ranks(setting: Path, damaged: Path, tmp_path: Path) -> None:
    flags = (
        "--data.train",
        damaged,
        "--data.on-error",
        "skip",
        "--data.max-skipped",
        0.3,
        "--output",
        tmp_path / "run",
    )
    laser_dist("train", setting / "recipe.toml", *flags, ranks=2)
    [line] = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    report = json.loads(line)
    assert report["shard"] == str(damaged / "shard-000001.tar") and report["examples"] == 6
    assert "its sha256 differs" in report["reason"] and report["rank"] in (0, 1) and report["member"] is None
    last = rows(tmp_path / "run")[-1]
    assert (last["step"], last["data/skipped_shards"], last["data/skipped_examples"]) == (6, 1, 6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.on-error", "stop"), "shard-000001.tar has 0 bytes"),
        (("--data.on-error", "skip", "--data.max-skipped", "0.2"), "6 of 24 training examples are damaged"),
    ],
)
def test_damage_ends_all_ranks_with_one_message(
    setting: Path, damaged: Path, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    flags = ("--data.train", str(damaged), "--output", str(tmp_path / "run"), *flags)
    result = laser_dist("train", setting / "recipe.toml", *flags, ranks=2, check=False)
    assert result.returncode != 0
    assert words in result.stdout + result.stderr and "Traceback" not in result.stdout + result.stderr


def test_a_run_from_a_failing_server_equals_the_run_from_disk(setting: Path, whole: Path, tmp_path: Path) -> None:
    server = FaultyServer(setting / "shards")
    for number, faults in enumerate((["500", "reset"], ["truncated"], ["stall"], ["altered", "503"])):
        server.faults[f"shard-{number:06d}.tar"] = faults
    flags = ("--data.train", server.url, "--data.cache", tmp_path / "cache", "--data.timeout", 1)
    laser_dist("train", setting / "recipe.toml", "--output", tmp_path / "run", *flags)
    server.close()
    assert [row["loss/total"] for row in rows(tmp_path / "run")] == [row["loss/total"] for row in rows(whole)]


def test_a_checkpoint_says_where_the_data_goes_on(whole: Path) -> None:
    assert [state(whole, step)["position"] for step in (2, 4, 6)] == [4, 8, 12]


def test_a_resumed_run_goes_on_at_its_position_in_other_batches(setting: Path, whole: Path, tmp_path: Path) -> None:
    """Two steps of 2 queries, then steps of 4: positions 4, 8, 12, 16; the number of loaders may change, too."""
    shutil.copytree(whole, tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:06d}")
    flags = ("--resume", "--train.queries-per-rank", 4, "--data.workers", 2, "--checkpoint.keep", 9)
    laser_dist("train", setting / "recipe.toml", "--output", tmp_path / "run", *flags)
    assert [state(tmp_path / "run", step)["position"] for step in (2, 4, 6)] == [4, 12, 20]
    assert rows(tmp_path / "run")[-1]["train/epoch"] == 16 / 24
