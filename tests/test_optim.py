"""The learning rate is a function of the step; vectors do not decay."""

import pytest
import torch
from torch import nn

from laser_dist.config import OptimizerConfig
from laser_dist.optim import build_optimizer, learning_rate


def test_warm_up_rises_and_the_schedule_ends_near_zero() -> None:
    config = OptimizerConfig(learning_rate=1e-3, warmup=0.2, schedule="linear")
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[0] > 0 and rates[:3] == sorted(rates[:3])
    assert max(rates) == rates[2] == pytest.approx(1e-3)
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 2e-4


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_schedules_at_half_time(schedule: str, middle: float) -> None:
    config = OptimizerConfig(learning_rate=1e-3, warmup=0.0, schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate(50, 100, config) == pytest.approx(middle * 1e-3)


def test_only_matrices_decay_and_frozen_weights_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    module[2].requires_grad_(False)
    groups = build_optimizer(module, OptimizerConfig(weight_decay=0.1)).param_groups
    assert [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.1, [(3, 3)]),
        (0.0, [(3,), (3,), (3,)]),
    ]
    assert isinstance(module[2].weight, torch.Tensor)
