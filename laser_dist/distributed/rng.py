"""The random generators of a rank: dropout goes on where it stopped."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(path: Path, device: torch.device, otherwise: tuple[int, int, int]) -> None:
    """As the file says; where there is none, seeded with `otherwise`."""
    if not path.is_file():
        torch.manual_seed(int(np.random.SeedSequence(otherwise).generate_state(1, np.uint64)[0]))
        return
    state = load_file(path)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
