"""FLOPs of one rank's step (a multiply-add is two), as torch's FlopCounterMode counts them.

With T packed tokens, R rows, S soft tokens per row, P the weights of all layers' matrices and a the width of all heads:

    layers      2 P (T + S R)
    attention   4 a (sum over rows of length^2 / 2) in the prefix, 4 a (prompt + j) per row in step j
    head        4 V D R S, for the logits and for the mixture of embeddings

Backward costs each matrix twice (once if it is frozen), attention 2.5 times: it computes the scores again. Activation
checkpointing computes the layers again, GradCache everything. A kernel that skips half of a causal square is assumed;
the counter does not see that it does, so tests double `causal`.
"""

from dataclasses import dataclass

from laser_dist.planning.job import Job


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs by part, and how often the step pays for each."""

    prefix: float
    """Layers' matrices over the packed tokens."""
    causal: float
    """Attention inside the packed rows, the causal half."""
    latent: float
    """Layers' matrices and attention of the soft tokens."""
    head: float
    """Logits and soft tokens."""
    adapters: float
    loss: float
    """Scores and gradients against all passages; whole, backward included."""
    total: float
    """Of the step, backward and recomputation included."""
    useful: float
    """The same without anything computed twice."""
    latent_share: float
    """FLOPs of the latent steps in `total`."""


def step_flops(job: Job) -> Flops:
    """FLOPs of one optimizer step of one rank with one micro-batch."""
    shape, soft, rows = job.shape, job.soft, job.rows
    query, passage, b = job.query_tokens, job.passage_tokens, job.queries
    width = shape.heads * shape.head
    weights = shape.layers * shape.layer_weights
    prefix = 2 * weights * job.tokens
    squares = b * (job.explicit_tokens**2 + job.passages * passage**2)
    causal = 2 * width * shape.layers * squares
    seen = sum(b * (query + j) + b * job.passages * (passage + j) for j in range(1, soft + 1))
    attention = 4 * width * shape.layers * seen
    latent = 2 * weights * soft * rows
    head = 4 * shape.table * soft * rows
    adapters = 2 * shape.adapters(job.lora_rank) * (job.tokens + soft * rows)

    frozen = 1 if job.lora else 2  # a frozen matrix has no gradient of its own
    useful = (1 + frozen) * (prefix + latent + head) + 3 * adapters + 3.5 * (causal + attention)
    again = prefix + latent + adapters + causal + attention
    if job.checkpointing and job.strategy.stage < 3 and not job.lora:
        # Recomputation stops at the last tensor that backward needs: down_proj's input. ZeRO-3's own linear goes on.
        again -= 2 * shape.layers * shape.hidden * shape.intermediate * (job.tokens + soft * rows)
    # The pair of vectors and K = 3 pairs of steps: 16 B N D forward, 36 in a backward that computes scores again.
    loss = 13.0 * (soft + 2) * b * job.columns * shape.hidden
    total = useful + loss + again * job.checkpointing
    if job.chunks > 1:
        total += again + head
    steps = (1 + frozen) * (latent + head) + 3.5 * attention
    return Flops(prefix, causal, latent + attention, head, adapters, loss, total, useful + loss, steps)
