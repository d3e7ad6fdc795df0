"""What every implementation works on: pairs of a student row and a teacher row, and what a sweep leaves of them.

Axes: B queries · K latent steps · P = B (1 + K) pairs, first the B outputs, then the B·K steps · R = P + B rows that
need a gradient (the teacher's outputs behind the students') · N passages · D hidden size · X ids per query.

Every term of the objective follows from sums over a row's *rivals*: the passages that are neither its own positive nor
dropped as false negatives. The positive is added in closed form, so that a loss near 0 keeps its digits. Sums of
disjoint parts - tiles, splits, ranks - merge by addition once they share a shift.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Rows of the statistics, of students (S) and teachers (T): shifts are scores, sums are of e^((score - shift) / tau).
SHIFT_S, SHIFT_T, SUM_S, SUM_T, CE_SUM_S, CE_SUM_T, CROSS, ABOVE_S, ABOVE_T, RIVALS = range(10)
STATISTICS = 10


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and statistics: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and returned in `precise`, whatever the inputs' dtype; autocast has no say in it."""
    out = precise(left.dtype)
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype != out:
            return torch.mm(left, right, out_dtype=out)
        return left.to(out) @ right.to(out)


@dataclass(frozen=True)
class Temperatures:
    """Of the contrastive terms, the output distillation and the trajectory distillation."""

    contrast: float
    distill: float
    trajectory: float

    @property
    def differ(self) -> bool:
        """Whether an output's contrast and divergence need sums of their own."""
        return self.contrast != self.distill

    def fixed_shift_floor(self, columns: int) -> float | None:
        """The lowest score that sums over `columns` unit rows may be shifted by; None: no fixed shift is safe.

        Scores are at most 1, so with a shift f the largest sum, that of e^b (b - a), is below N e^((1 - f)/tau) 2/tau,
        which has to stay below float32's e^88. A fixed shift is the row's positive or this floor, whichever is higher;
        the terms then span e^(-2/tau) .. e^88, which float32 holds while 1/tau is below 88, less the logarithms. The
        2 % allow for rows that rounding to bfloat16 made longer than 1.
        """
        lowest = min(self.contrast, self.distill, self.trajectory)
        room = 88 - math.log(max(columns, 1)) - math.log(max(2 / lowest, 1))
        return 1.02 - room * lowest if 1.02 / lowest < room else None


@dataclass(frozen=True)
class Pairs:
    """All rows that passages are compared with."""

    rows_RD: Tensor  # (R, D) - students, their steps, and the teacher if there is one: what gets a gradient
    partners_PD: Tensor | None  # (P, D) - the teacher's row of each pair; None: there is no pair, only students
    own_2P: Tensor  # (2, P) - score of the query's own positive, by student and teacher (as precise as scores are)
    queries: int  # B
    steps: int  # K, 0 without a trajectory
    columns: int  # N, of all ranks
    temperatures: Temperatures
    margin: float | None  # a column that the student scores above its positive + margin is a false negative

    @property
    def count(self) -> int:
        """P."""
        return self.queries * (1 + self.steps)

    @property
    def has_teacher(self) -> bool:
        return len(self.rows_RD) > self.count

    @cached_property
    def temperatures_2P(self) -> Tensor:
        """(2, P) - of the divergence and of the contrast; step pairs have no contrast, and repeat the divergence."""
        t = self.temperatures
        return torch.stack([self.per_pair(t.distill, t.trajectory), self.per_pair(t.contrast, t.trajectory)])

    @cached_property
    def scales_2P(self) -> Tensor:
        """(2, P) - exponents of 2 per unit of score: what the temperatures are to a GPU."""
        return math.log2(math.e) / self.temperatures_2P

    def per_pair(self, output: float | Tensor, step: float | Tensor) -> Tensor:
        """(P,) - one value for the B output pairs and another for the B·K step pairs."""
        # A number becomes a tensor on the device, not on the host: a copy would make the host wait for the GPU.
        values = [v if isinstance(v, Tensor) else self.own_2P.new_full((), v) for v in (output, step)]
        return torch.cat([values[0].expand(self.queries), values[1].expand(self.queries * self.steps)])

    def query_of_pair(self) -> Tensor:
        """(P,) int64 - the query that each pair belongs to."""
        own = torch.arange(self.queries, device=self.rows_RD.device)
        return torch.cat([own, own.repeat_interleave(self.steps)])

    def query_of_row(self) -> Tensor:
        """(R,) int64 - the query that each row belongs to."""
        of_pairs_P = self.query_of_pair()
        return torch.cat([of_pairs_P, of_pairs_P[: self.queries]]) if self.has_teacher else of_pairs_P

    def fixed_shifts_2P(self) -> Tensor | None:
        """(2, P) scores, of student and teacher; None: sums need the running maximum."""
        floor = self.temperatures.fixed_shift_floor(self.columns)
        return None if floor is None else self.own_2P.clamp(min=floor)


