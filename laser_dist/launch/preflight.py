"""Before the model is loaded: do all hosts have the same software, see the same files, and reach each other well?

Found here in seconds, each of these otherwise costs the loading of a model, a wrong result, or the first checkpoint.
All ranks pass through the same collectives whatever they find, and all raise the same error.
"""

import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from laser_dist.config import RunConfig
from laser_dist.data.streaming.sets import TrainingData
from laser_dist.distributed.collectives import barrier, gather_objects, gather_table, rank, world_size
from laser_dist.errors import UserError
from laser_dist.launch.facts import CLOCK_TOLERANCE, Facts, checkpoint_bytes, collect

SMALL, LARGE = 64 * 2**10, 32 * 2**20
"""Bytes of the two all-reduces: one shows latency, the other bandwidth."""
SHARED_WITHIN = 5.0
"""Seconds a file may take to show on another host: network file systems remember what was not there."""


def preflight(config: RunConfig, ds_config: dict[str, Any], data: TrainingData, device: torch.device) -> None:
    """Check all hosts; rank 0 prints a line for each. UserError, on all ranks alike, if they cannot train together."""
    if world_size() == 1:
        return
    own = collect(config, ds_config, data, device)
    own.problems += _shared(Path(config.output))
    everyone = gather_objects(own)
    problems = differences(everyone) + [
        f"{text} (rank {r} on {facts.host})" for r, facts in enumerate(everyone) for text in facts.problems
    ]
    needed = checkpoint_bytes(config)
    if everyone[0].free_bytes < needed:
        free = everyone[0].free_bytes / 2**30
        problems.append(f"output: {free:.1f} GiB are free, one checkpoint takes about {needed / 2**30:.1f} GiB")
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(
            f"the hosts cannot train together:\n  {listed}\nMake them alike and start again; --launch.no-preflight "
            "skips this check"
        )
    clocks = _clocks()
    speeds = gather_table(_speed(device))
    if rank() == 0:
        for line in report(everyone, clocks, speeds, needed * (config.checkpoint.keep + 2)):
            print(f"preflight: {line}", file=sys.stderr, flush=True)


def differences(everyone: list[Facts]) -> list[str]:
    """One line for each fact that is not alike, with its values and who has them."""
    lines = []
    for name in dict.fromkeys(name for facts in everyone for name in facts.alike):
        holders: dict[str, list[int]] = {}
        for r, facts in enumerate(everyone):
            holders.setdefault(facts.alike.get(name, "none"), []).append(r)
        if len(holders) > 1:
            values = [f"{value} on {_who(ranks, everyone)}" for value, ranks in holders.items()]
            lines.append(f"{name}: {', '.join(values)}")
    return lines


def report(everyone: list[Facts], clocks: list[float], speeds: list[dict[str, float]], wanted: float) -> list[str]:
    """A line for all and one for each host, by its first rank."""
    alike = everyone[0].alike
    names = ("python", "torch", "deepspeed", "transformers")
    lines = [f"{len(everyone)} ranks alike: " + ", ".join(f"{name} {alike[name]}" for name in names)]
    for host in dict.fromkeys(facts.host for facts in everyone):
        ranks = [r for r, facts in enumerate(everyone) if facts.host == host]
        facts, speed, skew = everyone[ranks[0]], speeds[ranks[0]], clocks[ranks[0]] - clocks[0]
        lines.append(
            f"{_who(ranks, everyone)} · {facts.device} · all-reduce {speed['large']:.2f} GB/s, {speed['small']:.2f} ms "
            f"for {SMALL // 1024} KiB · {facts.free_bytes / 2**30:.0f} GiB free · clock {skew:+.2f} s"
            + (" (WARNING: set the clock)" if abs(skew) > CLOCK_TOLERANCE else "")
        )
    if everyone[0].free_bytes < wanted:
        lines.append(f"WARNING: checkpoint.keep asks for about {wanted / 2**30:.1f} GiB in the output folder")
    return lines


def _who(ranks: list[int], everyone: list[Facts]) -> str:
    hosts: dict[str, list[int]] = {}
    for r in ranks:
        hosts.setdefault(everyone[r].host, []).append(r)
    return ", ".join(f"{host} (rank{'s' if len(own) > 1 else ''} {_spans(own)})" for host, own in hosts.items())


def _spans(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> 0-2, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def _shared(output: Path) -> list[str]:
    """Rank 0 writes a file into the output folder; every rank must find it and be able to write there."""
    token, problem = output / f".preflight-{uuid.uuid4().hex}", None
    if rank() == 0:
        problem = _write(token)
    name, problem = gather_objects((token.name, problem))[0]
    if problem:
        return [problem] if rank() == 0 else []
    deadline = time.monotonic() + SHARED_WITHIN
    while not (seen := (output / name).is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    problems = []
    if not seen:
        problems.append(f"output {output}: does not show what rank 0 wrote there: it must be shared by all hosts")
    elif rank() != 0 and (problem := _write(token)):
        problems.append(problem)
    barrier()
    for path in {token, output / name} if seen else {token}:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return problems


def _write(path: Path) -> str | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        return f"output {path.parent}: cannot be written to ({error.strerror})"
    return None


def _clocks() -> list[float]:
    """Every rank's clock, read as soon as all have arrived."""
    barrier()
    return [row["time"] for row in gather_table({"time": time.time()})]


def _speed(device: torch.device) -> dict[str, float]:
    """Bus bandwidth of a large all-reduce (GB/s) and time of a small one (ms), the best of three."""
    seconds = {}
    for name, size in (("small", SMALL), ("large", LARGE)):
        buffer = torch.zeros(size // 4, device=device)
        best = float("inf")
        for _ in range(4):  # the first one also connects
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            dist.all_reduce(buffer)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        seconds[name] = best
    # Each rank sends and receives 2 (W - 1) / W of the bytes in a ring.
    moved = 2 * (world_size() - 1) / world_size() * LARGE
    return {"large": moved / seconds["large"] / 1e9, "small": seconds["small"] * 1e3}
