"""Two real ranks on this machine, started by the doctor: do they find each other, and what is there to train with?

    python -m laser_dist.doctor.loopback RANK RANKS PORT gloo|nccl

Each rank prints one line of JSON. torch is imported here and not in the doctor, which must also run where it is broken.
"""

import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

SIZE = 8 * 2**20
"""Bytes of the all-reduce."""


def main(rank: int, ranks: int, port: int, backend: str) -> dict[str, Any]:
    """What this rank saw."""
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=20))
    buffer = torch.full((SIZE // 4,), float(rank + 1), device=device)
    dist.all_reduce(buffer)  # connects
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        dist.all_reduce(buffer)
        if backend == "nccl":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    total = ranks * (ranks + 1) / 2 * ranks**3
    facts: dict[str, Any] = {
        "rank": rank,
        "seconds": best,
        "right": bool((buffer == total).all()),
        "gb_per_second": 2 * (ranks - 1) / ranks * SIZE / best / 1e9,
    }
    dist.destroy_process_group()
    if backend == "gloo":
        facts |= _devices() | _kernels() if rank == 0 else _checkpoints()
    return facts


def _devices() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"cuda": torch.version.cuda, "gpu_count": 0}
    try:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if names:
            torch.zeros(8, device="cuda").sum().item()  # a driver that is too old shows here
            kinds = dict.fromkeys(names)
            facts["gpus"] = ", ".join(f"{names.count(name)} x {name}" for name in kinds)
            facts |= {"gpu_count": len(names), "bf16": "yes" if torch.cuda.is_bf16_supported() else "no"}
    except RuntimeError as error:
        facts["gpu_error"] = str(error).splitlines()[0]
    return facts


def _kernels() -> dict[str, Any]:
    """How far the losses of the path that this machine takes are from their reference, on a small case."""
    try:
        import torch
        from laser_kernels import alignment_loss, alignment_loss_reference

        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator().manual_seed(0)

        def rows(*shape: int) -> torch.Tensor:
            return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1).to(device)

        inputs = (rows(3, 8), rows(3, 8), rows(3, 2, 8), rows(3, 2, 8), rows(7, 8), torch.arange(3, device=device))
        taus = {"temperature": 0.05, "distill_temperature": 0.05, "trajectory_temperature": 0.05}
        pairs = zip(alignment_loss(*inputs, **taus), alignment_loss_reference(*inputs, **taus), strict=True)
        return {"kernels_difference": max(float((ours - theirs).abs()) for ours, theirs in pairs)}
    except Exception as error:
        return {"kernels_error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _checkpoints() -> dict[str, Any]:
    """Whether DeepSpeed can be imported, and its files read without running what somebody put into one."""
    try:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from laser_dist.distributed.pickles import safe_load
    except Exception as error:
        return {"deepspeed_error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    with tempfile.TemporaryDirectory(prefix="laser-dist-doctor-") as folder:
        canary, file = Path(folder) / "canary", Path(folder) / "hostile.pt"
        file.write_bytes(hostile_pickle(canary))
        try:
            safe_load(str(file))
        except Exception:
            return {"pickle": "ran" if canary.exists() else "refused"}
        return {"pickle": "ran" if canary.exists() else "read"}


def hostile_pickle(canary: Path) -> bytes:
    """Who unpickles it without care makes the file `canary`: open(canary, "w"), in pickle's oldest protocol."""
    return f"cbuiltins\nopen\n(V{canary}\nVw\ntR.".encode()


if __name__ == "__main__":
    try:
        told = main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}
    print("\n" + json.dumps(told), flush=True)
