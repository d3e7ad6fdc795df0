"""The random generators of a rank: dropout goes on where it stopped."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from laser_dist.errors import UserError


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that a forward draws from: the CPU's, and the device's own."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Undo what was drawn since `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def restore_rng(path: Path, device: torch.device, otherwise: tuple[int, int, int]) -> None:
    """As the file says; where there is none, seeded with `otherwise`. UserError if the file holds something else."""
    if not path.is_file():
        torch.manual_seed(int(np.random.SeedSequence(otherwise).generate_state(1, np.uint64)[0]))
        return
    try:
        set_rng_state(load_file(path), device)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} is no generator's state ({error}); remove the checkpoint to use the one before"
        ) from error
