"""The four terms of LaSER's objective in plain PyTorch: the specification that every faster path is compared with.

Rows are this rank's B queries, columns are the N passages of all ranks. Axes: B, N, K latent steps, D hidden size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Cosines that differ by less are equal: a copy of the positive is not above it because its sum was rounded otherwise.
TIE = 1e-5


class AlignmentTerms(NamedTuple):
    """Each a scalar: the mean over rows (and steps). Terms whose inputs are absent are 0."""

    infonce_latent: Tensor
    infonce_explicit: Tensor
    kl_output: Tensor
    kl_trajectory: Tensor


class Alignment(NamedTuple):
    """The terms, and what falls off on the way, per row and without gradient."""

    terms: AlignmentTerms
    rivals_above_B: Tensor  # (B,) - kept negatives that the latent view scores above the row's own positive
    explicit_rivals_above_B: Tensor | None  # (B,) - the same of the explicit view
    dropped_B: Tensor  # (B,) - columns dropped as false negatives


def alignment_loss_reference(*rows: Any, **options: Any) -> AlignmentTerms:
    """The four terms alone; see `alignment_reference` for arguments and options."""
    return alignment_reference(*rows, **options).terms


def alignment_reference(
    student_BD: Tensor,  # (B, D) - vectors of the latent view
    teacher_BD: Tensor | None,  # (B, D) - vectors of the explicit view; None leaves its two terms out
    student_steps_BKD: Tensor | None,  # (B, K, D) - latent states; None leaves the trajectory term out
    teacher_steps_BKD: Tensor | None,  # (B, K, D) - the segment state each step is aligned with
    passages_ND: Tensor,  # (N, D)
    labels_B: Tensor,  # (B,) int64 - column of each row's own positive
    *,
    temperature: float,
    distill_temperature: float,
    trajectory_temperature: float,
    query_ids: Tensor | None = None,  # (B,) or (B, X) int64 - ids of the passages that are positives of the row
    passage_ids: Tensor | None = None,  # (N,) int64
    margin: float | None = None,
) -> Alignment:
    """InfoNCE of both views, KL(explicit || latent) of their rankings, and the same per latent step (spec: objective).

    All rows have unit length. Statistics are float32 whatever the inputs' dtype (float64 for float64 inputs).
    No gradient reaches the teacher through a KL: its side is detached as a whole, passages included.

    False negatives are dropped for student and teacher alike: columns whose id is one of the row's `query_ids`, and,
    with `margin`, columns that the latent view scores above its positive's score + margin (not differentiated). The
    row's own positive always stays.
    """
    precise = torch.float64 if passages_ND.dtype == torch.float64 else torch.float32
    passages_ND = passages_ND.to(precise)
    student_scores_BN = student_BD.to(precise) @ passages_ND.T
    keep_BN = kept_columns(student_scores_BN.detach(), labels_B, query_ids, passage_ids, margin)
    zero = student_scores_BN.new_zeros(())
    infonce_latent = _infonce(student_scores_BN / temperature, labels_B, keep_BN)
    infonce_explicit = kl_output = kl_trajectory = zero
    explicit_above_B = None
    if teacher_BD is not None:
        teacher_scores_BN = teacher_BD.to(precise) @ passages_ND.T
        infonce_explicit = _infonce(teacher_scores_BN / temperature, labels_B, keep_BN)
        kl_output = _kl(teacher_scores_BN / distill_temperature, student_scores_BN / distill_temperature, keep_BN)
        explicit_above_B = _rivals_above(teacher_scores_BN, labels_B, keep_BN)
    if student_steps_BKD is not None and teacher_steps_BKD is not None and student_steps_BKD.shape[1]:
        student_BKN = student_steps_BKD.to(precise) @ passages_ND.T
        teacher_BKN = teacher_steps_BKD.detach().to(precise) @ passages_ND.detach().T
        keep_BKN = None if keep_BN is None else keep_BN[:, None]
        kl_trajectory = _kl(teacher_BKN / trajectory_temperature, student_BKN / trajectory_temperature, keep_BKN)
    return Alignment(
        AlignmentTerms(infonce_latent, infonce_explicit, kl_output, kl_trajectory),
        _rivals_above(student_scores_BN, labels_B, keep_BN),
        explicit_above_B,
        zero.detach().expand(len(labels_B)) if keep_BN is None else (~keep_BN).sum(1).to(precise),
    )


def kept_columns(
    scores_BN: Tensor, labels_B: Tensor, query_ids: Tensor | None, passage_ids: Tensor | None, margin: float | None
) -> Tensor | None:
    """(B, N) bool, False where a column is a false negative of the row; None when nothing can be dropped."""
    if query_ids is None and margin is None:
        return None
    keep_BN = torch.ones_like(scores_BN, dtype=torch.bool)
    if query_ids is not None and passage_ids is not None:
        positives_BX = query_ids if query_ids.dim() == 2 else query_ids[:, None]
        keep_BN &= positives_BX[:, :, None].ne(passage_ids).all(1)
    if margin is not None:
        keep_BN &= ~(scores_BN > scores_BN.gather(1, labels_B[:, None]) + margin + TIE)  # NaN stays, and shows
    return keep_BN.scatter(1, labels_B[:, None], True)


def _log_softmax(logits: Tensor, keep: Tensor | None) -> Tensor:
    return F.log_softmax(logits if keep is None else logits.masked_fill(~keep, -torch.inf), -1)


def _infonce(logits_BN: Tensor, labels_B: Tensor, keep_BN: Tensor | None) -> Tensor:
    return F.nll_loss(_log_softmax(logits_BN, keep_BN), labels_B)


def _kl(teacher_logits: Tensor, student_logits: Tensor, keep: Tensor | None) -> Tensor:
    """Mean over all leading axes of KL(softmax(teacher) || softmax(student)), the teacher detached."""
    teacher = _log_softmax(teacher_logits.detach(), keep)
    difference = teacher - _log_softmax(student_logits, keep)
    if keep is not None:  # a dropped column has weight 0, but -inf - -inf is not a number
        difference = difference.masked_fill(~keep, 0.0)
    return (teacher.exp() * difference).sum(-1).mean()


@torch.no_grad()
def _rivals_above(scores_BN: Tensor, labels_B: Tensor, keep_BN: Tensor | None) -> Tensor:
    """(B,) - how many kept negatives score above the row's own positive."""
    above_BN = scores_BN > scores_BN.gather(1, labels_B[:, None]) + TIE
    return (above_BN if keep_BN is None else above_BN & keep_BN).sum(1).to(scores_BN.dtype)
