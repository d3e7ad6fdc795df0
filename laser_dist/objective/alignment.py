"""The objective: LaSER's four terms with their weights, over passages gathered from all ranks (see spec)."""

from dataclasses import dataclass
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
from laser_dist.objective.terms import TERMS


@dataclass(frozen=True)
class LossTerms:
    """This rank's four terms, their weighted total, and what one wants to know beside them (all scalars)."""

    terms: dict[str, Tensor]
    total: Tensor
    diagnostics: dict[str, Tensor]


class AlignmentObjective:
    """L = InfoNCE_L + l1 InfoNCE_E + l2 KL_out + l3 KL_mid, each the mean over this rank's own queries.

    Averaged over ranks (as data parallelism does) its gradient is exactly the global batch's, for every term and any
    number of ranks: rows are local, passages are gathered with a SUM reduce-scatter backward, nothing is rescaled.
    """

    def __init__(self, config: ObjectiveConfig, trajectory_temperature: float):
        self.config = config
        self.trajectory_temperature = trajectory_temperature

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
        config, weights = self.config, self.weights(step)
        assert batch.labels_B is not None, "a batch without queries has nothing to compare"
        dtype, ring = self._score_dtype(views), config.passages == "ring" and world_size() > 1
        passages_ND = views.passage_PD.to(dtype) if ring else gather_rows_with_gradient(views.passage_PD, dtype)
        mask: dict[str, Any] = {}
        if config.mask_false_negatives and batch.passage_keys_P is not None:
            keys_N = batch.passage_keys_P if ring else gather_rows(batch.passage_keys_P)
            mask = {"query_ids": batch.positive_keys_BX, "passage_ids": keys_N}
        with_teacher = views.teacher_BD is not None and (config.explicit_weight > 0 or config.output_weight > 0)
        with_steps = views.segments_BKD is not None and config.trajectory_weight > 0
        alignment = align(
            views.query_BD.to(dtype),
            views.teacher_BD.to(dtype) if with_teacher and views.teacher_BD is not None else None,
            unit(views.query_steps_BKD).to(dtype) if with_steps else None,
            unit(views.segments_BKD.detach()).to(dtype) if with_steps and views.segments_BKD is not None else None,
            passages_ND,
            batch.labels_B if ring else batch.labels_B + rank() * len(views.passage_PD),
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
        columns = len(views.passage_PD) * world_size()
        return LossTerms(terms, total, self._diagnostics(views, alignment, columns))

    def _score_dtype(self, views: Views) -> torch.dtype:
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
