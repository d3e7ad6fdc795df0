"""The objective: LaSER's four terms with their weights, over passages gathered from all ranks (see spec).

Two more compare every latent step and make GIRCSE of it (Tsai et al., ICLR 2026, arXiv 2509.24291). With L_k the
InfoNCE of the vectors after k steps, of queries and passages alike, GIRCSE minimises mean_k L_k + mean_k relu(log L_k -
log L_k-1). Here that is K times as large, because L_K, which is InfoNCE_L, always has weight 1.
"""

import functools
from collections.abc import Callable
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
from laser_dist.model.teacher import FrozenTeacher, beside

TERMS = ("infonce_latent", "infonce_explicit", "kl_output", "kl_trajectory")
STEP_TERMS = ("infonce_steps", "refinement")
"""There where the objective compares steps, each times K: see above."""


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

    def __init__(self, config: ObjectiveConfig, trajectory_temperature: float, teacher: FrozenTeacher | None = None):
        """`teacher`: reads the rationales instead of the model that is trained."""
        self.config = config
        self.teacher = teacher
        self.trajectory_temperature = trajectory_temperature

    def weights(self, step: int) -> dict[str, float]:
        """Weight of each term at an optimizer step (from 0); the distillation terms ramp in over `ramp_steps`."""
        config = self.config
        ramp = min(1.0, step / config.ramp_steps) if config.ramp_steps else 1.0
        weights = (1.0, config.explicit_weight, ramp * config.output_weight, ramp * config.trajectory_weight)
        steps = (config.steps_weight, config.refinement_weight) if config.compares_steps else ()
        return dict(zip((*TERMS, *STEP_TERMS), (*weights, *steps), strict=False))

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
        compare = self._comparison(views, batch)
        seen = views if self.teacher is None else beside(views, self.teacher(batch))
        with_teacher = seen.teacher_BD is not None and (config.explicit_weight > 0 or config.output_weight > 0)
        with_steps = seen.segments_BKD is not None and config.trajectory_weight > 0
        alignment = compare(
            seen.query_BD,
            seen.passage_PD,
            teacher_BD=seen.teacher_BD if with_teacher else None,
            steps_BKD=unit(seen.query_steps_BKD) if with_steps else None,
            segments_BKD=unit(seen.segments_BKD.detach()) if with_steps and seen.segments_BKD is not None else None,
        )
        terms = dict(zip(TERMS, alignment.terms, strict=True))
        if config.compares_steps:
            terms |= self._step_terms(views, compare, terms["infonce_latent"])
        # A term of weight 0 stays out of the graph: it is reported where it comes for free, and costs no backward.
        total = torch.stack([weights[name] * value for name, value in terms.items() if weights[name] > 0]).sum()
        columns = len(views.passage_PD) * world_size()
        return LossTerms(terms, total, self._diagnostics(views, alignment, columns))

    def _comparison(self, views: Views, batch: PackedBatch) -> Callable[..., Alignment]:
        """A function of rows and this rank's passages, whose labels and false negatives are the batch's."""
        config, ring = self.config, self.config.passages == "ring" and world_size() > 1
        assert batch.labels_B is not None, "a batch without queries has nothing to compare"
        mask: dict[str, Any] = {}
        if config.mask_false_negatives and batch.passage_keys_P is not None:
            keys_N = batch.passage_keys_P if ring else gather_rows(batch.passage_keys_P)
            mask = {"query_ids": batch.positive_keys_BX, "passage_ids": keys_N}
        return functools.partial(
            _compare,
            dtype=self._score_dtype(views),
            labels_B=batch.labels_B if ring else batch.labels_B + rank() * len(views.passage_PD),
            group=dist.group.WORLD if ring else None,
            temperature=config.temperature,
            distill_temperature=config.distill_temperature,
            trajectory_temperature=self.trajectory_temperature,
            margin=config.false_negative_margin,
            kernel=config.kernel,
            **mask,
        )

    def _step_terms(self, views: Views, compare: Callable[..., Alignment], infonce_latent: Tensor) -> dict[str, Tensor]:
        """InfoNCE of the vectors after 1 .. K - 1 steps, summed, and the penalty for each that is worse than the last.

        The penalty is not linear in a rank's mean, so it takes the mean over ranks; its gradient goes into each rank's
        own part, and data parallelism averages those: the global batch's again.
        """
        assert views.passage_steps_PKD is not None, "the retriever was not asked for passages' steps"
        steps = views.query_steps_BKD.shape[1]
        earlier = [
            compare(
                unit(views.query_steps_BKD[:, :k].mean(1)), unit(views.passage_steps_PKD[:, :k].mean(1))
            ).terms.infonce_latent
            for k in range(1, steps)
        ]
        own_K = torch.stack([*earlier, infonce_latent])
        mean_K = gather_rows(own_K.detach()[None]).mean(0)
        log_K = torch.log(own_K + (mean_K - own_K.detach()) + 1e-8)  # 1e-8: as published
        rises = torch.relu(log_K[1:] - log_K[:-1])
        return dict(zip(STEP_TERMS, (torch.stack(earlier).sum(), steps * rises.mean()), strict=True))

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


def _compare(
    query_BD: Tensor,
    passage_PD: Tensor,
    *,
    dtype: torch.dtype,
    labels_B: Tensor,
    group: dist.ProcessGroup | None,
    teacher_BD: Tensor | None = None,
    steps_BKD: Tensor | None = None,
    segments_BKD: Tensor | None = None,
    **options: Any,
) -> Alignment:
    """`align` with the passages of all ranks, gathered or, with a `group`, in a ring."""
    teacher_BD, steps_BKD, segments_BKD = (
        None if x is None else x.to(dtype) for x in (teacher_BD, steps_BKD, segments_BKD)
    )
    passages_ND = gather_rows_with_gradient(passage_PD, dtype) if group is None else passage_PD.to(dtype)
    rows = (query_BD.to(dtype), teacher_BD, steps_BKD, segments_BKD)
    return align(*rows, passages_ND, labels_B, group=group, **options)
