"""The objective: LaSER's four terms with their weights, over passages gathered from all ranks (see spec)."""

from dataclasses import dataclass
from typing import Any

import torch
from laser_kernels import alignment_loss
from torch import Tensor

from laser_dist.batch import PackedBatch, Views
from laser_dist.config import ObjectiveConfig
from laser_dist.distributed.collectives import gather_rows, gather_rows_with_gradient, rank
from laser_dist.model.retriever import unit

TERMS = ("infonce_latent", "infonce_explicit", "kl_output", "kl_trajectory")


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

    def __call__(self, views: Views, batch: PackedBatch, step: int) -> LossTerms:
        """Compare this rank's B queries with the N passages of all ranks; called by every rank alike."""
        config, weights = self.config, self.weights(step)
        assert batch.labels_B is not None, "a batch without queries has nothing to compare"
        passages_ND = gather_rows_with_gradient(views.passage_PD)
        labels_B = batch.labels_B + rank() * len(views.passage_PD)
        mask: dict[str, Any] = {}
        if config.mask_false_negatives and batch.passage_keys_P is not None:
            mask = {"query_ids": batch.positive_keys_BX, "passage_ids": gather_rows(batch.passage_keys_P)}
        with_teacher = views.teacher_BD is not None and (config.explicit_weight > 0 or config.output_weight > 0)
        with_steps = views.segments_BKD is not None and config.trajectory_weight > 0
        values = alignment_loss(
            views.query_BD,
            views.teacher_BD if with_teacher else None,
            unit(views.query_steps_BKD) if with_steps else None,
            unit(views.segments_BKD.detach()) if with_steps and views.segments_BKD is not None else None,
            passages_ND,
            labels_B,
            temperature=config.temperature,
            distill_temperature=config.distill_temperature,
            trajectory_temperature=self.trajectory_temperature,
            **mask,
        )
        terms = dict(zip(TERMS, values, strict=True))
        # A term of weight 0 stays out of the graph: it is reported where it comes for free, and costs no backward.
        total = torch.stack([weights[name] * value for name, value in terms.items() if weights[name] > 0]).sum()
        return LossTerms(terms, total, self._diagnostics(views, passages_ND, labels_B, mask))

    @torch.no_grad()
    def _diagnostics(
        self, views: Views, passages_ND: Tensor, labels_B: Tensor, mask: dict[str, Any]
    ) -> dict[str, Tensor]:
        scores_BN = views.query_BD @ passages_ND.T
        own_B1 = scores_BN.gather(1, labels_B[:, None])
        values = {
            "positive_mean_rank": 1 + (scores_BN > own_B1).sum(1).double().mean(),  # chance: (N + 1) / 2
            "latent_top1_accuracy": (scores_BN.argmax(1) == labels_B).double().mean(),
            "soft_token_entropy": views.soft_token_entropy.detach(),
        }
        if views.teacher_BD is not None:
            teacher_BN = views.teacher_BD @ passages_ND.T
            values["explicit_top1_accuracy"] = (teacher_BN.argmax(1) == labels_B).double().mean()
            values["top1_agreement"] = (teacher_BN.argmax(1) == scores_BN.argmax(1)).double().mean()
        if mask:
            copies_BN = (mask["query_ids"][:, :, None] == mask["passage_ids"]).any(1)
            values["false_negatives_masked"] = (copies_BN.sum() - len(labels_B)) / copies_BN.numel()
        return values