@dataclass(frozen=True)
class Columns:
    """The passages of one rank."""

    passages_ND: Tensor
    labels_B: Tensor  # (B,) int64 - each row's own positive among them, -1 where it is elsewhere
    ids_N: Tensor | None  # (N,) int64
    query_ids_BX: Tensor | None  # (B, X) int64 - a column with one of the row's ids is a false negative, or its own

    @cached_property
    def labels_int32_B(self) -> Tensor:
        """As kernels compare them."""
        return self.labels_B.int().contiguous()

    @cached_property
    def keys(self) -> tuple[Tensor, Tensor] | None:
        """(B, X) and (N,) int32 that are equal where the ids are: half the registers that int64 would take."""
        if self.ids_N is None or self.query_ids_BX is None:
            return None
        sorted_N = self.ids_N.sort().values
        of_columns_N = torch.searchsorted(sorted_N, self.ids_N, out_int32=True)
        of_queries_BX = torch.searchsorted(sorted_N, self.query_ids_BX, out_int32=True)
        found_BX = sorted_N[of_queries_BX.clamp(max=len(sorted_N) - 1)] == self.query_ids_BX
        return of_queries_BX.where(found_BX, -1).contiguous(), of_columns_N


@dataclass(frozen=True)
class ScoreGradients:
    """d loss / d score, as `score_gradients` writes it, in units that suit the workspace's dtype.

    Of a rival, by a student: c0 q_S + c1 p_S - c2 p_T; by a teacher's output: c3 q_T; of the own positive: `own_2P`; of
    a dropped column: 0. p = e^((score - level) / tau) under the divergence's temperature, q under the contrast's.
    """

    levels_4P: Tensor  # of p_S, p_T, q_S, q_T
    coefficients_4P: Tensor
    own_2P: Tensor  # of student and teacher
    unit: Tensor  # scalar


def score_gradients_of(to_terms: Sequence[Tensor], statistics_SP: Tensor, pairs: Pairs) -> ScoreGradients:
    """What the backward sweep needs, from the gradients g of the four terms.

    c0 = g0 / (B tau), c3 = g1 / (B tau); c1 and c2 are g2 / (B tau_kd) for outputs and g3 / (B K tau_mid) for steps,
    all times what rounding the level to float32 cost: probabilities have to sum to 1, because where passages share a
    direction the gradient is what remains when that cancels.

    The positive's is c0 (q_S - 1) + c1 p_S - c2 p_T, written with the rivals' share sigmoid(z) = 1 - p, which is exact
    where p is nearly 1. In units of the largest times 2^-12, so that float16 holds the probabilities of 10^6 passages.
    """
    t, b, dtype = pairs.temperatures, pairs.queries, pairs.own_2P.dtype
    divisors = (b * t.contrast, b * t.contrast, b * t.distill, b * max(pairs.steps, 1) * t.trajectory)
    infonce_s, infonce_t, output, trajectory = (
        to_term.double() / divisor for to_term, divisor in zip(to_terms, divisors, strict=True)
    )
    output = output if pairs.has_teacher else torch.zeros_like(output)
    c0_P, c1_P, c3_P = (
        pairs.per_pair(*values).double() for values in ((infonce_s, 0.0), (output, trajectory), (infonce_t, 0.0))
    )
    z_4P = rivals_logits(statistics_SP, pairs)
    share_s, share_t, ce_share_s, ce_share_t = z_4P.sigmoid()
    own_2P = torch.stack([c1_P * (share_t - share_s) - c0_P * ce_share_s, -c3_P * ce_share_t])
    temperatures_4P = pairs.temperatures_2P.double().repeat_interleave(2, 0)
    exact_4P = pairs.own_2P.double().repeat(2, 1) + temperatures_4P * _log1p_exp(z_4P)
    levels_4P = exact_4P.to(dtype)
    lost_s, lost_t, ce_lost_s, ce_lost_t = ((levels_4P.double() - exact_4P) / temperatures_4P).exp()
    coefficients_4P = torch.stack([c0_P * ce_lost_s, c1_P * lost_s, c1_P * lost_t, c3_P * ce_lost_t])
    unit = coefficients_4P.abs().amax() / 4096
    unit = torch.where(unit > 0, unit, 1.0)
    return ScoreGradients(levels_4P, (coefficients_4P / unit).to(dtype), (own_2P / unit).to(dtype), unit.to(dtype))


