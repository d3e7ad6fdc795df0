"""The objective: LaSER's four terms with their weights, over passages gathered from all ranks (see spec).

Two more compare every latent step and make GIRCSE of it (Tsai et al., ICLR 2026, arXiv 2509.24291). With L_k the
InfoNCE of the vectors after k steps, of queries and passages alike, GIRCSE minimises mean_k L_k + mean_k relu(log L_k -
log L_k-1). Here that is K times as large, because L_K, which is InfoNCE_L, always has weight 1.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from laser_kernels import Alignment, align, choose
from torch import Tensor

from laser_dist.batch import PackedBatch, Views
from laser_dist.config import ObjectiveConfig
from laser_dist.distributed.collectives import Ranks
from laser_dist.errors import UserError
from laser_dist.model.retriever import unit
from laser_dist.model.teacher import FrozenTeacher, beside
from laser_dist.objective.evidence import COLUMNS, checksums, mixed, without_negatives, wrong_labels
from laser_dist.objective.terms import STEP_TERMS, TERMS


@dataclass(frozen=True)
class LossTerms:
    """This rank's terms, their weighted total, and what one wants to know beside them (all scalars)."""

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

    def __init__(
        self,
        config: ObjectiveConfig,
        trajectory_temperature: float,
        teacher: FrozenTeacher | None = None,
        *,
        evidence: bool = False,
        ranks: Ranks | None = None,
    ):
        """`teacher`: reads the rationales instead of the model that is trained. `ranks`: those of the process group.

        `evidence`: also collect what the guard wants to see.
        """
        self.config = config
        self.teacher = teacher
        self.trajectory_temperature = trajectory_temperature
        self.evidence = evidence
        self.ranks = ranks or Ranks()

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
        seen = views if self.teacher is None else beside(views, self.teacher(batch))
        with_teacher = seen.teacher_BD is not None and (config.explicit_weight > 0 or config.output_weight > 0)
        with_steps = seen.segments_BKD is not None and config.trajectory_weight > 0
        keys_N, passages_ND = self._keys(batch), self._gathered(seen.passage_PD, views)
        compare = self._comparison(views, batch, keys_N)
        alignment = compare(
            seen.query_BD,
            passages_ND,
            teacher_BD=seen.teacher_BD if with_teacher else None,
            steps_BKD=unit(seen.query_steps_BKD) if with_steps else None,
            segments_BKD=unit(seen.segments_BKD.detach()) if with_steps and seen.segments_BKD is not None else None,
        )
        terms = dict(zip(TERMS, alignment.terms, strict=True))
        if config.compares_steps:
            terms |= self._step_terms(views, compare, terms["infonce_latent"])
        # A term of weight 0 stays out of the graph: it is reported where it comes for free, and costs no backward.
        total = torch.stack([weights[name] * value for name, value in terms.items() if weights[name] > 0]).sum()
        columns = len(views.passage_PD) * self.ranks.count
        loss = LossTerms(terms, total, self._diagnostics(views, alignment, columns))
        return replace(loss, **self._evidence(views, batch, keys_N, alignment, passages_ND)) if self.evidence else loss

    @property
    def _ring(self) -> bool:
        return self.config.passages == "ring" and self.ranks.count > 1

    def _gathered(self, passage_PD: Tensor, views: Views) -> Tensor:
        """All ranks' passages; a ring's are the rank's own, and the others' pass by."""
        dtype = self._score_dtype(views)
        return passage_PD.to(dtype) if self._ring else self.ranks.gather_rows_with_gradient(passage_PD, dtype)

    def _keys(self, batch: PackedBatch) -> Tensor | None:
        """What the passages above say, where copies of a positive are to be dropped."""
        if not self.config.mask_false_negatives or batch.passage_keys_P is None:
            return None
        return batch.passage_keys_P if self._ring else self.ranks.gather_rows(batch.passage_keys_P)

    def _labels(self, views: Views, batch: PackedBatch) -> Tensor:
        assert batch.labels_B is not None, "a batch without queries has nothing to compare"
        return batch.labels_B if self._ring else batch.labels_B + self.ranks.own * len(views.passage_PD)

    def _comparison(self, views: Views, batch: PackedBatch, keys_N: Tensor | None) -> Callable[..., Alignment]:
        """A function of rows and passages, whose labels and false negatives are the batch's."""
        config = self.config
        mask: dict[str, Any] = {} if keys_N is None else {"query_ids": batch.positive_keys_BX, "passage_ids": keys_N}
        return functools.partial(
            _compare,
            labels_B=self._labels(views, batch),
            group=dist.group.WORLD if self._ring else None,
            temperature=config.temperature,
            distill_temperature=config.distill_temperature,
            trajectory_temperature=self.trajectory_temperature,
            margin=config.false_negative_margin,
            kernel=config.kernel,
            **mask,
        )

    def _evidence(
        self, views: Views, batch: PackedBatch, keys_N: Tensor | None, alignment: Alignment, passages_ND: Tensor
    ) -> dict[str, Any]:
        labels_B = batch.labels_B if keys_N is None else self._labels(views, batch)  # there is only what was gathered
        assert labels_B is not None
        received_W = checksums(passages_ND, 1 if self._ring else self.ranks.count)
        found = {
            "wrong_labels": wrong_labels(batch, labels_B, batch.passage_keys_P if keys_N is None else keys_N),
            "without_negatives": without_negatives(alignment.dropped_B, len(views.passage_PD) * self.ranks.count),
            "sent": checksums(views.passage_PD[:, :COLUMNS].to(passages_ND.dtype), 1)[0],
            "received": mixed(received_W),
        }
        return {"evidence": found, "received_W": None if self._ring else received_W}

    def _step_terms(self, views: Views, compare: Callable[..., Alignment], infonce_latent: Tensor) -> dict[str, Tensor]:
        """InfoNCE of the vectors after 1 .. K - 1 steps, summed, and the penalty for each that is worse than the last.

        The penalty is not linear in a rank's mean, so it takes the mean over ranks; its gradient goes into each rank's
        own part, and data parallelism averages those: the global batch's again.
        """
        assert views.passage_steps_PKD is not None, "the retriever was not asked for passages' steps"
        steps = views.query_steps_BKD.shape[1]
        earlier = [
            compare(
                unit(views.query_steps_BKD[:, :k].mean(1)),
                self._gathered(unit(views.passage_steps_PKD[:, :k].mean(1)), views),
            ).terms.infonce_latent
            for k in range(1, steps)
        ]
        own_K = torch.stack([*earlier, infonce_latent])
        mean_K = self.ranks.gather_rows(own_K.detach()[None]).mean(0)
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
    passages_ND: Tensor,
    *,
    labels_B: Tensor,
    teacher_BD: Tensor | None = None,
    steps_BKD: Tensor | None = None,
    segments_BKD: Tensor | None = None,
    **options: Any,
) -> Alignment:
    """`align` in the passages' dtype."""
    dtype = passages_ND.dtype
    teacher_BD, steps_BKD, segments_BKD = (
        None if x is None else x.to(dtype) for x in (teacher_BD, steps_BKD, segments_BKD)
    )
    return align(query_BD.to(dtype), teacher_BD, steps_BKD, segments_BKD, passages_ND, labels_B, **options)
