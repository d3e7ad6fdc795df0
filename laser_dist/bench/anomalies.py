"""Anomalies that a cluster, a data set or a bug can put into a training, each put into a real one of a tiny model.

An injection changes what goes wrong in life (weights, vectors, batches, gradients, a collective), never what the guard
looks at.
"""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import laser_dist.trainer as training
from laser_dist.data.streaming.loader import TrainingBatch
from laser_dist.distributed.collectives import gather_objects, rank
from laser_dist.ds_config import resolve
from laser_dist.errors import UserError
from laser_dist.guard.replicas import bit_sum
from laser_dist.objective.alignment import AlignmentObjective
from laser_dist.recipe import load_config
from laser_dist.trainer import Trainer

STAGES = ("zero0", "zero1", "zero2", "zero3-test")


@dataclass(frozen=True)
class Anomaly:
    """One thing that goes wrong at step `at` (from 0), and the rule that must notice."""

    name: str
    rules: tuple[str, ...]
    inject: Callable[[Trainer, contextlib.ExitStack], None]
    at: int = 2
    late: int = 0
    """Steps that the rule may take, because it is about many."""
    flags: tuple[str, ...] = ()
    stops: bool = True


def thoughts(change: Callable[[torch.Tensor, int], torch.Tensor], only: int | None = None) -> Any:
    """Change the latent states (R, K, D) of a batch of B queries on all ranks or one."""

    def inject(trainer: Trainer, stack: contextlib.ExitStack) -> None:
        think = trainer.retriever.think

        def changed(batch: Any) -> Any:
            hidden_TD, thoughts_RKD, entropy = think(batch)
            mine = only is None or rank() == only
            return hidden_TD, change(thoughts_RKD, batch.queries) if mine else thoughts_RKD, entropy

        trainer.retriever.think = changed  # type: ignore[method-assign]

    return inject


def scaled(row: int, factor: float) -> Callable[[torch.Tensor, int], torch.Tensor]:
    def change(thoughts_RKD: torch.Tensor, queries: int) -> torch.Tensor:
        factors = torch.ones(len(thoughts_RKD), 1, 1, dtype=thoughts_RKD.dtype)
        factors[row] = factor
        return thoughts_RKD * factors

    return change


def collapsed(thoughts_RKD: torch.Tensor, queries: int) -> torch.Tensor:
    passages = thoughts_RKD[queries : queries + 1].expand(len(thoughts_RKD) - queries, -1, -1)
    return torch.cat([thoughts_RKD[:queries], passages + 0 * thoughts_RKD[queries:]])


def gradients(factor: float, only: int | None = None) -> Any:
    """Change the gradient of a vector on its way back; the loss says nothing of it."""

    def inject(trainer: Trainer, stack: contextlib.ExitStack) -> None:
        forward = trainer.grad_cache.forward

        def changed(batch: Any, chunks: int) -> Any:
            views = forward(batch, chunks)
            if only is None or rank() == only:
                views.query_steps_BKD.register_hook(lambda g: g * factor)
            return views

        trainer.grad_cache.forward = changed  # type: ignore[method-assign]

    return inject


def batches(change: Callable[[TrainingBatch], TrainingBatch]) -> Any:
    """Change what the loader gives."""

    def inject(trainer: Trainer, stack: contextlib.ExitStack) -> None:
        following = trainer._next
        trainer._next = lambda stream: (lambda found: (change(found[0]), found[1]))(following(stream))  # type: ignore

    return inject


def packed(**changes: Callable[[Any], Any]) -> Any:
    """Change fields of the packed batch."""

    def change(loaded: TrainingBatch) -> TrainingBatch:
        made = {name: function(loaded.packed) for name, function in changes.items()}
        return replace(loaded, packed=replace(loaded.packed, **made))

    return batches(change)


def again(trainer: Trainer, stack: contextlib.ExitStack) -> None:
    """The batch of the step before, at the place of this one."""
    before = trainer.guard.loaded
    batches(lambda loaded: replace(before, epoch=loaded.epoch))(trainer, stack)


def infinite_term(trainer: Trainer, stack: contextlib.ExitStack) -> None:
    right = AlignmentObjective.__call__

    def changed(*args: Any) -> Any:
        loss = right(*args)
        return replace(loss, terms={**loss.terms, "kl_output": loss.terms["kl_output"] + torch.inf})

    AlignmentObjective.__call__ = changed  # type: ignore[method-assign, assignment]
    stack.callback(setattr, AlignmentObjective, "__call__", right)


def broken_weight(trainer: Trainer, stack: contextlib.ExitStack) -> None:
    weights = trainer.objective.weights
    trainer.objective.weights = lambda step: weights(step) | {"kl_trajectory": torch.inf}  # type: ignore


def learning_rates(rate: Callable[[float], float]) -> Any:
    def inject(trainer: Trainer, stack: contextlib.ExitStack) -> None:
        right = training.learning_rate
        training.learning_rate = lambda *args: rate(right(*args))
        stack.callback(setattr, training, "learning_rate", right)

    return inject


