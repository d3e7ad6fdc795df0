import time
from pathlib import Path

import torch
import torch.distributed as dist

from laser_dist.distributed.engine import init_distributed
from laser_dist.testing import run_distributed


def alone_in_a_collective(rank: int, world_size: int, folder: Path) -> str:
    """What rank 0 hears when rank 1 never comes to a collective of ZeRO's process group."""
    from deepspeed.utils import groups

    init_distributed(timeout=3)
    message = ""
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(1), group=groups._get_data_parallel_group())
        except RuntimeError as error:
            message = str(error)
        (folder / "done").touch()
    while not (folder / "done").exists():
        time.sleep(0.05)
    return message


def test_the_timeout_holds_for_zeros_own_group(tmp_path: Path) -> None:
    """DeepSpeed makes that group with torch's default, so a lost rank once went unnoticed for half an hour."""
    message, _ = run_distributed(alone_in_a_collective, 2, tmp_path, timeout=120)
    assert "3000ms" in message
