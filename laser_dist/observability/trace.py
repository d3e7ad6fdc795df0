"""What a profiler's trace (Chrome JSON) says of one rank's steps: where their time went, and their memory.

A moment of a step is *compute* if the device runs a kernel that is not a collective's; *communication* if only
collectives run; *idle* otherwise: Python, waiting for data or for a launch. On a CPU the device's kernels are the
operators on other threads than those that talk to other ranks, and gloo's calls are the collectives. Only what lies
inside a span named "step" counts: evaluation and checkpoints do not. Seconds, calls and bytes are means per step.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from laser_dist.observability.spans import PREFIX

Event = dict[str, Any]
Intervals = list[tuple[float, float]]

_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_MICRO = 1e-6  # a trace counts in microseconds
_POINTS = 400  # of a memory timeline
_BYTES = {"double": 8, "long int": 8, "long": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "bool": 1}


@dataclass(frozen=True)
class TraceSummary:
    """Means per step of one rank and cycle, in seconds where nothing else is said."""

    device: str
    """cuda or cpu: what compute, operators and memory are about."""
    steps: int
    wall: float
    compute: float
    communication: float
    """Collectives while nothing is computed."""
    hidden: float
    """Collectives behind compute; part of `compute`."""
    idle: float
    spans: dict[str, float]
    """Our labels in the order in which they first occur; "forward / prefix sweep" lies inside forward.

    A phase's time is the host's, which waits for the device at its end; inside a phase it is the device's, if known.
    """
    operators: list[tuple[str, float, float]]
    """Name, calls, seconds: kernels, or operators without those they call; the longest first."""
    collectives: list[tuple[str, float, float]]
    """Name, calls, bytes of the larger side."""
    memory: list[tuple[float, float]]
    """Seconds since the first step began, GiB at most until then; on a CPU what was allocated since tracing began."""


def summarise(events: list[Event]) -> TraceSummary:
    """The events of one trace that holds at least one span named "step"."""
    complete = [event for event in events if event.get("ph") == "X"]
    labels = [e for e in complete if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX)]
    windows = [_interval(event) for event in labels if event["name"] == PREFIX + "step"]
    if not windows:
        raise ValueError(f"the trace has no span {PREFIX}step")
    complete = [event for event in complete if _inside(event, windows)]
    device, work, talk = _split_device(complete)
    steps, wall = len(windows), _length(windows)
    compute, talking = _length(_union(work)), _length(_union(talk))
    busy = _length(_union([*work, *talk]))
    scale = _MICRO / steps
    return TraceSummary(
        device=device,
        steps=steps,
        wall=wall * scale,
        compute=compute * scale,
        communication=(busy - compute) * scale,
        hidden=(compute + talking - busy) * scale,
        idle=max(0.0, wall - busy) * scale,
        spans=_spans([event for event in labels if _inside(event, windows)], _device_spans(events), scale),
        operators=_operators(complete, device, steps),
        collectives=_collectives(complete, steps),
        memory=_memory(events, windows),
    )


def _split_device(events: list[Event]) -> tuple[str, list[tuple[float, float]], list[tuple[float, float]]]:
    """Name of the device; intervals of its kernels, and of its collectives."""
    kernels = [event for event in events if event.get("cat") in _KERNELS]
    if kernels:
        talk = [_interval(event) for event in kernels if "nccl" in event["name"].lower()]
        return "cuda", [_interval(event) for event in kernels if "nccl" not in event["name"].lower()], talk
    gloo = [event for event in events if event["name"].startswith("gloo:")]
    threads = {event["tid"] for event in gloo}
    work = [_interval(event) for event in events if _is_operator(event) and event["tid"] not in threads]
    return "cpu", work, [_interval(event) for event in gloo]


def _is_operator(event: Event) -> bool:
    """Of torch's dispatcher, and not a frame around Python code, which may wait."""
    name = event["name"]
    return event.get("cat") == "cpu_op" and "::" in name and not name.startswith(("autograd::", "torch::", "c10d::"))


def _operators(events: list[Event], device: str, steps: int, most: int = 20) -> list[tuple[str, float, float]]:
    calls: dict[str, int] = defaultdict(int)
    micros: dict[str, float] = defaultdict(float)
    if device == "cuda":
        pairs = [(event, event["dur"]) for event in events if event.get("cat") in _KERNELS]
    else:
        pairs = [pair for pair in _self_times(events) if _is_operator(pair[0])]
    for event, own in pairs:
        calls[event["name"]] += 1
        micros[event["name"]] += own
    longest = sorted(micros, key=lambda name: -micros[name])[:most]
    return [(name, calls[name] / steps, micros[name] * _MICRO / steps) for name in longest]