def stale_gather(trainer: Trainer, stack: contextlib.ExitStack) -> None:
    """On rank 1, rank 0's passages are not those it sent: a buffer that was read too early."""
    right = trainer.objective.ranks.gather_rows_with_gradient

    def gather(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        found = right(rows, dtype)
        if rank() == 1:
            found = torch.cat([found[: len(rows)].detach() + 0.01, found[len(rows) :]])
        return found

    trainer.objective.ranks.gather_rows_with_gradient = gather  # type: ignore[method-assign]


def broken_parameter(trainer: Trainer, stack: contextlib.ExitStack) -> None:
    parameter = next(p for name, p in trainer.retriever.lm.named_parameters() if "up_proj" in name)
    if rank() == 0:
        getattr(parameter, "ds_tensor", parameter).data.view(-1)[3] = torch.nan


def flipped_bit(trainer: Trainer, stack: contextlib.ExitStack) -> None:
    if rank() == 1:
        parameter = next(p for name, p in trainer.retriever.lm.named_parameters() if "up_proj" in name)
        parameter.data.view(torch.int32).view(-1)[5] ^= 1


def same_data(loaded: TrainingBatch) -> TrainingBatch:
    return gather_objects(loaded)[0]


def mixed_up(loaded: TrainingBatch) -> TrainingBatch:
    """Any passage as a query's positive, as if the rows of the data had been mixed up: keys say so, too.

    Were it another query's positive, a model could learn what positives have in common, and leave chance.
    """
    p = loaded.packed
    assert p.passage_keys_P is not None
    labels_B = torch.randperm(len(p.passage_keys_P))[: p.queries]
    return replace(loaded, packed=replace(p, labels_B=labels_B, positive_keys_BX=p.passage_keys_P[labels_B][:, None]))


NAN, INF = float("nan"), float("inf")
ANOMALIES = (
    Anomaly("a passage's vector is zero", ("row_norm",), thoughts(scaled(-2, 0.0))),
    Anomaly("a query's vector is 1e-9 of the others", ("row_norm",), thoughts(scaled(1, 1e-9), only=1)),
    Anomaly("NaN in a vector on one rank", ("finite",), thoughts(scaled(0, NAN), only=1)),
    Anomaly("infinity in a term", ("finite",), infinite_term),
    Anomaly("NaN in a gradient only", ("finite",), gradients(NAN, only=1)),
    Anomaly("a gradient 1e8 times as large", ("gradient_spike",), gradients(1e8), at=34),
    Anomaly("a parameter becomes NaN", ("finite",), broken_parameter),
    Anomaly("the learning rate is NaN", ("schedule",), learning_rates(lambda rate: NAN)),
    Anomaly("the weight of a term is infinite", ("finite", "schedule"), broken_weight),
    Anomaly("labels are shifted by one", ("labels",), packed(labels_B=lambda p: p.labels_B + 1)),
    Anomaly("queries with any passages, from the beginning", ("mean_rank",), batches(mixed_up), at=0, late=64,
            flags=("--guard.rank-after", "64")),
    Anomaly("all passages have one vector", ("spread",), thoughts(collapsed)),
    Anomaly("all negatives are masked", ("negatives",), packed(
        passage_keys_P=lambda p: torch.zeros_like(p.passage_keys_P),
        positive_keys_BX=lambda p: torch.zeros_like(p.positive_keys_BX))),
    Anomaly("the batch before comes again", ("duplicate",), again),
    Anomaly("all queries of a rank are one", ("duplicate",), packed(query_ids=lambda p: p.query_ids[:1] * p.queries)),
    Anomaly("both ranks read the same part", ("duplicate",), batches(same_data)),
    Anomaly("a stale gather on one rank", ("gather",), stale_gather),
    Anomaly("every rationale shorter than K", ("segments",), lambda trainer, stack: None, at=0, late=16, stops=False,
            flags=("--thinking.steps", "9")),
    Anomaly("one bit of a replica flips", ("replicas",), flipped_bit,
            flags=("--train.deepspeed", "zero0", "--guard.checksums-every", "1")),
    Anomaly("ranks differ in the learning rate", ("schedule",), learning_rates(lambda rate: rate * (1 + rank()))),
)  # fmt: skip


def caught(rank_: int, world_size: int, recipe: Path, output: Path, numbers: list[int]) -> list[dict[str, Any]]:
    """For `run_distributed`: what the guard made of each anomaly, trained alternately under ZeRO-0 to 3."""
    return [_caught(recipe, output / str(number), ANOMALIES[number], STAGES[number % 4]) for number in numbers]


def _caught(recipe: Path, output: Path, anomaly: Anomaly, stage: str) -> dict[str, Any]:
    shutil.rmtree(output, ignore_errors=True)
    steps = anomaly.at + anomaly.late + 8
    flags = ["--output", str(output), "--train.max-steps", str(steps), "--train.deepspeed", stage, *anomaly.flags]
    config = load_config([str(recipe), *flags])
    trainer = Trainer(config, resolve(config.train.deepspeed, config))
    before: list[int] = []
    right = trainer.step
    with contextlib.ExitStack() as stack:

        def step(number: int, stream: Any) -> Any:
            if number == anomaly.at:
                anomaly.inject(trainer, stack)
            before[:] = [fingerprint(trainer)]
            return right(number, stream)

        trainer.step = step  # type: ignore[method-assign, assignment]
        message = ""
        try:
            trainer.fit()
        except UserError as error:
            message = str(error)
    rule = trainer.guard.last.rule if trainer.guard.last else None
    at = trainer.guard.said.get(rule, trainer.guard.step) if rule else None
    return {
        "name": anomaly.name,
        "stage": trainer.engine.stage,
        "rule": rule,
        "steps_late": None if at is None else at - anomaly.at - anomaly.late,
        "unchanged": fingerprint(trainer) == before[0] if message else None,
        "caught": rule in anomaly.rules and bool(message) == anomaly.stops and at is not None
        and 0 <= at - anomaly.at <= anomaly.late + 1,
        "message": message,
    }  # fmt: skip


def fingerprint(trainer: Trainer) -> int:
    """Of this rank's parameters and optimizer states, to the bit."""
    parameters = [getattr(p, "ds_tensor", p) for p in trainer.retriever.parameters()]
    states = [x for state in trainer.engine.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    masters = [x for group in trainer.engine.optimizer.param_groups for x in group["params"]]
    return hash(tuple(int(bit_sum(x)) for x in [*parameters, *states, *masters] if x.numel()))
