"""Bytes of one GPU, by part, at the two times when they are most: in backward, and in the optimizer's update.

Formulas follow what transformers' decoder layers, torch's autograd and DeepSpeed 0.19 keep, part by part; tests hold
them to the bytes that a real step has live. CUDA's context, NCCL and fragmentation come on top (`reserved`).
"""

from dataclasses import asdict, dataclass

from laser_dist.planning.job import GIB, Job, resident

# CUDA's context and libraries, then NCCL's buffers where ranks talk.
_CONTEXT, _NCCL = 1.0 * GIB, 1.0 * GIB
# Of the rest, what the caching allocator cannot use between blocks of other sizes.
_FRAGMENTATION = 0.06


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    parameters: float
    """Weights as stored, whole or a partition."""
    gathered: float
    """ZeRO-3: weights whole for their use."""
    gradients: float
    optimizer: float
    """States and float32 weights."""
    buckets: float
    """Gradients being reduced, and a table's gradient while it is summed."""
    activations: float
    """Saved for backward, and the layer being computed."""
    latent_kv: float
    """Keys and values of the prefix, which soft tokens attend to, with their gradients."""
    soft_tokens: float
    """Logits and probabilities over the vocabulary, float32 beside the model's dtype."""
    loss: float
    """All ranks' passages, and their gradient."""
    update: float
    """Float32 gradients and what AdamW needs beside its states; not at the same time as the activations."""

    @property
    def state(self) -> float:
        """What is held between steps too."""
        return self.parameters + self.optimizer

    @property
    def peak(self) -> float:
        backward = self.gathered + self.gradients + self.buckets + self.activations + self.latent_kv
        return self.state + max(backward + self.soft_tokens + self.loss, self.gradients + self.update)

    def parts(self) -> dict[str, float]:
        return asdict(self)


def usable(job: Job) -> float:
    """Bytes of a GPU that tensors can have."""
    return (job.hardware.memory * GIB - _CONTEXT - (_NCCL if job.ranks > 1 else 0)) * (1 - _FRAGMENTATION)


def host_memory(job: Job) -> float:
    """Bytes of one node's memory: what is offloaded, and the backbone, which every rank loads whole at the start."""
    s, kept = job.strategy, 0.0
    if s.offload_optimizer == "cpu":
        kept += (12 + job.element) * job.trained / job.nodes
    if s.offload_parameters == "cpu":
        kept += job.element * job.parameters / job.nodes
    return max(kept, float(job.element * job.shape.parameters * job.gpus))


def memory(job: Job) -> Memory:
    """Bytes of one GPU for this job, at the worse of two times: the end of forward, and deep in backward."""
    share = 1 / job.chunks  # of tokens and rows that are alive with a graph
    common = {
        **_states(job),
        "soft_tokens": _soft_tokens(job) * share,
        "loss": _loss(job),
        "update": _update(job),
    }
    saved, layer = _saved(job, share), _one_layer(job, share)
    kv, kv_gradients = _latent_kv(job, share)
    forward = Memory(
        **common, gathered=_gathered(job), buckets=_buckets(job, False), activations=saved + layer / 2, latent_kv=kv
    )
    backward = Memory(
        **common,
        gathered=_gathered_late(job),
        buckets=_buckets(job, True),
        activations=saved + layer,
        latent_kv=kv + kv_gradients,
    )
    return max(forward, backward, key=lambda m: m.peak)


def _states(job: Job) -> dict[str, float]:
    """What is held between steps, and gradients."""
    e, w, stage, s = job.element, job.ranks, job.strategy.stage, job.strategy
    parameters: float = e * job.parameters
    if stage == 3:
        parameters = 0.0 if s.offload_parameters else parameters / w
        if s.hpz:
            parameters += e * job.parameters / job.gpus
    per_weight = 12 if job.dtype == "bfloat16" or stage else 8  # float32 without ZeRO has no second copy of weights
    optimizer: float = per_weight * job.trained / (w if stage else 1)
    # Reduced once for all chunks, they stay whole until then.
    whole = stage < 2 or (job.chunks > 1 and job.reductions == 1)
    gradients = e * job.trained / (1 if whole else w)
    if s.offload_optimizer:
        optimizer, gradients = 0.0, gradients * whole
    return {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}


def _gathered(job: Job) -> float:
    """ZeRO-3: whole weights at the end of forward."""
    if job.strategy.stage < 3 or (job.ranks == 1 and not job.strategy.offload_parameters):
        return 0.0
    return job.element * min(job.parameters, job.strategy.live)


