"""Bytes that one step moves between ranks, per rank: who sends what how often, as DeepSpeed 0.19 does it.

    ZeRO 0       all-reduce of the gradients
    ZeRO 1, 2    the same (`reduce_scatter` notwithstanding: buckets of several owners are all-reduced), and an
                 all-gather of the updated weights
    ZeRO 3       all-gathers of the weights for use, a reduce-scatter of the gradients

ZeRO-3 gathers everything once per forward-and-backward if it may stay (`stage3_max_live_parameters`), else for each of
the K sweeps forward and backward. Two things counted here that no document says: with activation checkpointing, frozen
weights are let go after each layer of backward, so that LoRA gathers them once more for each sweep; and GradCache
gathers three times for each chunk, whatever may stay. Where weights may not stay and nothing is checkpointed, fewer
gathers were counted than are planned here (K = 3: 4.4 of 6, in chunks 7.2 of 9).
"""

from dataclasses import dataclass

from laser_dist.planning.job import Job, resident


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of a step."""

    what: str
    kind: str
    """all-reduce, all-gather or reduce-scatter; host: between a GPU and its host."""
    whole: float
    """Bytes of the whole tensor, summed over calls."""
    calls: float
    inside: bool = False
    """Inside a node only."""

    def received(self, job: Job) -> float:
        """Bytes that one rank receives (and as many that it sends)."""
        if self.kind == "host":
            return self.whole
        ranks = job.gpus if self.inside else job.ranks
        return self.whole * (2 if self.kind == "all-reduce" else 1) * (ranks - 1) / ranks

    def between_nodes(self, job: Job) -> float:
        """Of these, bytes per GPU that cross into its node."""
        if self.kind == "host" or self.inside or job.nodes == 1:
            return 0.0
        return self.whole * (2 if self.kind == "all-reduce" else 1) * (job.nodes - 1) / job.nodes / job.gpus

    def seconds(self, job: Job) -> float:
        """At 80 % of the links' rates; a call waits 10 microseconds for each doubling of the ranks."""
        hardware = job.hardware
        if self.kind == "host":
            return self.whole / (0.8e9 * hardware.host)
        inside, between = self.received(job) / hardware.intra, self.between_nodes(job) / hardware.inter
        ranks = job.gpus if self.inside else job.ranks
        return max(inside, between) / 0.8e9 + self.calls * 1e-5 * (ranks - 1).bit_length()


def weight_gathers(job: Job) -> tuple[float, float]:
    """Gathers of all weights by ZeRO-3 in one step: for forward, for backward (its recomputation included)."""
    sweeps, chunks = job.soft + 1, job.chunks
    frozen = job.lora and job.checkpointing
    layers = job.shape.layers * job.shape.layer_weights / job.parameters
    if resident(job):
        forward, backward = 1.0, sweeps * layers if frozen else 0.0
    else:
        forward, backward = float(sweeps), float(sweeps * (2 if frozen else 1))
    if chunks == 1:
        return forward, backward
    # GradCache's first pass gathers too. Between chunks nothing stays, and in the second pass not even until backward.
    return 2 * chunks * forward, chunks * max(backward, 1.0)


def transfers(job: Job) -> list[Transfer]:
    """What one rank sends and receives in one step with one micro-batch."""
    e, s = job.element, job.strategy
    gradients, weights = float(e * job.trained), float(e * job.parameters)
    found = []
    if job.ranks > 1:
        buckets = max(1.0, job.trained / s.bucket) if s.bucket else 1.0
        if s.stage < 3:
            found.append(Transfer("gradients", "all-reduce", gradients * job.reductions, buckets * job.reductions))
        if s.stage in (1, 2):
            found.append(Transfer("updated weights", "all-gather", gradients, buckets))
        if s.stage == 3:
            forward, backward = weight_gathers(job)
            if s.hpz and not resident(job):
                forward, backward = 1.0, forward + backward - 1.0  # once from all ranks, then inside the node
            # One call per bucket of what is fetched ahead, at least one per layer where layers are let go.
            calls = max(job.parameters / s.prefetch, float(job.shape.layers)) if s.prefetch else 0.0
            names = ("weights, first time", "weights, again") if s.hpz else ("weights, forward", "weights, backward")
            found.append(Transfer(names[0], "all-gather", weights * forward, calls * forward))
            if backward:
                found.append(Transfer(names[1], "all-gather", weights * backward, calls * backward, inside=s.hpz))
            found.append(Transfer("gradients", "reduce-scatter", gradients * job.reductions, buckets * job.reductions))
        vectors = float(job.columns * job.shape.hidden)
        found.append(Transfer("passages", "all-gather", vectors * e, 1))
        found.append(Transfer("passages' gradients", "reduce-scatter", vectors * 4, 1))
    return found + _host(job)


def _host(job: Job) -> list[Transfer]:
    s, e, found = job.strategy, job.element, []
    if s.offload_optimizer:
        moved = 2.0 * e * job.trained / job.ranks  # gradients down, weights up
        found.append(Transfer("optimizer offload", "host", moved, 1))
    if s.offload_parameters:
        forward, backward = weight_gathers(job)
        found.append(Transfer("weights offload", "host", e * job.parameters / job.ranks * (forward + backward), 1))
    return found