def merge(parts_XSP: Tensor, pairs: Pairs) -> Tensor:
    """(X, STATISTICS, P) of X disjoint sets of passages -> that of their union; with equal shifts a plain sum."""
    divergence_P, contrast_P = pairs.temperatures_2P
    merged_SP = parts_XSP.sum(0)  # of counts
    merged_SP[: SHIFT_T + 1] = parts_XSP[:, : SHIFT_T + 1].amax(0)
    for shift, temperature_P, sums in (
        (SHIFT_S, divergence_P, [SUM_S]),
        (SHIFT_T, divergence_P, [SUM_T, CROSS]),
        (SHIFT_S, contrast_P, [CE_SUM_S]),
        (SHIFT_T, contrast_P, [CE_SUM_T]),
    ):
        weights_XP = ((parts_XSP[:, shift] - merged_SP[shift]) / temperature_P).exp()
        for which in sums:
            merged_SP[which] = (parts_XSP[:, which] * weights_XP).sum(0)
    return merged_SP


def rivals_logits(statistics_SP: Tensor, pairs: Pairs) -> Tensor:
    """(4, P) float64 z: all rivals together weigh e^z as much as the positive, -inf where there are none.

    Of student and teacher, in the divergence and then in the contrast. InfoNCE is log(1 + e^z), the positive's
    probability sigmoid(-z), and that of a passage scored s e^((s - level) / tau) with level = own + tau log(1 + e^z).
    """
    values = statistics_SP.double()
    temperatures_4P = pairs.temperatures_2P.double().repeat_interleave(2, 0)
    above_own_2P = values[SHIFT_S : SHIFT_T + 1] - pairs.own_2P.double()
    return values[SUM_S : CE_SUM_T + 1].log() + above_own_2P.repeat(2, 1) / temperatures_4P


def terms_of(statistics_SP: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """InfoNCE = log(1 + e^z); KL = E_T[b - a] - log Z_T + log Z_S, with the positive's share in closed form.

    (b - a), not b, because E_T[b] and log Z_T are far larger than their difference.
    """
    b = pairs.queries
    z_4P = rivals_logits(statistics_SP, pairs)
    log_s_P, log_t_P, infonce_s_P, infonce_t_P = _log1p_exp(z_4P)  # log of Z over the positive's exponential
    values, tau_P = statistics_SP.double(), pairs.temperatures_2P[0].double()
    own_s_P, own_t_P = pairs.own_2P.double()
    ahead_P = (own_t_P - own_s_P) / tau_P
    shift_P = (values[SHIFT_T] - own_t_P) / tau_P
    cross_P = values[CROSS] * (shift_P - log_t_P).exp()
    divergence_P = cross_P + ahead_P * (-log_t_P).exp() - (ahead_P + log_t_P) + log_s_P
    zero = divergence_P.new_zeros(())
    means = (
        infonce_s_P[:b].mean(),
        infonce_t_P[:b].mean() if pairs.has_teacher else zero,
        divergence_P[:b].mean() if pairs.has_teacher else zero,
        divergence_P[b:].mean() if pairs.steps else zero,
    )
    infonce_s, infonce_t, output, trajectory = (mean.to(pairs.own_2P.dtype) for mean in means)
    return infonce_s, infonce_t, output, trajectory


def _log1p_exp(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))
