"""What is logged survives a resume without repeating a step, and charts name scalars that exist."""

import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laser_dist.observability.clock import StepClock, peak_memory_gib
from laser_dist.observability.metrics import CHARTS, SCALARS, MetricsLog


def test_resume_forgets_what_will_happen_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, start_step=0, enabled=True) as log:
        for step in (1, 2, 3):
            log.scalars(step, {"loss/total": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # a full disk cut the line off
    with MetricsLog(tmp_path, start_step=2, enabled=True) as log:
        log.scalars(3, {"loss/total": 30.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss/total"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run", start_step=0, enabled=False) as log:
        log.scalars(1, {"loss/total": 1.0})
    assert not (tmp_path / "run").exists()


def test_charts_show_scalars_that_exist() -> None:
    tags = {tag for charts in CHARTS.values() for tags in charts.values() for tag in tags}
    assert {tag for tag in tags if not tag.startswith("dev/")} <= set(SCALARS)


def test_every_scalar_has_unit_reduction_and_meaning() -> None:
    assert all(len(legend) == 3 and all(legend) for legend in SCALARS.values())


def test_clock_adds_up_phases_and_starts_anew() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.phase("forward"):
            pass
    first = clock.reset()
    assert set(first) == {"forward"} and 0 <= first["forward"] < 1
    assert clock.reset() == {}
    assert 0.01 < peak_memory_gib(torch.device("cpu")) < 1000
