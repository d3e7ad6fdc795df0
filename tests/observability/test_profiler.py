"""Profiles of real steps: what is written, what is said of it, and that nothing happens where none is asked for."""

import gzip
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laser_dist.config import ProfileConfig
from laser_dist.distributed.collectives import bytes_received, gather_rows_with_gradient, gather_table
from laser_dist.errors import UserError
from laser_dist.observability.metrics import SCALARS, MetricsLog
from laser_dist.observability.profiler import StepProfiler, check_profile
from laser_dist.observability.spans import span
from laser_dist.testing import run_distributed

CPU = torch.device("cpu")


def run_steps(folder: Path, config: ProfileConfig, steps: int, *, rank: int = 0) -> list[str]:
    """Steps with a product and a gather; returns what was said."""
    said: list[str] = []
    with (
        MetricsLog(folder, start_step=0, enabled=rank == 0) as log,
        StepProfiler(config, folder, CPU, log, said.append) as profiler,
    ):
        for step in range(1, steps + 1):
            with profiler.step(step):
                rows = torch.randn(50, 40, requires_grad=True)
                with span("forward"):
                    gathered = gather_rows_with_gradient(rows, torch.float32)
                    product = gathered @ gathered.T
                product.sum().backward()
    return said


def names(path: Path) -> set[str]:
    with gzip.open(path) as file:
        return {event["name"] for event in json.load(file)["traceEvents"]}


