"""A save that fails on one rank, in whatever it writes, ends as one error on all of them, and loses nothing."""

import os
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file

from laser_dist.bench.saving_ranks import _build, _train
from laser_dist.config import CheckpointConfig
from laser_dist.distributed import disk
from laser_dist.distributed.checkpoint import CheckpointStore, TrainerState
from laser_dist.distributed.disk import checkpoint_bytes, folder_bytes
from laser_dist.distributed.engine import init_distributed
from laser_dist.distributed.together import Together
from laser_dist.errors import UserError
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.testing import run_distributed, tiny_model_folder

FULL = OSError(28, "No space left on device")


class Fault:
    """Makes the write number `at` of rank `victim` fail, counted from 0 over all of `Together.run`."""

    def __init__(self) -> None:
        self.victim = self.at = -1
        self.run = Together.run
        fault = self

        def counted(self, work, *args, **kwargs):
            def failing(*args, **kwargs):
                raise FULL

            fault.at -= 1
            return fault.run(self, failing if fault.at == -1 else work, *args, **kwargs)

        Together.run = counted


def saves(rank: int, world_size: int, root: Path, stage: int) -> list[str]:
    """Save with each write of each rank failing in turn; the errors that this rank saw."""
    init_distributed(60)
    engine, text = _build(root / "model", stage)
    store = CheckpointStore(root / f"zero{stage}", CheckpointConfig())
    fault, seen = Fault(), []

    def save(step: int) -> None:
        state = TrainerState(step, world_size, stage, "same")
        store.save(engine, state, text.tokenizer, RetrieverCard(), best=True)
        store.publish()

    _train(engine, text, 1)
    save(1)
    taken = folder_bytes(store.folder / "step-000001") - folder_bytes(store.folder / "step-000001" / "model")
    weights = store.folder / "step-000001" / "model" / "model.safetensors"
    actual = taken + weights.stat().st_size
    assert abs(checkpoint_bytes(engine) / actual - 1) < 0.1, (checkpoint_bytes(engine), actual)
    for victim in range(world_size):
        at = 0
        while True:
            fault.at = at if rank == victim else -1
            try:
                save(2 + 10 * victim + len(seen))
                break  # beyond the last write
            except UserError as error:
                seen.append(f"{victim} {at} {error}")
                assert not list(store.folder.glob(".step*")), seen[-1]
                newest, skipped = store.newest_complete()
                assert newest and not skipped
                at += 1
    usage = namedtuple("usage", "free")
    disk.shutil.disk_usage = lambda folder: usage(1000 if rank == 0 else 10**12)
    try:
        save(100)
    except UserError as error:
        seen.append(str(error))
    return seen


@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_every_write_of_every_rank_may_fail(tmp_path: Path, stage: int) -> None:
    """A rank that raised alone once left the others in a barrier, and the staging folder behind."""
    tiny_model_folder(tmp_path / "model", tied=False)
    first, second = run_distributed(saves, 2, tmp_path, stage, timeout=200)
    assert first == second
    *failed, full = first
    by_victim = [[line for line in failed if line.startswith(f"{victim} ")] for victim in (0, 1)]
    assert len(by_victim[0]) >= 9 and len(by_victim[1]) >= 2, failed
    for line in failed:
        assert f"rank {line[0]}: [Errno 28] No space left" in line and "before it is good" in line, line
    assert "a checkpoint takes about" in full and "0.00 MB are free" in full and "--resume" in full
    pointers = {name: (tmp_path / f"zero{stage}" / name).read_text().strip() for name in ("latest", "best")}
    for name in pointers.values():
        assert load_file(tmp_path / f"zero{stage}" / name / "model" / "model.safetensors")
    assert not os.path.exists(tmp_path / f"zero{stage}" / "step-000100")