def _self_times(events: list[Event]) -> list[tuple[Event, float]]:
    """Each operator with its duration less those of the operators it calls, thread by thread."""
    found: list[tuple[Event, float]] = []
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["pid"], event["tid"]].append(event)
    for calls in threads.values():
        stack: list[list[Any]] = []  # event, self time
        for event in sorted(calls, key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= event["ts"]:
                found.append(tuple(stack.pop()))  # type: ignore[arg-type]
            if stack:
                stack[-1][1] -= event["dur"]
            stack.append([event, event["dur"]])
        found += [tuple(entry) for entry in stack]  # type: ignore[misc]
    return found


def _collectives(events: list[Event], steps: int) -> list[tuple[str, float, float]]:
    calls: dict[str, int] = defaultdict(int)
    volume: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") == "cpu_op" and event["name"].startswith("c10d::"):
            name = event["name"].removeprefix("c10d::").strip("_")
            calls[name] += 1
            volume[name] += _volume(event.get("args", {}))
    order = sorted(calls, key=lambda name: -volume[name])
    return [(name, calls[name] / steps, volume[name] / steps) for name in order]


def _volume(arguments: dict[str, Any]) -> int:
    """Bytes of the largest argument, a tensor or a list of them; lists do not say their type and are taken as float."""
    sizes = [0]
    for shape, kind in zip(arguments.get("Input Dims", ()), arguments.get("Input type", ()), strict=False):
        shapes = shape if shape and isinstance(shape[0], list) else [shape]
        if shape and (kind in _BYTES or kind == "TensorList"):
            sizes.append(sum(math.prod(_flat(one)) for one in shapes) * _BYTES.get(kind, 4))
    return max(sizes)


def _flat(shape: Any) -> list[int]:
    return [number for part in shape for number in (_flat(part) if isinstance(part, list) else [part])]


def _spans(labels: list[Event], on_device: dict[int, float], scale: float) -> dict[str, float]:
    micros: dict[str, float] = defaultdict(float)
    stack: list[Event] = []  # across threads: the one that trains waits for the one that runs backward
    for event in sorted(labels, key=lambda e: (e["ts"], -e["dur"])):
        while stack and event["ts"] >= stack[-1]["ts"] + stack[-1]["dur"]:
            stack.pop()
        stack.append(event)
        path = [label["name"].removeprefix(PREFIX) for label in stack]
        path = path[1:] if len(path) > 1 and path[0] == "step" else path
        launched = on_device.get(event.get("args", {}).get("External id", -1))
        micros[" / ".join(path)] += event["dur"] if launched is None or len(path) == 1 else launched
    return {name: value * scale for name, value in micros.items()}


def _device_spans(events: list[Event]) -> dict[int, float]:
    """From a label's id to the microseconds that its kernels took on a GPU, on the stream where they took longest."""
    found: dict[int, float] = {}
    for event in events:
        if event.get("cat") == "gpu_user_annotation":
            number = event.get("args", {}).get("External id", -1)
            found[number] = max(found.get(number, 0.0), event["dur"])
    return found


def _memory(events: list[Event], windows: Intervals) -> list[tuple[float, float]]:
    """_POINTS points, each the most that was allocated since the one before; none without events."""
    found = [(e["ts"], e["args"]) for e in events if e.get("name") == "[memory]" and e.get("ph") == "i"]
    kind = int(any(args["Device Type"] == 1 for _, args in found))
    sizes = sorted((ts, args["Total Allocated"] / 2**30) for ts, args in found if args["Device Type"] == kind)
    start, end = windows[0][0], max(stop for _, stop in windows)
    level, ahead, points = 0.0, 0, []
    for point in range(_POINTS if sizes else 0):
        until, most = start + (end - start) * point / (_POINTS - 1), level
        while ahead < len(sizes) and sizes[ahead][0] <= until:
            level = sizes[ahead][1]
            most = max(most, level) if sizes[ahead][0] >= start else level
            ahead += 1
        points.append(((until - start) * _MICRO, most))
    return points


def _interval(event: Event) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _inside(event: Event, windows: Intervals) -> bool:
    return any(start <= event["ts"] < end for start, end in windows)


def _union(intervals: Intervals) -> Intervals:
    """The same moments as intervals that do not touch."""
    merged: list[list[float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return [(start, end) for start, end in merged]


def _length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)