def test_two_cycles_leave_traces_a_summary_and_charts(tmp_path):
    said = run_steps(tmp_path, ProfileConfig(wait=1, warmup=1, active=2, repeat=2), 9)
    folders = sorted((tmp_path / "profile").iterdir())
    assert [folder.name for folder in folders] == ["step-000004", "step-000008"]
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"rank-0.json.gz", "summary.json"}
        assert {"laser/step", "laser/forward", "aten::mm"} <= names(folder / "rank-0.json.gz")
        (summary,) = json.loads((folder / "summary.json").read_text())["ranks"]
        assert summary["steps"] == 2
        parts = summary["compute"] + summary["communication"] + summary["idle"]
        assert parts == pytest.approx(summary["wall"]) and summary["compute"] > 0
        assert "aten::mm" in [name for name, *_ in summary["operators"]]
        # 3 products of 50 x 50: at least one of them is alive at some time, and not a gigabyte.
        assert 50 * 50 * 4 <= max(size for _, size in summary["memory"]) * 2**30 < 2**30
    assert len(said) == 2 and "https://ui.perfetto.dev" in said[0] and str(folders[0]) in said[0]

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    charts = ["profile/1_ranks", "profile/2_labels", "profile/3_operators", "profile/4_memory"]
    assert events.Tags()["images"] == charts
    assert [image.step for image in events.Images(charts[0])] == [4, 8]
    assert set(events.Tags()["scalars"]) == {name for name in SCALARS if name.startswith("profile/")}
    text = events.Tensors("profile/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| forward |" in text and "`aten::mm`" in text


def test_where_no_profile_is_asked_for_nothing_happens(tmp_path):
    """Not a folder, not a hook, not an object per span."""
    assert run_steps(tmp_path, ProfileConfig(), 3) == []
    assert not (tmp_path / "profile").exists()
    assert isinstance(span("a"), nullcontext) and span("a") is span("b")


def test_spans_are_named_only_in_traced_steps(tmp_path):
    seen = []
    with (
        MetricsLog(tmp_path, start_step=0, enabled=False) as log,
        StepProfiler(ProfileConfig(wait=2, active=1), tmp_path, CPU, log, lambda line: None) as profiler,
    ):
        for step in range(1, 7):
            with profiler.step(step):
                seen.append(not isinstance(span("x"), nullcontext))
    assert seen == [False, False, True, True, False, False]  # warm-up, and the step that is kept


def test_a_run_that_fails_in_a_traced_step_ends_at_once(tmp_path):
    """Saving is a collective: with one rank gone it would wait for ever. And the next run is not slowed down."""
    config = ProfileConfig(wait=0, active=2)
    with pytest.raises(UserError, match="not finite"), MetricsLog(tmp_path, start_step=0, enabled=False) as log:
        with StepProfiler(config, tmp_path, CPU, log) as profiler:
            for step in range(1, 4):
                with profiler.step(step):
                    if step == 3:
                        raise UserError("not finite")
    assert not (tmp_path / "profile").exists()
    assert isinstance(span("x"), nullcontext)
    assert len(run_steps(tmp_path / "next", config, 3)) == 1


def two_ranks(rank: int, world_size: int, folder: str) -> int:
    run_steps(Path(folder), ProfileConfig(wait=0, warmup=1, active=1), 2, rank=rank)
    received = bytes_received()
    gather_table({"a": 1.0, "b": 2.0})
    assert bytes_received() == 16 * (world_size - 1)
    return received


def test_every_rank_leaves_a_trace_and_one_summary_tells_of_all(tmp_path):
    plain = {"KINETO_LOG_LEVEL": "5"}  # a variable of its own: the profiler does not survive a fork
    received = run_distributed(two_ranks, 2, str(tmp_path), init=True, env=plain)
    # Two steps; the other rank's 50 rows of 40 forward, and its gradients of ours backward, in float32.
    assert received == [2 * 2 * 50 * 40 * 4] * 2
    folder = tmp_path / "profile" / "step-000002"
    assert {path.name for path in folder.iterdir()} == {"rank-0.json.gz", "rank-1.json.gz", "summary.json"}
    assert {"laser/gather", "laser/gather's backward"} <= names(folder / "rank-1.json.gz")
    ranks = json.loads((folder / "summary.json").read_text())["ranks"]
    assert len(ranks) == 2
    for summary in ranks:
        assert summary["communication"] > 0
        # What is gathered is 2 x 50 rows of 40; what is scattered is their gradient.
        assert {name: size for name, _, size in summary["collectives"]} == {
            "allgather_base": 16000,
            "reduce_scatter_base": 16000,
        }


@pytest.mark.parametrize(
    "values, told",
    [
        ({"active": -1}, "profile.active = -1: must be at least 0"),
        ({"active": 1, "warmup": 0}, "profile.warmup = 0: must be at least 1"),
        ({"active": 1, "repeat": 0}, "profile.repeat = 0: must be at least 1"),
        ({"active": 3, "wait": 5}, r"is 9 steps, and the run has 8: lower one"),
        ({"active": 1, "wait": 1, "repeat": 3}, r"3 x \(wait 1 \+ warmup 1 \+ active 1\) is 9 steps"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(values, told):
    with pytest.raises(UserError, match=told):
        check_profile(ProfileConfig(**values), 8)


def test_charts_need_matplotlib_only_if_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_profile(ProfileConfig(), 1)
    with pytest.raises(UserError, match=r"pip install 'laser-dist\[plots\]'"):
        check_profile(ProfileConfig(active=1), 100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_kernels_and_allocations(tmp_path):
    """Compute is what the kernels take, and the snapshot of memory is there for pytorch.org/memory_viz."""
    device = torch.device("cuda")
    with (
        MetricsLog(tmp_path, start_step=0, enabled=True) as log,
        StepProfiler(ProfileConfig(wait=0, warmup=1, active=1), tmp_path, device, log, lambda line: None) as profiler,
    ):
        for step in (1, 2):
            with profiler.step(step):
                x = torch.randn(2048, 2048, device=device)
                with span("forward"), span("prefix sweep"):
                    x = x @ x
                torch.cuda.synchronize()
    folder = tmp_path / "profile" / "step-000002"
    (summary,) = json.loads((folder / "summary.json").read_text())["ranks"]
    assert summary["device"] == "cuda" and 0 < summary["compute"] < summary["wall"]
    assert max(size for _, size in summary["memory"]) >= 2 * 2048**2 * 4 / 2**30
    assert (folder / "memory-0.pickle").stat().st_size > 0
