"""What the tests here are made of; shipped, so that a project built on laser_dist can test itself the same way."""

from typing import TYPE_CHECKING

from laser_dist.testing.commands import run_command, run_commands, start_command
from laser_dist.testing.distributed import RankFailed, run_distributed
from laser_dist.testing.tiny import tiny_model_folder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "RankFailed",
    "assert_close_relative",
    "run_command",
    "run_commands",
    "run_distributed",
    "start_command",
    "tiny_model_folder",
]


def assert_close_relative(
    actual: "Tensor", expected: "Tensor", tolerance: float, name: str = "tensor", *, noise: float = 0.0
) -> None:
    """Largest difference over largest magnitude of `expected` must not exceed `tolerance`.

    One scale per tensor: element-wise ratios would judge entries near zero by rounding noise. `noise`: what `expected`
    itself may be off by, where it is a small difference of large numbers.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    difference = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    assert difference <= tolerance * scale + noise, (  # false for NaN too
        f"{name}: largest difference {difference:.3e} over largest magnitude {scale:.3e} "
        f"is {difference / scale if scale else float('inf'):.3e}, more than {tolerance:.1e}"
    )
