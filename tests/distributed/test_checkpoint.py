"""Checkpoints are complete or absent, and what is kept is what the configuration says."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from laser_dist.config import CheckpointConfig
from laser_dist.distributed.checkpoint import CheckpointStore, _point, _safe_load, _write_manifest, read_state, verify
from laser_dist.errors import UserError
from laser_dist.run_folder import latest_checkpoint


def make(folder: Path, step: int, metric: float | None = None) -> Path:
    checkpoint = folder / f"step-{step:06d}"
    (checkpoint / "deepspeed").mkdir(parents=True)
    (checkpoint / "deepspeed" / "shard.pt").write_bytes(bytes(range(256)) * step)
    state = {"step": step, "world_size": 1, "stage": 3, "fingerprint": "x", "metric": metric}
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    _write_manifest(checkpoint)
    _point(folder / "latest", checkpoint.name)
    return checkpoint


@pytest.mark.parametrize("damage", ["shorter", "altered", "missing", "no manifest", "broken manifest"])
def test_every_damage_is_found_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path, CheckpointConfig())
    good, bad = make(tmp_path, 2), make(tmp_path, 10)
    shard, manifest = bad / "deepspeed" / "shard.pt", bad / "manifest.json"
    content = shard.read_bytes()
    if damage == "shorter":
        shard.write_bytes(content[:-1])
    elif damage == "altered":
        shard.write_bytes(content[:100] + b"!" + content[101:])
    elif damage == "missing":
        shard.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:20])
    chosen, skipped = store.newest_complete()
    assert chosen == good
    assert len(skipped) == 1 and str(bad) in skipped[0]
    assert verify(good) is None


def test_pruning_spares_the_newest_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, CheckpointConfig(keep=2))
    made = [make(tmp_path, step, metric=1 / step) for step in (1, 2, 9, 10, 100)]
    store.mark_best(made[0])
    store.prune()
    assert store.steps() == [made[0], made[3], made[4]]
    assert store.best_metric() == 1.0
    assert verify(made[4]) is None


def test_a_staging_folder_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, CheckpointConfig())
    make(tmp_path, 3).rename(tmp_path / ".step-000003.partial")
    assert store.newest_complete() == (None, [])


def test_a_run_without_checkpoint_and_a_foreign_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        latest_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is not a checkpoint of laser_dist"):
        read_state(tmp_path)


class Payload:
    """What a malicious optimizer state would hold."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/laser-dist-must-not-exist"),))


def test_optimizer_states_load_without_running_code(tmp_path: Path) -> None:
    torch.save({"zero_stage": ZeroStageEnum.weights, "x": torch.ones(2)}, tmp_path / "good.pt")
    assert _safe_load(str(tmp_path / "good.pt"))["zero_stage"] == ZeroStageEnum.weights
    torch.save({"x": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        _safe_load(str(tmp_path / "evil.pt"))
    assert not Path("/tmp/laser-dist-must-not-exist").exists()
