"""How long a step should take, from its FLOPs and bytes; every constant here is an estimate, and none was measured.

A step is compute (the packed sweep, the latent steps, the loss), the update, and communication. DeepSpeed overlaps
communication with compute as far as it can: the truth lies between their maximum and their sum, and both are given.
"""

from dataclasses import dataclass

from laser_dist.planning.communication import Transfer, transfers
from laser_dist.planning.flops import Flops, step_flops
from laser_dist.planning.job import Job

# Of the peak, what matrix products of transformer layers with their norms and copies reach.
EFFICIENCY = 0.4
# Of the memory's rate.
STREAMING = 0.8
# Kernels of one layer's forward on a few tokens, each with its launch; backward takes twice that.
_KERNELS, _LAUNCH = 30, 5e-6
# Bytes per weight that AdamW moves (gradient, weight, two states, read and written; the weight in the model's dtype),
# and bytes per second of a node's NVMe drives.
_ADAM, _NVME_RATE = 34, 5e9
# Seconds per weight on the host: torch's fused AdamW took 8 ns on one thread (2026-11-23, torch 2.13.0, AMD EPYC, other
# work on the machine); a GPU's share of a host is taken to be 12 cores.
_HOST_ADAM = 8e-9 / 12


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by part."""

    prefix: float
    latent: float
    loss: float
    update: float
    transfers: dict[str, float]
    flops: Flops
    model_tflops: float
    """TFLOP/s per GPU without recomputation, at the middle of the range."""

    @property
    def compute(self) -> float:
        return self.prefix + self.latent + self.loss

    @property
    def communication(self) -> float:
        return sum(self.transfers.values())

    @property
    def best(self) -> float:
        """All of the communication behind compute."""
        return max(self.compute, self.communication) + self.update

    @property
    def worst(self) -> float:
        """None of it."""
        return self.compute + self.communication + self.update

    @property
    def middle(self) -> float:
        return (self.best + self.worst) / 2

    @property
    def bottleneck(self) -> str:
        """The largest part, by name."""
        parts = {"packed sweep": self.prefix, "latent steps": self.latent, "loss": self.loss, "update": self.update}
        if self.communication > self.compute:
            return max(self.transfers, key=lambda name: self.transfers[name])
        return max(parts, key=lambda name: parts[name])


def step_time(job: Job) -> StepTime:
    """Expected seconds of one optimizer step."""
    flops, moved = step_flops(job), transfers(job)
    rate = job.hardware.tflops * 1e12 * EFFICIENCY * (1 if job.dtype == "bfloat16" else 0.5)
    latent = _latent(job, flops, rate)
    times = _by_name(job, moved)
    prefix = (flops.total - flops.loss - flops.latent_share) / rate
    parts = (prefix, latent, flops.loss / rate, _update(job))
    middle = StepTime(*parts, times, flops, 0).middle
    return StepTime(*parts, times, flops, flops.useful / middle / 1e12)


def _latent(job: Job, flops: Flops, rate: float) -> float:
    """Few tokens: bound by reading weights and keys, or by launching kernels, where not by FLOPs."""
    if not job.soft:
        return 0.0
    passes = job.soft * job.chunks * (3 + job.checkpointing) + (job.soft * job.chunks if job.chunks > 1 else 0)
    prompts = job.queries * (job.query_tokens + job.passages * job.passage_tokens) / job.chunks
    keys = 2 * job.element * job.shape.kv_heads * job.shape.head * job.shape.layers * prompts
    read = passes * (job.element * job.parameters + keys) / (job.hardware.hbm * 1e9 * STREAMING)
    launched = passes * job.shape.layers * _KERNELS * _LAUNCH
    return max(flops.latent_share / rate, read, launched)


def _update(job: Job) -> float:
    own = job.trained / (job.ranks if job.strategy.stage else 1)
    where = job.strategy.offload_optimizer
    seconds = own * (_HOST_ADAM if where else _ADAM / (job.hardware.hbm * 1e9 * STREAMING))
    if where == "nvme":  # float32 weights and states of all ranks of a node, read and written
        seconds += 24 * own * job.gpus / _NVME_RATE
    return seconds


def _by_name(job: Job, moved: list[Transfer]) -> dict[str, float]:
    times: dict[str, float] = {}
    for transfer in moved:
        times[transfer.what] = times.get(transfer.what, 0.0) + transfer.seconds(job)
    return times
