"""checkpoint.asynchronous: training goes on while a checkpoint is hashed, and a crash meanwhile costs that one only."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laser_dist.config import CheckpointConfig
from laser_dist.data import sample_folder
from laser_dist.distributed.checkpoint import CheckpointStore
from laser_dist.testing import RankFailed, run_distributed, tiny_model_folder


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("asynchronous")
    tiny_model_folder(root / "model", tied=True)
    lines = (sample_folder() / "train.jsonl").read_text().splitlines()[:12]
    (root / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    (root / "recipe.toml").write_text(
        f"""
[model]
name = "{root}/model"
dtype = "float32"
[data]
train = "{root}/shards"
[text]
max_query_tokens = 40
max_passage_tokens = 40
max_explicit_tokens = 80
[train]
queries_per_rank = 2
max_steps = 6
deepspeed = "zero3-test"
[checkpoint]
every = 2
keep = 9
"""
    )
    run_distributed(prepare, 1, root)
    return root


def prepare(rank: int, world_size: int, root: Path) -> int:
    from laser_dist.cli import main

    return main(["prepare", "--source", str(root / "train.jsonl"), "--out", str(root / "shards")])


def trained(rank: int, world_size: int, root: Path, name: str, flags: list[str], killed: bool) -> list[list[str]]:
    """Train; rank 1's hashes of a checkpoint are ready one step after it, or never. Checkpoints after each step."""
    from laser_dist.distributed import manifest
    from laser_dist.ds_config import resolve
    from laser_dist.recipe import load_config
    from laser_dist.trainer import Trainer

    config = load_config([str(root / "recipe.toml"), "--output", str(root / name), *flags])
    trainer = Trainer(config, resolve(config.train.deepspeed, config))
    hash_of, step, after_step = manifest.sha256, trainer.step, trainer._after_step
    ready = threading.Event()
    ready.set()
    seen: list[list[str]] = []

    def late(path: Path) -> str:
        assert not (rank == 1 and config.checkpoint.asynchronous) or ready.wait(60)
        return hash_of(path)

    def next_step(number, batches):
        if number == 0:
            ready.clear()
        elif number in (2, 4) and not (killed and number == 4):  # the steps after those that save
            ready.set()
        elif killed and number == 5 and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(number, batches)

    def observed(number: int) -> bool:
        if config.checkpoint.asynchronous and number in (2, 4):
            if trainer.store.sealing:
                trainer.store.sealing.thread.join(60)
            ready.clear()
        elif number == 6:
            ready.set()
        done = after_step(number)
        seen.append([path.name for path in trainer.store.steps()])
        return done

    manifest.sha256, trainer.step, trainer._after_step = late, next_step, observed
    trainer.fit()
    return seen


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_hashed(setting: Path) -> None:
    """And its numbers are those of a run that waits."""
    waiting = run_distributed(trained, 2, setting, "waiting", [], False)[0]
    assert waiting == [[], ["step-000002"], ["step-000002"], *[["step-000002", "step-000004"]] * 2,
                       ["step-000002", "step-000004", "step-000006"]]  # fmt: skip
    flags = ["--checkpoint.asynchronous"]
    seen = run_distributed(trained, 2, setting, "going-on", flags, False)[0]
    assert seen[1] == [] and seen[-1] == waiting[-1]  # step 2 has ended without its checkpoint
    store = CheckpointStore(setting / "going-on/checkpoints", CheckpointConfig())
    assert store.newest_complete() == (store.steps()[-1], [])
    assert (store.folder / "latest").read_text().strip() == "step-000006"
    for step in (2, 4, 6):
        file = f"checkpoints/step-{step:06d}/model/model.safetensors"
        expected, actual = load_file(setting / "waiting" / file), load_file(setting / "going-on" / file)
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    losses = [[json.loads(line)["loss/total"] for line in (setting / name / "metrics.jsonl").open()]
              for name in ("waiting", "going-on")]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_crash_before_completion_leaves_the_checkpoint_before(setting: Path) -> None:
    with pytest.raises(RankFailed, match="SIGKILL"):
        run_distributed(trained, 2, setting, "killed", ["--checkpoint.asynchronous"], True)
    store = CheckpointStore(setting / "killed/checkpoints", CheckpointConfig())
    assert (store.folder / ".step-000004.partial").is_dir()  # written, and not sealed
    assert [path.name for path in store.steps()] == ["step-000002"]
    assert store.newest_complete() == (store.folder / "step-000002", [])
    assert (store.folder / "latest").read_text().strip() == "step-000002"
    run_distributed(trained, 2, setting, "killed", ["--checkpoint.asynchronous", "--resume"], False)
    assert not list(store.folder.glob(".*partial")) and len(store.steps()) == 3
