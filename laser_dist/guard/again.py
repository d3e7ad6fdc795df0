"""The step of a dump, computed again in one process: the ranks one after the other, their passages side by side."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from laser_kernels.reference import kept_columns
from torch import Tensor

from laser_dist.batch import PackedBatch, Views
from laser_dist.config import ModelConfig, RunConfig
from laser_dist.distributed.collectives import Ranks
from laser_dist.distributed.grad_cache import GradCache
from laser_dist.distributed.rng import rng_state, set_rng_state
from laser_dist.errors import UserError
from laser_dist.guard.dump import Report
from laser_dist.guard.evidence import WATCHED, MicroBatch, of_loss, of_views, row_lengths
from laser_dist.model.backbone import load_backbone, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.objective.alignment import AlignmentObjective, LossTerms
from laser_dist.observability.scalars import term_gradient_norms
from laser_dist.run_folder import checkpoints_of
from laser_dist.run_models import frozen_teacher


@dataclass(frozen=True)
class Weights:
    """Where the weights of a replay come from."""

    folder: Path | None
    """A folder of weights or adapters; None: the backbone that training started from."""
    exact: bool
    """Whether they are those of the moment of the alarm."""
    told: str


@dataclass(frozen=True)
class Row:
    """One query with its passages."""

    query_id: str
    rank: int
    micro_batch: int
    length: float
    """The shortest vector of its rows before it gets unit length."""
    loss: float
    """InfoNCE of the latent view, nats."""
    place: float
    """Rank of its positive."""
    gradient: float
    """The largest of its rows, see MicroBatch.row_gradients."""


@dataclass
class Again:
    """What came of it."""

    tables: list[list[dict[str, float]]] = field(default_factory=list)
    """Per micro-batch and rank, as in the dump."""
    term_norms: list[list[dict[str, float]]] = field(default_factory=list)
    """Likewise: norm of each term's gradient with respect to the rank's vectors."""
    rows: list[Row] = field(default_factory=list)
    gradient_norm: float = 0.0
    """Of all parameters, before clipping."""


def find_weights(folder: Path, report: Report, checkpoint: Path | None) -> Weights:
    """Those given, else the dump's own, else the newest checkpoint before the step, else the backbone's."""
    if checkpoint is not None:
        model = checkpoint / "model" if (checkpoint / "model").is_dir() else checkpoint
        if not model.is_dir():
            raise UserError(f"--checkpoint {checkpoint}: this folder does not exist")
        return Weights(model, False, f"{checkpoint}, as asked for")
    if (folder / "model").is_dir():
        return Weights(folder / "model", True, "those of the moment, stored beside the batch")
    steps = {int(found.name[5:]): found for found in checkpoints_of(folder.parents[1]).glob("step-*[0-9]")}
    if before := [step for step in steps if step < report.step]:
        newest, late = max(before), report.step - 1 - max(before)
        told = f"{steps[newest]}, " + (f"{late} updates before the alarm" if late else "which the step started from")
        return Weights(steps[newest] / "model", not late, told)
    late = report.step - 1
    told = "the backbone's, " + (f"{late} updates before the alarm" if late else "which the step started from")
    return Weights(None, not late, told)


def load_retriever(config: RunConfig, weights: Weights, dtype: str, device: torch.device) -> LaserRetriever:
    """The retriever in training mode, with the dropout that the run had."""
    changes: dict[str, Any] = {"dtype": dtype, "activation_checkpointing": False}
    adapted = weights.folder is not None and (weights.folder / "adapter_config.json").is_file()
    if weights.folder is not None and not adapted:
        changes |= {"name": str(weights.folder), "revision": None, "layers": None, "lora_rank": 0}
    model = ModelConfig(**{**vars(config.model), **changes})
    torch.manual_seed(config.seed)  # adapters begin where those of the run began
    lm = load_backbone(model)
    if adapted:
        from peft import PeftModel

        lm = PeftModel.from_pretrained(lm, str(weights.folder), is_trainable=True).train()
    else:
        lm = prepare_for_training(lm, model)
    attention = config.model.attention if device.type == "cuda" else "auto"
    thinking = config.thinking
    retriever = LaserRetriever(
        lm,
        steps=thinking.steps,
        convention=thinking.convention,
        attention=attention,
        passage_steps=config.objective.compares_steps,
    )
    return retriever.to(device)


class _Alone:
    """What GradCache needs of an engine, without one."""

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self.module, self.device = module, device

    def __call__(self, batch: PackedBatch) -> Views:
        return self.module(batch)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        loss.backward()


def run_again(
    retriever: LaserRetriever,
    config: RunConfig,
    report: Report,
    batches: list[list[tuple[PackedBatch, dict[str, Tensor]]]],
    device: torch.device,
) -> Again:
    """Forward, loss, gradients of vectors and of parameters; `batches` per micro-batch and rank."""
    ranks, again = SideBySide(), Again()
    objective = AlignmentObjective(
        config.objective, config.trajectory_temperature, frozen_teacher(config, device), evidence=True, ranks=ranks
    )
    for number, packed_batches in enumerate(batches):
        caches, micros, views = [], [], []
        for packed, state in packed_batches:
            batch, cache = packed.to(device), GradCache(_Alone(retriever, device), always=True)  # type: ignore[arg-type]
            if state.keys() == rng_state(device).keys():  # of another kind of device there is nothing to go on with
                set_rng_state(state, device)
            views.append(cache.forward(batch, report.chunks[number]))
            caches.append(cache)
            micros.append(MicroBatch(batch, report.chunks[number], state))
        losses = ranks.run(
            [partial(objective, own, micro.batch, report.step - 1) for own, micro in zip(views, micros, strict=True)]
        )
        again.term_norms.append([_term_norms(loss, own) for loss, own in zip(losses, views, strict=True)])
        total = torch.stack([loss.total for loss in losses]).sum()
        gradients = _gradients(total, views)
        share = len(packed_batches) * len(batches)
        for cache, found in zip(caches, gradients, strict=True):
            cache.pass_on([None if g is None else g / share for g in found])
        values = [of_loss(loss) | of_views(own) | loss.evidence for loss, own in zip(losses, views, strict=True)]
        again.tables.append([{name: float(x.detach()) for name, x in row.items()} for row in values])
        passages_ND = torch.cat([own.passage_PD for own in views]).detach()
        keys_N = _keys(objective, [micro.batch for micro in micros])
        for r, micro in enumerate(micros):
            micro.row_norms_R, micro.gradients = views[r].row_norms_R, _lengths(gradients[r])
            again.rows += _rows(objective, r, number, micro, views[r], passages_ND, keys_N)
    again.gradient_norm = float(
        torch.nn.utils.get_total_norm([p.grad for p in retriever.parameters() if p.grad is not None])
    )
    return again


class SideBySide(Ranks):
    """Ranks that run one after the other in one process: what each sends is noted, and there for the others next time.

    Runs are repeated until nothing that was sent depends on what was not there yet: GIRCSE's penalty takes the mean
    over ranks of losses, which themselves need all ranks' passages.
    """

    ROUNDS = 3

    own, count = 0, 1

    def run(self, ranks: list[Callable[[], LossTerms]]) -> list[LossTerms]:
        """What each of the ranks' calls returns."""
        self.count = len(ranks)
        before: list[list[Tensor]] = []
        for _ in range(self.ROUNDS if len(ranks) > 1 else 1):
            self.before, self.sent, losses = before, [list[Tensor]() for _ in ranks], []
            for self.own, call in enumerate(ranks):  # noqa: B020
                losses.append(call())
            before = self.sent
        return losses

    def gather_rows(self, rows: Tensor) -> Tensor:
        return self._beside(rows).detach()

    def gather_rows_with_gradient(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return self._beside(rows.to(dtype))

    def _beside(self, rows: Tensor) -> Tensor:
        turn = len(self.sent[self.own])
        self.sent[self.own].append(rows)
        others = [sent[turn] if self.before else rows for sent in (self.before or self.sent)]
        return torch.cat([*others[: self.own], rows, *others[self.own + 1 :]])


def _keys(objective: AlignmentObjective, batches: list[PackedBatch]) -> Tensor | None:
    """(N,) of the passages of all ranks; None where nothing is masked."""
    keys = [batch.passage_keys_P for batch in batches if batch.passage_keys_P is not None]
    return torch.cat(keys) if keys and objective.config.mask_false_negatives else None


def _term_norms(loss: LossTerms, views: Views) -> dict[str, float]:
    return term_gradient_norms(loss, [x for x in views[:4] if x is not None])


def _gradients(total: Tensor, views: list[Views]) -> list[list[Tensor | None]]:
    """Per rank and field of its views."""
    leaves = [x for own in views for x in own if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(total, leaves, allow_unused=True))
    return [[next(found) if x is not None and x.requires_grad else None for x in own] for own in views]


def _lengths(gradients: list[Tensor | None]) -> dict[str, Tensor]:
    named = zip(Views._fields, gradients, strict=True)
    return {name: row_lengths(g) for name, g in named if g is not None and name in WATCHED}


def _rows(
    objective: AlignmentObjective,
    rank: int,
    number: int,
    micro: MicroBatch,
    views: Views,
    passages_ND: Tensor,
    keys_N: Tensor | None,
) -> list[Row]:
    batch, config = micro.batch, objective.config
    assert batch.labels_B is not None and views.row_norms_R is not None
    labels_B = batch.labels_B + rank * len(views.passage_PD)
    scores_BN = views.query_BD.detach() @ passages_ND.T
    ids = batch.positive_keys_BX if keys_N is not None else None
    keep_BN = kept_columns(scores_BN, labels_B, ids, keys_N, config.false_negative_margin)
    if keep_BN is not None:
        scores_BN = scores_BN.masked_fill(~keep_BN, -torch.inf)
    own_B1 = scores_BN.gather(1, labels_B[:, None])
    loss_B = ((scores_BN / config.temperature).logsumexp(1) - own_B1[:, 0] / config.temperature).tolist()
    place_B = (1 + (scores_BN > own_B1).sum(1)).tolist()
    gradients_R, queries = micro.row_gradients(), batch.queries
    per_query = len(views.passage_PD) // queries

    def of_query(values_R: Tensor, q: int) -> Tensor:
        first = queries + q * per_query
        return torch.cat([values_R[q : q + 1], values_R[first : first + per_query]])

    return [
        Row(
            batch.query_ids[q],
            rank,
            number,
            float(of_query(views.row_norms_R, q).min()),
            loss_B[q],
            float(place_B[q]),
            float("nan") if gradients_R is None else float(of_query(gradients_R, q).max()),
        )
        for q in range(queries)
    ]
