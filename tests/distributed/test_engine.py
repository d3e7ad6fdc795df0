import contextlib
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from laser_dist.distributed.engine import init_distributed
from laser_dist.testing import RankFailed, run_distributed


def alone_in_a_collective(rank: int, world_size: int, folder: Path) -> None:
    """Rank 0 writes down what it hears when rank 1 never comes to a collective of ZeRO's process group."""
    from deepspeed.utils import groups

    init_distributed(timeout=3)
    if rank == 0:
        with pytest.raises(RuntimeError) as error:
            dist.all_reduce(torch.ones(1), group=groups._get_data_parallel_group())
        (folder / "message").write_text(str(error.value))
    while not (folder / "message").exists():
        time.sleep(0.05)
    os._exit(1)  # a group that timed out aborts some processes while they end: none leaves a result


def test_the_timeout_holds_for_zeros_own_group(tmp_path: Path) -> None:
    """DeepSpeed makes that group with torch's default, so a lost rank once went unnoticed for half an hour."""
    with contextlib.suppress(RankFailed):  # ranks leave without a result
        run_distributed(alone_in_a_collective, 2, tmp_path, timeout=120)
    assert "3000ms" in (tmp_path / "message").read_text()
