"""Do ranks on this machine find each other, and can it reach others?"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

from laser_dist.doctor.finding import Context, Finding, failed, ok, skipped, warning
from laser_dist.launch.ranks import port_is_free

PATIENCE = 60.0
"""Seconds that the loopback may take; importing torch on a network drive is most of it."""


def host_name(_: Context) -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        remedy = f"gloo and MPI look it up: add a line '127.0.1.1 {name}' to /etc/hosts, or export GLOO_SOCKET_IFNAME"
        return warning(f"{name} has no address ({error})", remedy)
    return ok(f"{name} is {address}")


def port(context: Context) -> Finding:
    if not port_is_free(context.port):
        remedy = "another run? Give launchers another one: --master_port 29501"
        return warning(f"port {context.port}: another process listens there", remedy)
    return ok(f"port {context.port}, where ranks meet, is free")


def gloo(context: Context) -> Finding:
    """An all-reduce of two real processes; leaves what they saw in the context."""
    told, seconds = _ranks(2, "gloo")
    for facts in told:
        context.facts |= facts
    finding = _judge(told, seconds, "gloo", "GLOO_SOCKET_IFNAME")
    if finding.status == "ok" and "deepspeed_error" in context.facts:
        return failed(f"ranks meet, but deepspeed: {context.facts['deepspeed_error']}", "run launchers/setup.sh")
    return finding


def nccl(context: Context) -> Finding:
    """The same on GPUs, two of them where there are two."""
    count = int(str(context.facts.get("gpu_count", 0)))
    if not count:
        return skipped("no GPU")
    told, seconds = _ranks(min(2, count), "nccl")
    return _judge(told, seconds, "nccl", "NCCL_SOCKET_IFNAME")


def several_hosts(_: Context) -> Finding:
    missing = [name for name in ("ssh", "pdsh") if not shutil.which(name)]
    if missing:
        return skipped(f"no {' and no '.join(missing)}: only runs on several hosts need them (apt install pdsh)")
    return ok("ssh and pdsh are there, for runs on several hosts")


def _judge(told: list[dict[str, Any]], seconds: float, backend: str, variable: str) -> Finding:
    remedy = (
        f"unset {variable} and proxies, or name the right interface in it; firewalls must let this host talk to "
        f"itself; {backend.upper()} says more with TORCH_DISTRIBUTED_DEBUG=DETAIL"
    )
    if errors := [str(facts["error"]) for facts in told if "error" in facts]:
        return failed(f"{backend}: {errors[0][:200]}", remedy)
    if not all(facts.get("right") for facts in told):
        return failed(f"{backend}: the sum over ranks is wrong", f"do not train with it: another version. {remedy}")
    best = min(facts["gb_per_second"] for facts in told)
    speed = f"{best:.2f} GB/s" if len(told) > 1 else "one rank"
    return ok(f"{len(told)} processes summed over {backend}, {speed}; {seconds:.1f} s with imports")


def _ranks(ranks: int, backend: str) -> tuple[list[dict[str, Any]], float]:
    """What each rank said, and the seconds until the last was done; a rank that is not is ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    # Where this process finds its modules the ranks must find them, too.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "laser_dist.doctor.loopback", str(rank), str(ranks), str(free), backend],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    told = [_said(process, began + PATIENCE) for process in running]
    return told, time.monotonic() - began


def _said(process: "subprocess.Popen[str]", deadline: float) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"no answer within {PATIENCE:.0f} s"}
    for line in reversed(out.splitlines()):
        try:
            facts = json.loads(line)
        except ValueError:
            continue
        if isinstance(facts, dict):
            return facts
    last = next((line for line in reversed(err.splitlines()) if line.strip()), "")
    return {"error": last or f"a rank ended with {process.returncode}, without a word"}