def _gathered_late(job: Job) -> float:
    """The same when backward has come to the prefix: checkpointed layers have let go of frozen weights by then."""
    gathered, layers = _gathered(job), job.shape.layers
    if gathered and resident(job) and job.lora and job.checkpointing and job.soft:
        return gathered - job.element * job.shape.layer_weights * (layers - 1)
    return gathered


def _buckets(job: Job, backward: bool) -> float:
    e, stage = job.element, job.strategy.stage
    # Allocated whole, however small the model; two where reduction overlaps backward. ZeRO-3 keeps its own for good.
    buckets = e * job.strategy.bucket * (2 if stage == 2 else 1) if backward or stage == 3 else 0.0
    if stage == 3:
        buckets += e * min(job.strategy.prefetch, job.parameters)
    # The table's gradient is dense, and comes once from the lookup, once from each use by a soft token.
    return buckets + (2 * e * job.shape.table if backward and not job.lora else 0)


def saved_per_token(job: Job) -> float:
    """Bytes that one layer saves for one token's backward, without checkpointing and without its keys and values."""
    s, e = job.shape, job.element
    query, kv = s.heads * s.head, s.kv_heads * s.head
    up = 0 if e == 4 else 4  # a norm computes in float32, and keeps that too
    normed = e + up + (0 if job.lora else e)  # the cast input, and for the norm's own weight its output
    if e == 4:
        normed = e + (0 if job.lora else e)
    norms = 2 * s.hidden * (normed + e)  # what comes out is the input of q, k, v or of gate, up
    head_norms = (query + kv) * normed * s.head_norms
    attention = e * (2 * query) + 4 * s.heads  # queries, outputs, log-sum-exp; keys and values are counted apart
    mlp = 4 * e * s.intermediate
    adapters = 7 * e * job.lora_rank
    return norms + head_norms + attention + mlp + adapters


def _saved(job: Job, share: float) -> float:
    """Saved by all layers for the tokens and soft tokens of one chunk; keys and values only without checkpointing."""
    s, e = job.shape, job.element
    tokens, soft = job.tokens * share, job.rows * job.soft * share
    ends = tokens * s.hidden * (4 + 2 * e)  # embedded tokens, the final norm, its gradient
    if job.checkpointing:
        return (tokens + soft) * s.layers * e * s.hidden + ends
    kv = 2 * e * s.kv_heads * s.head
    return (tokens + soft) * s.layers * (saved_per_token(job) + kv) + ends


def _one_layer(job: Job, share: float) -> float:
    """What a layer's backward holds beside: gradients of the MLP's inner width and of the stream.

    If the layer is computed again, also all that it saves.
    """
    s, tokens = job.shape, job.tokens * share
    passing = tokens * job.element * (3 * s.intermediate + 3 * s.hidden)
    return passing + (tokens * saved_per_token(job) if job.checkpointing else 0)


def _prompt_tokens(job: Job) -> int:
    return job.queries * (job.query_tokens + job.passages * job.passage_tokens)


def _latent_kv(job: Job, share: float) -> tuple[float, float]:
    """Keys and values beside what attention saves, and their gradients, which wait for the prefix's backward."""
    if not job.soft:
        return 0.0, 0.0
    per_token = 2 * job.element * job.shape.kv_heads * job.shape.head * job.shape.layers * share
    kept = job.tokens + job.rows * job.soft if job.checkpointing else 0
    return per_token * kept, per_token * _prompt_tokens(job)


def _soft_tokens(job: Job) -> float:
    cells = job.rows * job.shape.vocabulary
    low = job.element if job.element < 4 else 0
    saved = 8 + low  # log-probabilities and probabilities; the latter again in the model's dtype
    return job.soft * cells * saved


def _loss(job: Job) -> float:
    """Gathered passages in the dtype they are scored in, their gradient in it, and that in float32 to be summed."""
    if job.ranks == 1:
        return 3 * 4 * job.rows * job.shape.hidden
    return job.columns * job.shape.hidden * (2 * job.element + 4)


def _update(job: Job) -> float:
    own = job.trained / (job.ranks if job.strategy.stage else 1)
    if job.strategy.offload_optimizer:
        return 0.0
    # ZeRO-3 updates 1e9 weights at a time. Per weight: its gradient in float32; fused AdamW needs nothing beside it.
    at_once = min(own, 1e9) if job.strategy.stage == 3 else own
    return at_once * (4 if job.dtype == "bfloat16" else 0)
