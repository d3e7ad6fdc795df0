"""What one real training step holds, computes and sends, counted and not timed: the plan's formulas are held to it.

- memory: bytes of live tensors' storages, by owner; what autograd saves, each storage once
- FLOPs: torch's own FlopCounterMode
- communication: every collective that reaches torch's dispatcher (c10d), whoever called it

Peaks of a process would count its allocator as well; these bytes are the same on every machine.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from laser_dist.batch import PackedBatch, TokenSequence, pack
from laser_dist.config import ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from laser_dist.distributed.engine import Engine, init_distributed
from laser_dist.distributed.grad_cache import GradCache
from laser_dist.model.attention import NAME as PACKED_ATTENTION
from laser_dist.model.backbone import DTYPES, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.objective.alignment import AlignmentObjective
from laser_dist.optim import build_optimizer
from laser_dist.planning.counters import CPU_ATTENTION, Collectives, LiveBytes, all_tensors, saving, storages
from laser_dist.planning.shapes import Shape
from laser_dist.testing.published import PublishedStep, all_rows_loss


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step to count: a random model of this shape on random tokens, all rows of a kind equally long."""

    shape: Shape
    ds_config: dict[str, Any]
    queries: int = 2
    passages: int = 2  # G, per query
    query_tokens: int = 8
    explicit_tokens: int = 16  # [query ; rationale ; EOS]
    passage_tokens: int = 8
    steps: int = 3
    dtype: str = "float32"
    lora_rank: int = 0
    checkpointing: bool = False
    chunks: int = 1  # GradCache's
    published: bool = False  # the published step instead of ours, to compare with


@dataclass(frozen=True)
class Counted:
    """What one step of one rank took; bytes, and FLOPs (a multiply-add is two)."""

    flops: int
    saved: int  # by autograd at the end of forward, parameters left out
    parameters: int  # stored, partitioned or whole, between steps
    optimizer: int  # states and float32 weights
    held: int  # all live tensors between steps
    peak: int  # most bytes of live tensors at any time of the step
    collectives: dict[str, int]  # name -> bytes of the whole tensor, summed over calls
    calls: dict[str, int]


def count_step(rank: int, world_size: int, case: Case) -> Counted:
    """The second and third step of a case on this rank (in the first, ZeRO-3 learns the order of the modules)."""
    init_distributed()
    others = set(storages(all_tensors()))  # of cases before: DeepSpeed's hooks keep their engines alive
    engine, forward_backward = prepared(case, rank)
    forward_backward()
    engine.step()
    saved: dict[int, int] = {}
    live = [x for x in all_tensors() if x.untyped_storage()._cdata not in others]
    own = storages(x for p in engine.module.parameters() for x in _stored(p))
    states = storages(_optimizer_tensors(engine.ds.optimizer))
    with LiveBytes(live) as memory:
        held = memory.now
        forward_backward()
        engine.step()
    del live
    # Another step: the counters' own hooks keep recomputed activations alive.
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops, Collectives() as sent:
        forward_backward(saved)
        engine.step()
    return Counted(
        flops=flops.get_total_flops(),
        saved=sum(saved.values()),
        parameters=sum(own.values()),
        optimizer=sum(size for key, size in states.items() if key not in own),
        held=held,
        peak=memory.peak,
        collectives=sent.bytes,
        calls=sent.calls,
    )


def prepared(case: Case, rank: int) -> tuple[Engine, Callable[..., Tensor]]:
    """The case's engine, and its forward and backward; what is saved goes into a dict that is given."""
    config = ModelConfig(
        dtype="bfloat16" if case.dtype == "bfloat16" else "float32",
        lora_rank=case.lora_rank,
        activation_checkpointing=case.checkpointing,
    )
    run = RunConfig(model=config, train=TrainConfig(queries_per_rank=case.queries))
    torch.manual_seed(0)
    lm = prepare_for_training(random_model(case.shape, case.dtype), config)
    retriever: Any = LaserRetriever(lm, steps=case.steps)
    objective = AlignmentObjective(ObjectiveConfig(mask_false_negatives=False), 0.05)
    loss_of: Any = objective
    if case.published:
        lm.set_attn_implementation("sdpa")  # type: ignore[operator]
        retriever = PublishedStep(lm, steps=case.steps, checkpointing=case.checkpointing)
        loss_of = functools.partial(all_rows_loss, objective)
    lora_once = case.chunks > 1 and case.lora_rank > 0  # as train.reduce_gradients has it by default
    engine = Engine(retriever, build_optimizer(retriever, run.optimizer), case.ds_config, reduce_once=lora_once)
    cache = GradCache(engine)
    batch = random_batch(case, rank).to(engine.device)

    def forward_backward(saved: dict[int, int] | None = None) -> Tensor:
        if saved is None:
            views = cache.forward(batch, case.chunks)
        else:
            with saving(saved, engine.module.parameters()):
                views = cache.forward(batch, case.chunks)
        loss = loss_of(views, batch, 0).total
        with engine.reduction():
            cache.backward(loss)
        return loss

    return engine, forward_backward


def random_model(shape: Shape, dtype: str) -> Any:
    """A random causal LM of this shape with packed attention."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    make = Qwen3Config if shape.head_norms else LlamaConfig
    config = make(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        tie_word_embeddings=shape.tied,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION, dtype=DTYPES[dtype])


def random_batch(case: Case, rank: int) -> PackedBatch:
    """B queries with rationales and their passages, of the case's lengths."""
    generator = torch.Generator().manual_seed(rank)

    def tokens(count: int) -> list[int]:
        return torch.randint(case.shape.vocabulary, (count,), generator=generator).tolist()

    rationale = case.explicit_tokens - case.query_tokens - 1
    ends = [(i + 1) * rationale // case.steps - 1 for i in range(case.steps)]
    rows = [TokenSequence(tokens(case.query_tokens), tokens(rationale), ends) for _ in range(case.queries)]
    rows += [TokenSequence(tokens(case.passage_tokens)) for _ in range(case.queries * case.passages)]
    return pack(rows, eos=0, queries=case.queries, labels_B=torch.arange(case.queries) * case.passages)


def count_steps(rank: int, world_size: int, cases: list[Case]) -> list[Counted]:
    """`count_step` of several cases in one set of processes."""
    return [count_step(rank, world_size, case) for case in cases]


def _stored(parameter: Tensor) -> list[Tensor]:
    """A parameter's storages: its own, and its partitions under ZeRO-3."""
    partitions = (getattr(parameter, name, None) for name in ("ds_tensor", "ds_secondary_tensor"))
    return [parameter, *(x for x in partitions if x is not None)]


def _optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """States and float32 weights; ZeRO-3 hands the latter to the inner optimizer only while it updates."""
    inner = getattr(optimizer, "optimizer", optimizer)
    states = [x for state in inner.state.values() for x in state.values() if isinstance(x, Tensor)]
    groups = [p for group in inner.param_groups for p in group["params"]]
    return states + groups + list(getattr(optimizer, "fp32_partitioned_groups_flat", []))
