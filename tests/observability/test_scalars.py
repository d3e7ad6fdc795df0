"""Scalars over ranks: who keeps the others waiting, and speeds that follow from FLOPs and seconds."""

import pytest
import torch

from laser_dist.observability.clock import StepClock
from laser_dist.observability.scalars import rank_scalars, step_scalars


def row(wait: float, loss: float, flops: float) -> dict[str, float]:
    return {"time/wait": wait, "time/loss": loss, "flops": flops}


def test_the_slowest_rank_is_the_one_that_nobody_keeps_waiting():
    table = [row(0.5, 1.0, 3.0), row(0.6, 1.0, 3.0), row(0.1, 0.2, 6.0), row(0.5, 1.1, 4.0)]
    found = rank_scalars(table)
    assert found["ranks/slowest"] == 2
    assert found["ranks/lag"] == pytest.approx(1.55 - 0.3)  # what the median rank waited, less what rank 2 did
    assert found["ranks/imbalance"] == pytest.approx(6 / 4)


def test_one_rank_waits_for_nobody():
    assert rank_scalars([row(0.0, 0.3, 7.0)]) == {"ranks/slowest": 0, "ranks/lag": 0, "ranks/imbalance": 1}


def test_a_phase_inside_another_is_booked_once(monkeypatch):
    """Waiting for other ranks' data is not waiting for one's own; the sum of all phases stays the time that passed."""
    now = [0.0]
    monkeypatch.setattr("laser_dist.observability.clock.time.perf_counter", lambda: now[0])
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.phase("data"):
            now[0] += 1
            with clock.phase("wait"):
                now[0] += 4
            now[0] += 2
        with clock.phase("loss"):
            now[0] += 8
    assert clock.reset() == {"data": 6, "wait": 8, "loss": 16}


@pytest.mark.parametrize("peak", [None, 4e12])
def test_speeds_follow_from_flops_tokens_and_seconds(peak):
    """Two micro-batches: their FLOPs and tokens add up, other values are means."""
    clock = StepClock(torch.device("cpu"))
    clock.seconds.update({"wait": 0.5, "loss": 0.5, "forward": 1.0})
    rows = [{"tokens": 100.0, "flops": 1e12, "loss/total": 1.0}, {"tokens": 300.0, "flops": 3e12, "loss/total": 2.0}]
    values = step_scalars(rows, clock, 8, peak)
    assert values["speed/tokens_per_second"] == 200 and values["speed/queries_per_second"] == 4
    assert values["speed/model_tflops"] == 2 and values["loss/total"] == 1.5
    assert values.get("speed/mfu") == (0.5 if peak else None)
    assert not {"tokens", "flops"} & set(values)
