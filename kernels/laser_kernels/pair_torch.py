"""The two sweeps over the passages in plain PyTorch, a chunk of columns at a time: for CPUs, float64, and any GPU.

Memory is a few [P, chunk] matrices, whatever N. The Triton kernels in pair_triton.py compute the same.
"""

import torch
from torch import Tensor

from laser_kernels.pairs import Columns, Pairs, ScoreGradients, merge, product
from laser_kernels.reference import TIE

# 2^21 scores are 8 MiB in float32: a chunk's handful of matrices stays near the caches, and a GEMM is still large.
CHUNK_SCORES = 2**21
# As much for d loss / d score in backward: 32 MiB took 1.9 times as long on one core (B 1000, N 100,000, D 64).
WORKSPACE_BYTES = 4 * CHUNK_SCORES
# Below this a GEMM is mostly overhead; memory is then P * 256 scores, as much as rows of D = 256 take themselves.
SHORTEST_CHUNK = 256


def chunk_columns(rows: int) -> int:
    """Columns per chunk, so that a [rows, columns] matrix has about CHUNK_SCORES entries."""
    return max(SHORTEST_CHUNK, CHUNK_SCORES // max(rows, 1))


def statistics(pairs: Pairs, columns: Columns) -> Tensor:
    """(STATISTICS, P): the sums over all columns, merged chunk by chunk."""
    width = chunk_columns(pairs.count)
    total_SP = _chunk_statistics(pairs, columns, 0, width)
    for first in range(width, len(columns.passages_ND), width):
        total_SP = merge(torch.stack([total_SP, _chunk_statistics(pairs, columns, first, first + width)]), pairs)
    return total_SP


def score_gradients(
    pairs: Pairs, columns: Columns, first: int, last: int, gradients: ScoreGradients, out_RC: Tensor
) -> None:
    """Fill out_RC with d loss / d score of the columns first .. last - 1; see `ScoreGradients` for the formula."""
    student_PC, teacher_PC, rival_PC = _scores(pairs, columns, first, last)
    is_own_PC = _own(columns, first, last)[pairs.query_of_pair()]
    level_s, level_t, ce_level_s, ce_level_t = (level[:, None] for level in gradients.levels_4P)
    c0, c1, c2, c3 = (c[:, None] for c in gradients.coefficients_4P)
    own_student, own_teacher = (g[:, None] for g in gradients.own_2P)
    tau_P1, ce_tau_P1 = (tau[:, None] for tau in pairs.temperatures_2P)

    gradient_PC = c0 * ((student_PC - ce_level_s) / ce_tau_P1).exp()
    if teacher_PC is not None:
        gradient_PC += c1 * ((student_PC - level_s) / tau_P1).exp()
        gradient_PC -= c2 * ((teacher_PC - level_t) / tau_P1).exp()
    out_RC[: pairs.count] = gradient_PC.masked_fill(~rival_PC, 0.0).where(~is_own_PC, own_student)
    if pairs.has_teacher:
        assert teacher_PC is not None
        b = slice(pairs.queries)
        gradient_BC = c3[b] * ((teacher_PC[b] - ce_level_t[b]) / ce_tau_P1[b]).exp()
        out_RC[pairs.count :] = gradient_BC.masked_fill(~rival_PC[b], 0.0).where(~is_own_PC[b], own_teacher[b])


def _chunk_statistics(pairs: Pairs, columns: Columns, first: int, last: int) -> Tensor:
    student_PC, teacher_PC, rival_PC = _scores(pairs, columns, first, last)
    b = slice(pairs.queries)
    tau_P1, ce_tau_P1 = (tau[:, None] for tau in pairs.temperatures_2P)

    def side(scores_PC: Tensor, own_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Shift, e^logit, its sum, that under the contrast's temperature, and the rivals above the positive."""
        scores_PC = scores_PC.masked_fill(~rival_PC, -torch.inf)
        # A chunk without rivals is shifted to where it counts for nothing beside any other.
        shift_P = scores_PC.amax(1).clamp(min=-1e28)
        below_PC = scores_PC - shift_P[:, None]
        e_PC = (below_PC / tau_P1).exp()
        ce_sum_P = (below_PC / ce_tau_P1).exp().sum(1) if pairs.temperatures.differ else e_PC.sum(1)
        return shift_P, e_PC, e_PC.sum(1), ce_sum_P, output(scores_PC[b] > own_P[b, None] + TIE)

    def output(flags_BC: Tensor) -> Tensor:
        return torch.cat([flags_BC.sum(1).to(tau_P1.dtype), tau_P1.new_zeros(pairs.count - pairs.queries)])

    shift_s, _, sum_s, ce_sum_s, above_s = side(student_PC, pairs.own_2P[0])
    shift_t = sum_t = cross = ce_sum_t = above_t = torch.zeros_like(shift_s)
    if teacher_PC is not None:
        shift_t, e_PC, sum_t, ce_sum_t, above_t = side(teacher_PC, pairs.own_2P[1])
        cross = (e_PC * ((teacher_PC - student_PC) / tau_P1)).sum(1)
    rivals = output(rival_PC[b])
    return torch.stack([shift_s, shift_t, sum_s, sum_t, ce_sum_s, ce_sum_t, cross, above_s, above_t, rivals])


def _scores(pairs: Pairs, columns: Columns, first: int, last: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(P, C) scores of students and teachers with some columns, and which of them are rivals."""
    passages_CD = columns.passages_ND[first:last]
    student_PC = product(pairs.rows_RD[: pairs.count], passages_CD.T)
    teacher_PC = None if pairs.partners_PD is None else product(pairs.partners_PD, passages_CD.T)
    b = pairs.queries
    rival_BC = ~_own(columns, first, last)
    if columns.query_ids_BX is not None and columns.ids_N is not None:
        for ids_B in columns.query_ids_BX.unbind(1):
            rival_BC &= ids_B[:, None] != columns.ids_N[first:last]
    if pairs.margin is not None:
        rival_BC &= ~(student_PC[:b] > pairs.own_2P[0, :b, None] + pairs.margin + TIE)  # NaN stays, and shows
    return student_PC, teacher_PC, rival_BC[pairs.query_of_pair()]


def _own(columns: Columns, first: int, last: int) -> Tensor:
    """(B, C) - whether a column is the row's own positive."""
    last = min(last, len(columns.passages_ND))
    return columns.labels_B[:, None] == torch.arange(first, last, device=columns.labels_B.device)
