"""The objective: LaSER's four terms with their weights, over passages gathered from all ranks (see spec)."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from laser_kernels import Alignment, align, choose
from torch import Tensor

from laser_dist.batch import PackedBatch, Views
from laser_dist.config import ObjectiveConfig
from laser_dist.distributed.collectives import gather_rows, gather_rows_with_gradient, rank, world_size
from laser_dist.errors import UserError
from laser_dist.model.retriever import unit
from laser_dist.objective.evidence import COLUMNS, checksums, mixed, without_negatives, wrong_labels
from laser_dist.objective.terms import TERMS


@dataclass(frozen=True)
class LossTerms:
    """This rank's four terms, their weighted total, and what one wants to know beside them (all scalars)."""

    terms: dict[str, Tensor]
    total: Tensor
    diagnostics: dict[str, Tensor]
    evidence: dict[str, Tensor] = field(default_factory=dict)
    """What the guard compares over ranks, see `evidence.py`."""
    received_W: Tensor | None = None
    """Checksums of the passages that came from each rank."""


class AlignmentObjective:
    """L = InfoNCE_L + l1 InfoNCE_E + l2 KL_out + l3 KL_mid, each the mean over this rank's own queries.

    Averaged over ranks (as data parallelism does) its gradient is exactly the global batch's, for every term and any
    number of ranks: rows are local, passages are gathered with a SUM reduce-scatter backward, nothing is rescaled.
    """

    def __init__(self, config: ObjectiveConfig, trajectory_temperature: float, *, evidence: bool = False):
        """`evidence`: also collect what the guard wants to see."""
        self.config = config
        self.trajectory_temperature = trajectory_temperature
        self.evidence = evidence

    def weights(self, step: int) -> dict[str, float]:
        """Weight of each term at an optimizer step (from 0); the distillation terms ramp in over `ramp_steps`."""
        config = self.config
        ramp = min(1.0, step / config.ramp_steps) if config.ramp_steps else 1.0
        weights = (1.0, config.explicit_weight, ramp * config.output_weight, ramp * config.trajectory_weight)
        return dict(zip(TERMS, weights, strict=True))

    def kernel_on(self, device: torch.device) -> str:
        """Name of the loss's implementation. UserError: the one asked for cannot run there."""
        try:
            name, _ = choose(self.config.kernel, device, torch.float32)
        except ValueError as error:
            raise UserError(f"objective.kernel: {error}") from None
        if name == "reference" and self.config.passages == "ring":
            raise UserError('objective.passages = "ring": the reference has no ring; unset LASER_KERNELS')
        return name

    def __call__(self, views: Views, batch: PackedBatch, step: int) -> LossTerms:
        """Compare this rank's B queries with the N passages of all ranks; called by every rank alike."""
        dtype, ring = self.score_dtype(views), self.config.passages == "ring" and world_size() > 1
        passages_ND = views.passage_PD.to(dtype) if ring else gather_rows_with_gradient(views.passage_PD, dtype)
        keys_N = batch.passage_keys_P
        if keys_N is not None and self.config.mask_false_negatives and not ring:
            keys_N = gather_rows(keys_N)
        return self.compare(views, batch, step, passages_ND, keys_N, ranks=(rank(), world_size()), ring=ring)

    def compare(
        self,
        views: Views,
        batch: PackedBatch,
        step: int,
        passages_ND: Tensor,
        keys_N: Tensor | None,
        *,
        ranks: tuple[int, int],
        ring: bool = False,
    ) -> LossTerms:
        """The terms of the queries of one of W ranks, `ranks` = (rank, W), whose passages are all there.

        `keys_N`: of these passages; of the rank's own where nothing is masked. `ring`: the passages are the rank's own,
        and the others' pass by.
        """
        config, weights, dtype = self.config, self.weights(step), passages_ND.dtype
        assert batch.labels_B is not None, "a batch without queries has nothing to compare"
        first = 0 if ring else ranks[0] * len(views.passage_PD)
        mask: dict[str, Any] = {}
        if config.mask_false_negatives and keys_N is not None:
            mask = {"query_ids": batch.positive_keys_BX, "passage_ids": keys_N}
        with_teacher = views.teacher_BD is not None and (config.explicit_weight > 0 or config.output_weight > 0)
        with_steps = views.segments_BKD is not None and config.trajectory_weight > 0
        alignment = align(
            views.query_BD.to(dtype),
            views.teacher_BD.to(dtype) if with_teacher and views.teacher_BD is not None else None,
            unit(views.query_steps_BKD).to(dtype) if with_steps else None,
            unit(views.segments_BKD.detach()).to(dtype) if with_steps and views.segments_BKD is not None else None,
            passages_ND,
            batch.labels_B + first,
            temperature=config.temperature,
            distill_temperature=config.distill_temperature,
            trajectory_temperature=self.trajectory_temperature,
            margin=config.false_negative_margin,
            group=dist.group.WORLD if ring else None,
            kernel=config.kernel,
            **mask,
        )
        terms = dict(zip(TERMS, alignment.terms, strict=True))
        # A term of weight 0 stays out of the graph: it is reported where it comes for free, and costs no backward.
        total = torch.stack([weights[name] * value for name, value in terms.items() if weights[name] > 0]).sum()
        columns = len(views.passage_PD) * ranks[1]
        diagnostics = self._diagnostics(views, alignment, columns)
        if not self.evidence:
            return LossTerms(terms, total, diagnostics)
        labels_B = batch.labels_B + (first if mask else 0)
        received_W = checksums(passages_ND, 1 if ring else ranks[1])
        evidence = {
            "wrong_labels": wrong_labels(batch, labels_B, keys_N),
            "without_negatives": without_negatives(alignment.dropped_B, columns),
            "sent": checksums(views.passage_PD[:, :COLUMNS].to(dtype), 1)[0],
            "received": mixed(received_W),
        }
        return LossTerms(terms, total, diagnostics, evidence, None if ring else received_W)

    def score_dtype(self, views: Views) -> torch.dtype:
        """Vectors come in float32; a GPU's tensor cores want the model's dtype, which is half the bytes to gather."""
        vectors = views.query_BD
        if self.config.score_dtype != "auto" and vectors.dtype != torch.float64:
            return torch.bfloat16 if self.config.score_dtype == "bfloat16" else torch.float32
        return views.query_steps_BKD.dtype if vectors.is_cuda else vectors.dtype

    def _diagnostics(self, views: Views, alignment: Alignment, columns: int) -> dict[str, Tensor]:
        above_B, explicit_above_B = alignment.rivals_above_B, alignment.explicit_rivals_above_B
        values = {
            "positive_mean_rank": 1 + above_B.double().mean(),  # chance: (N + 1) / 2
            "latent_top1_accuracy": (above_B == 0).double().mean(),
            "soft_token_entropy": views.soft_token_entropy.detach(),
        }
        if explicit_above_B is not None:
            values["explicit_top1_accuracy"] = (explicit_above_B == 0).double().mean()
        if self.config.mask_false_negatives or self.config.false_negative_margin is not None:
            values["false_negatives_masked"] = alignment.dropped_B.double().mean() / columns
        return values
