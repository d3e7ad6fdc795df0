"""The scalars of a step: collected per micro-batch on each rank, then reduced over ranks as SCALARS says."""

from statistics import median

import torch

from laser_dist.data.streaming.loader import TrainingBatch
from laser_dist.distributed.collectives import bytes_received, gather_table
from laser_dist.objective.alignment import LossTerms
from laser_dist.observability.clock import StepClock, peak_memory_gib
from laser_dist.observability.flops import ModelSize

Scalars = dict[str, float]


def micro_batch_scalars(loaded: TrainingBatch, values: Scalars, size: ModelSize) -> Scalars:
    """What one rank knows of one micro-batch; `values`: its row of the guard's table."""
    counts, packed = loaded.counts, loaded.packed
    shares = {
        "prompts_cut": counts["prompts_cut"] / counts["rows"],
        "queries_reusing_negatives": counts["queries_reusing_negatives"] / packed.queries,
    }
    for name in ("rationales_cut", "fewer_segments_than_steps") if counts["rationales"] else ():
        shares[name] = counts[name] / counts["rationales"]
    tokens, rows = float(len(packed.tokens_T)), len(packed.lengths_R)
    return {
        **{name: value for name, value in values.items() if name.startswith(("loss/", "train/"))},
        **{f"data/{name}": value for name, value in shares.items()},
        "speed/tokens_per_sweep": (tokens + size.soft * rows) / (1 + size.soft),
        "tokens": tokens,
        "flops": size.step(packed),
    }


def step_scalars(micro_batches: list[Scalars], clock: StepClock, queries_per_step: int, peak: float | None) -> Scalars:
    """Means over micro-batches and ranks, and speed from the step's wall time. A collective: all ranks call it.

    `peak`: FLOP/s of one rank's device, if known.
    """
    own = {name: sum(row[name] for row in micro_batches) / len(micro_batches) for name in micro_batches[0]}
    for name in ("tokens", "flops"):
        own[name] *= len(micro_batches)
    own |= {f"time/{name}": value for name, value in clock.reset().items()}
    own["memory/peak"] = peak_memory_gib(clock.device)
    own["communication/gathered"] = bytes_received() / 2**20
    table = gather_table(own)
    values = {name: sum(row[name] for row in table) / len(table) for name in own}
    values["memory/peak"] = max(row["memory/peak"] for row in table)
    wall = sum(value for name, value in values.items() if name.startswith("time/"))
    values["speed/tokens_per_second"] = values.pop("tokens") * len(table) / wall
    values["speed/queries_per_second"] = queries_per_step / wall
    flops = values.pop("flops")
    values["speed/model_tflops"] = flops / wall / 1e12
    if peak:
        values["speed/mfu"] = flops / wall / peak
    return values | rank_scalars(table)


def rank_scalars(table: list[Scalars]) -> Scalars:
    """Who keeps the others waiting, from each rank's seconds and FLOPs.

    The last to arrive at a collective is the one that waits least in it. Ranks first meet when they have their data
    (time/wait) and then when they compare passages (time/loss), so that durations tell, and no clocks are compared.
    """
    waits = [row["time/wait"] + row["time/loss"] for row in table]
    work = [row["flops"] for row in table]
    return {
        "ranks/slowest": float(waits.index(min(waits))),
        "ranks/lag": median(waits) - min(waits),
        "ranks/imbalance": max(work) * len(work) / sum(work),
    }


def term_gradient_norms(loss: LossTerms, inputs: list[torch.Tensor]) -> Scalars:
    """Norm of each term's gradient with respect to this rank's vectors and states. A collective."""
    inputs = [x for x in inputs if x.requires_grad]
    norms = {}
    for name, term in loss.terms.items():
        if term.requires_grad:
            found = torch.autograd.grad(term, inputs, retain_graph=True, allow_unused=True)
            norms[f"gradient_norm/{name}"] = float(torch.nn.utils.get_total_norm([g for g in found if g is not None]))
    return norms
