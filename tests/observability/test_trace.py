"""What a trace's summary says, against traces small enough to see it."""

import pytest

from laser_dist.observability.trace import summarise


def event(category, name, start, duration, thread=1, **arguments):
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": duration,
            "args": arguments}  # fmt: skip


def label(name, start, duration, **arguments):
    return event("user_annotation", f"laser/{name}", start, duration, **arguments)


def memory(at, size, kind=0):
    return {"ph": "i", "name": "[memory]", "ts": at, "args": {"Total Allocated": size * 2**30, "Device Type": kind}}


STEP = label("step", 0, 100)


def test_gpu_communication_counts_where_nothing_is_computed():
    """Kernels of two streams overlap each other and a collective; what runs after the step does not count."""
    found = summarise(
        [
            STEP,
            event("cpu_op", "aten::mm", 0, 90),  # the host's launches are not compute
            event("kernel", "gemm", 10, 20, thread=7),
            event("kernel", "gemm", 20, 20, thread=8),
            event("gpu_memcpy", "Memcpy HtoD", 35, 10, thread=8),
            event("kernel", "ncclDevKernel_AllGather_RING_LL(int)", 30, 40, thread=9),
            event("kernel", "gemm", 150, 50, thread=7),
        ]
    )
    assert found.device == "cuda" and found.steps == 1 and found.wall == pytest.approx(100e-6)
    assert found.compute == pytest.approx(35e-6)  # 10 to 45
    assert found.hidden == pytest.approx(15e-6)  # 30 to 45
    assert found.communication == pytest.approx(25e-6)  # 45 to 70
    assert found.idle == pytest.approx(40e-6)
    assert {name: calls for name, calls, _ in found.operators}["gemm"] == 2


def test_on_a_cpu_frames_that_wait_and_gloos_own_copies_are_not_compute():
    """ZeRO-3 waits for its gathers inside the frame of an autograd function; gloo copies in its own thread."""
    found = summarise(
        [
            STEP,
            event("cpu_op", "autograd::engine::evaluate_function: LinearBackward", 0, 90),
            event("cpu_op", "LinearBackward", 0, 90),
            event("cpu_op", "c10d::_allgather_base_", 5, 5, **{"Input Dims": [[8, 64]], "Input type": ["float"]}),
            event("user_annotation", "gloo:all_gather", 8, 40, thread=2),
            event("cpu_op", "aten::copy_", 40, 5, thread=2),
            event("cpu_op", "aten::matmul", 50, 30),
            event("cpu_op", "aten::mm", 55, 20),
        ]
    )
    assert found.device == "cpu"
    assert found.compute == pytest.approx(30e-6) and found.communication == pytest.approx(40e-6)
    assert found.idle == pytest.approx(30e-6) and found.hidden == 0
    times = {name: seconds for name, _, seconds in found.operators}
    assert times["aten::mm"] == pytest.approx(20e-6) and times["aten::matmul"] == pytest.approx(10e-6)
    assert found.collectives == [("allgather_base", 1, 8 * 64 * 4)]


def test_everything_is_a_mean_over_steps_and_what_lies_between_them_is_left_out():
    evaluation = event("cpu_op", "aten::mm", 120, 50)
    found = summarise([STEP, evaluation, label("step", 200, 300), event("cpu_op", "aten::mm", 210, 40)])
    assert (found.steps, found.wall, found.compute) == (2, pytest.approx(200e-6), pytest.approx(20e-6))
    assert found.operators == [("aten::mm", 0.5, pytest.approx(20e-6))]


def test_labels_say_what_they_lie_in():
    labels = [
        label("forward", 0, 40),
        label("prefix sweep", 0, 20),
        label("latent step 1", 20, 10),  # begins where the sweep ends
        label("loss", 40, 10),
        label("gather", 42, 5),
        label("gather", 60, 5),
    ]
    spans = summarise([STEP, *labels]).spans
    assert {name: round(value * 1e6) for name, value in spans.items()} == {
        "step": 100,
        "forward": 40,
        "forward / prefix sweep": 20,
        "forward / latent step 1": 10,
        "loss": 10,
        "loss / gather": 5,
        "gather": 5,
    }


def test_inside_a_phase_a_gpus_own_time_counts():
    """The host is done launching a sweep long before the device has run it; at a phase's end they meet."""
    spans = summarise(
        [
            STEP,
            label("forward", 0, 80, **{"External id": 1}),
            label("prefix sweep", 0, 10, **{"External id": 2}),
            event("gpu_user_annotation", "laser/forward", 5, 60, thread=7, **{"External id": 1}),
            event("gpu_user_annotation", "laser/prefix sweep", 5, 55, thread=7, **{"External id": 2}),
            event("gpu_user_annotation", "laser/prefix sweep", 5, 8, thread=8, **{"External id": 2}),
        ]
    ).spans
    assert spans["forward"] == pytest.approx(80e-6) and spans["forward / prefix sweep"] == pytest.approx(55e-6)


def test_memory_keeps_peaks_and_stays_where_nothing_happens():
    """A peak shorter than a point of the chart, and a long stretch without an allocation."""
    points = summarise([STEP, memory(-5, 1), memory(10, 2), memory(10.01, 9), memory(10.02, 3), memory(90, 0)]).memory
    sizes = [size for _, size in points]
    assert len(points) == 400 and points[0] == (0, 1) and points[-1][0] == pytest.approx(100e-6)
    assert max(sizes) == 9 and sizes.count(9) == 1
    assert sizes[200] == 3 and sizes[-1] == 0


def test_memory_of_the_gpu_where_there_is_one():
    assert max(size for _, size in summarise([STEP, memory(10, 50), memory(20, 2, kind=1)]).memory) == 2


def test_volumes_of_lists_and_other_types():
    found = summarise(
        [
            STEP,
            event("cpu_op", "c10d::allreduce_", 1, 1,
                  **{"Input Dims": [[[10, 4], [6]], [], []], "Input type": ["TensorList", "", ""]}),
            event("cpu_op", "c10d::_reduce_scatter_base_", 3, 1,
                  **{"Input Dims": [[5], [10]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}),
        ]
    )  # fmt: skip
    assert found.collectives == [("allreduce", 1, 184), ("reduce_scatter_base", 1, 20)]


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="no span laser/step"):
        summarise([event("cpu_op", "aten::mm", 0, 1)])
