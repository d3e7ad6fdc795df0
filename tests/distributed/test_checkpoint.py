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


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    """The newest two once were kept whatever their state: with one of them damaged, a single good one was left."""
    store = CheckpointStore(tmp_path, CheckpointConfig(keep=2))
    made = {step: make(tmp_path, step) for step in (1, 2, 3, 4)}
    (made[4] / "deepspeed" / "shard.pt").write_bytes(b"short")
    store.prune()
    assert store.steps() == [made[2], made[3], made[4]]  # 4 is where `latest` points


def test_a_wrong_hash_that_a_load_has_found_does_not_count_either(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, CheckpointConfig(keep=2))
    made = {step: make(tmp_path, step) for step in (1, 2, 3)}
    (made[3] / "deepspeed" / "shard.pt").write_bytes(bytes(256 * 3))  # its size is right
    assert store.newest_complete()[0] == made[2]
    assert (tmp_path / "latest").read_text() == "step-000002\n"  # serving takes the complete one as well
    make(tmp_path, 4)
    store.prune()
    assert [path.name for path in store.steps()] == ["step-000002", "step-000003", "step-000004"]


def test_one_checkpoint_alone_is_not_kept() -> None:
    with pytest.raises(UserError, match="checkpoint.keep = 1: must be at least 2"):
        CheckpointConfig(keep=1)


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """NFS keeps files that somebody reads: that once would have ended training with a traceback on rank 0."""
    store = CheckpointStore(tmp_path, CheckpointConfig(keep=2))
    for step in (1, 2, 3):
        make(tmp_path, step)

    def busy(folder: Path, **_: object) -> None:
        raise OSError(39, "Directory not empty", str(folder))

    monkeypatch.setattr("shutil.rmtree", busy)
    store.prune()
    assert [path.name for path in store.steps()] == ["step-000002", "step-000003"]
    assert "step-000001 could not be deleted" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["step-old", "step-000004.bak", "step-", "step-000009"])
def test_other_things_in_the_folder_are_no_checkpoints(tmp_path: Path, name: str) -> None:
    """A copy called step-000004.bak once was a traceback."""
    good = make(tmp_path, 2)
    if name == "step-000009":
        (tmp_path / name).write_text("a file")
    else:
        (tmp_path / name).mkdir()
    assert CheckpointStore(tmp_path, CheckpointConfig()).newest_complete() == (good, [])


@pytest.mark.parametrize("content", ["[]", '{"files": []}', '{"files": {}}', '{"files": {"trainer.json": 3}}'])
def test_a_manifest_that_says_nothing_vouches_for_nothing(tmp_path: Path, content: str) -> None:
    """One without files once made every folder complete, and a list was a traceback."""
    bad = make(tmp_path, 3)
    (bad / "manifest.json").write_text(content)
    assert "manifest.json" in (verify(bad) or "")


def test_a_manifest_names_no_file_outside(tmp_path: Path) -> None:
    bad, secret = make(tmp_path, 3), tmp_path / "secret"
    secret.write_text("x")
    files = json.loads((bad / "manifest.json").read_text())["files"]
    for name in ("../secret", str(secret)):
        write_manifest(bad, files | {name: {"bytes": 1, "sha256": "x"}})
        assert "is not in the checkpoint" in (verify(bad) or "")


def test_files_of_another_checkpoint_are_no_part_of_this_one(tmp_path: Path) -> None:
    """Of a run on four ranks copied over one on two, all files that the manifest names may be right."""
    checkpoint = make(tmp_path, 3)
    (checkpoint / "notes.txt").write_text("a user's")
    assert verify(checkpoint) is None
    (checkpoint / "deepspeed" / "zero_pp_rank_3_mp_rank_00_optim_states.pt").write_bytes(b"x")
    assert verify(checkpoint) == "deepspeed/zero_pp_rank_3_mp_rank_00_optim_states.pt was not saved with it"


def test_a_share_that_fails_in_any_way_is_no_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only OSError was noted: a thread that ended otherwise left its files out of a manifest that looked whole."""

    def broken(_: Path) -> str:
        raise MemoryError

    checkpoint = make(tmp_path, 1)
    monkeypatch.setattr("laser_dist.distributed.manifest.sha256", broken)
    assert Sealing(checkpoint, 0, 1).wait()[1] == "MemoryError"


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
    with pytest.raises(UserError, match=r"No space left .* the checkpoint before it is good \(step-000001\)"):
        store.publish()
    assert not staging.exists()
    assert store.newest_complete() == (good, []) and store.publish() is None and not (tmp_path / "best").exists()
