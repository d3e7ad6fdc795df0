"""All ways of training one model on given machines, which of them fit, and the fastest that does."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from laser_dist.planning.job import GIB, STRATEGIES, Job, Strategy
from laser_dist.planning.memory import Memory, host_memory, memory, usable
from laser_dist.planning.timing import StepTime, step_time

# What to do about the part that is largest where something does not fit.
_REMEDIES = {
    "parameters": "more GPUs with ZeRO-3, or offload the weights",
    "gathered": "ds_configs/zero3-lean.json gathers layer by layer",
    "gradients": "LoRA, or more GPUs with ZeRO-2 or 3",
    "optimizer": "LoRA, more GPUs, or offload the optimizer",
    "buckets": "lower reduce_bucket_size in the ds_config",
    "activations": "activation checkpointing, train.chunk_tokens, or fewer queries per rank",
    "latent_kv": "train.chunk_tokens, or fewer queries per rank",
    "soft_tokens": "train.chunk_tokens, or fewer queries per rank",
    "loss": 'objective.passages = "ring"',
    "update": "LoRA, more GPUs, or offload the optimizer",
}


@dataclass(frozen=True)
class Option:
    """One way, with what it needs."""

    job: Job
    memory: Memory
    time: StepTime
    usable: float
    """Bytes that tensors can have."""
    host: float
    """Bytes of one node's memory."""

    @property
    def over(self) -> float:
        """Bytes of GPU memory that are missing; 0 or less if it fits there."""
        return self.memory.peak - self.usable

    @property
    def host_over(self) -> float:
        """Bytes of a node's memory that are missing."""
        return self.host - self.job.hardware.host_memory * GIB * self.job.gpus

    @property
    def fits(self) -> bool:
        return self.over <= 0 and self.host_over <= 0

    @property
    def mode(self) -> str:
        return f"LoRA {self.job.lora_rank}" if self.job.lora else "full"

    @property
    def recomputation(self) -> str:
        """none, checkpointing, GradCache or both."""
        chunked = [f"chunks {self.job.chunk_tokens:,}"] * (self.job.chunks > 1)
        return " + ".join(["checkpoint"] * self.job.checkpointing + chunked) or "none"

    @property
    def verdict(self) -> str:
        """'fits', or by how much not."""
        if self.fits:
            return "fits"
        if self.over <= 0:
            return f"{self.host_over / GIB:,.0f} GiB too much on the host"
        return f"{self.over / GIB:,.1f} GiB too much"

    @property
    def remedy(self) -> str:
        """The largest part, and what makes it smaller."""
        if self.over <= 0:
            return f"{self.host / GIB:,.0f} GiB of host memory per node: more of it, LoRA, or more nodes"
        part, size = max(self.memory.parts().items(), key=lambda item: item[1])
        return f"{part.replace('_', ' ')} {size / GIB:,.1f} GiB: {_REMEDIES[part]}"


def options_of(job: Job) -> list[Option]:
    """Every strategy and recomputation for this job, LoRA or full as it says; what recomputes least comes first."""
    return [_option(variant) for strategy in _sensible(job) for variant in _variants(replace(job, strategy=strategy))]


def fastest(options: list[Option]) -> Option | None:
    """The fastest that fits.

    Of those within 2 % of it the first in the list that leaves a fifth of the memory free, or the one that leaves most.
    """
    fitting = [option for option in options if option.fits]
    if not fitting:
        return None
    limit = 1.02 * min(option.time.middle for option in fitting)
    close = [option for option in fitting if option.time.middle <= limit and not option.job.strategy.offload_optimizer]
    close = close or [option for option in fitting if option.time.middle <= limit]
    roomy = [option for option in close if option.memory.peak <= 0.8 * option.usable]
    return roomy[0] if roomy else min(close, key=lambda option: option.memory.peak)


def nearest(options: list[Option]) -> Option:
    """The fastest of those that fit, or the one that misses by least."""
    return fastest(options) or min(options, key=lambda option: (max(option.over, 0), option.host_over))


def describe(option: Option) -> str:
    """Mode, strategy and recomputation in words."""
    recomputation = "" if option.recomputation == "none" else f", {option.recomputation}"
    return f"{option.mode}, {option.job.strategy.name}{recomputation}"


def seconds(option: Option) -> str:
    """The range from full overlap to none."""
    best, worst = (f"{round(x):,}" if x >= 10 else f"{x:.2g}" for x in (option.time.best, option.time.worst))
    return best if best == worst else f"{best} - {worst}"


def _option(job: Job) -> Option:
    return Option(job, memory(job), step_time(job), usable(job), host_memory(job))


def _sensible(job: Job) -> Iterator[Strategy]:
    for strategy in STRATEGIES:
        plain = strategy.stage > 0 and not strategy.offload_optimizer
        if job.ranks == 1 and plain:
            continue  # nothing to split
        if strategy.hpz and job.nodes == 1:
            continue  # the second copy would be the first
        if strategy.live < 1e10 and strategy.stage == 3 and not strategy.offload_optimizer and job.parameters <= 1e9:
            continue  # nothing is let go: the same as zero3
        yield strategy


def _variants(job: Job) -> Iterator[Job]:
    for checkpointing in (False, True):
        whole = replace(job, checkpointing=checkpointing, chunk_tokens=0)
        yield whole
        yield replace(whole, chunk_tokens=_chunk_tokens(whole))


def _chunk_tokens(job: Job) -> int:
    """The largest chunk, in halves of the batch, that fits; at least the longest row, which is never split."""
    longest = max(job.explicit_tokens, job.passage_tokens)
    parts = 2
    while True:
        tokens = max(longest, job.tokens // parts)
        trial = replace(job, chunk_tokens=tokens)
        if tokens == longest or memory(trial).peak <= usable(trial):
            return tokens
        parts *= 2
