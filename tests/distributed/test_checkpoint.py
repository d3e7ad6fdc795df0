"""Checkpoints are complete or absent, and what is kept is what the configuration says."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from laser_dist.config import CheckpointConfig
from laser_dist.distributed.checkpoint import CheckpointStore, _point, read_state
from laser_dist.distributed.manifest import Sealing, verify, write_manifest
from laser_dist.distributed.pickles import safe_load
from laser_dist.errors import UserError
from laser_dist.run_folder import latest_checkpoint


def make(folder: Path, step: int, metric: float | None = None) -> Path:
    checkpoint = folder / f"step-{step:06d}"
    (checkpoint / "deepspeed").mkdir(parents=True)
    (checkpoint / "deepspeed" / "shard.pt").write_bytes(bytes(range(256)) * step)
    state = {"step": step, "world_size": 1, "stage": 3, "fingerprint": "x", "metric": metric}
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    write_manifest(checkpoint, Sealing(checkpoint, 0, 1).wait()[0])
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
    _point(tmp_path / "best", made[0].name)
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
    assert safe_load(str(tmp_path / "good.pt"))["zero_stage"] == ZeroStageEnum.weights
    torch.save({"x": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        safe_load(str(tmp_path / "evil.pt"))
    assert not Path("/tmp/laser-dist-must-not-exist").exists()


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_every_file_is_sealed_and_verified_by_exactly_one_rank(tmp_path: Path, parts: int) -> None:
    checkpoint = make(tmp_path, 4)
    for number in range(7):
        (checkpoint / "deepspeed" / f"{number}.pt").write_bytes(bytes(number % 3))
    shares = [Sealing(checkpoint, part, parts).wait()[0] for part in range(parts)]
    names = [name for share in shares for name in share if name != "manifest.json"]
    assert len(names) == len(set(names)) == 9
    write_manifest(checkpoint, {name: entry for share in shares for name, entry in share.items() if name in names})
    (checkpoint / "deepspeed" / "5.pt").write_bytes(b"!!")
    defects = [defect for part in range(parts) if (defect := verify(checkpoint, part, parts))]
    assert len(defects) == 1 and "5.pt was altered" in defects[0]


def test_a_checkpoint_that_cannot_be_put_on_disk_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the thread once would have left a folder that looks complete, or ended without a word."""
    good = make(tmp_path, 1)
    staging = make(tmp_path / "elsewhere", 2).rename(tmp_path / ".step-000002.partial")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    store = CheckpointStore(tmp_path, CheckpointConfig())
    store.final, store.best, store.sealing = tmp_path / "step-000002", True, Sealing(staging, 0, 1)
    with pytest.raises(UserError, match="No space left .* the checkpoint before it is good"):
        store.publish()
    assert store.newest_complete() == (good, []) and store.publish() is None and not (tmp_path / "best").exists()
