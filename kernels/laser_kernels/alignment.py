"""The objective as one autograd function over two sweeps through the passages, never holding a [B, N] matrix.

1. Forward sweeps the passages once for a few sums per pair of rows (pairs.py); the terms follow in closed form.
2. Backward sweeps them again, in chunks of columns: d loss / d score of a chunk is written to a bounded workspace, and
   two library matrix products per chunk turn it into gradients of rows and of passages.
3. With a process group, each rank holds its own passages only, and both sweeps take W hops of a ring.

Invariant: value and every gradient equal `alignment_loss_reference` on all passages, whatever the chunk, split or hop.
"""

import functools
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from laser_kernels.dispatch import implementation
from laser_kernels.pairs import (
    ABOVE_S,
    RIVALS,
    Columns,
    Pairs,
    ScoreGradients,
    Temperatures,
    merge,
    precise,
    product,
    score_gradients_of,
    terms_of,
)
from laser_kernels.reference import Alignment, AlignmentTerms, alignment_reference
from laser_kernels.ring import Ring

# Rows of the workspace are multiples of this: kernels store aligned, and products have a useful inner dimension.
CHUNK_MULTIPLE = 128
# The products are float32, and for the passages as long as the chunk.
PRODUCT_BYTES = 256 * 2**20
# With few rows the workspace would hold millions of columns; past this many nothing is gained.
LONGEST_CHUNK = 2**16


def alignment_loss(*rows: Any, **options: Any) -> AlignmentTerms:
    """The four terms alone; see `align` for arguments and options."""
    return align(*rows, **options).terms


def align(
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
    group: dist.ProcessGroup | None = None,
    kernel: str = "auto",
) -> Alignment:
    """What `alignment_reference` computes, with memory that does not grow with B·N.

    All rows have unit length. Inputs of several dtypes are brought to their common one; statistics are float32
    (float64 for float64). Only the gradients that exist come out: none for `teacher_steps_BKD`.

    `group`: the passages (and their ids) are this rank's own, equally many on every rank, and `labels_B` indexes them;
    those of the other ranks pass by in a ring. Values and gradients are as if all had been gathered. All ranks must
    call it, and need a gradient of the passages, alike.
    `kernel`: auto, triton, chunked or reference (see dispatch.py). ValueError: that one cannot run here.
    """
    inputs = (student_BD, teacher_BD, student_steps_BKD, teacher_steps_BKD, passages_ND)
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in inputs if x is not None])
    chosen = implementation(kernel, passages_ND.device, dtype)
    if chosen is None:
        if group is not None:
            raise ValueError("the reference has no ring: choose kernel auto, triton or chunked, or gather the passages")
        return alignment_reference(
            *inputs,
            labels_B,
            temperature=temperature,
            distill_temperature=distill_temperature,
            trajectory_temperature=trajectory_temperature,
            query_ids=query_ids,
            passage_ids=passage_ids,
            margin=margin,
        )
    _check(inputs, labels_B, query_ids, passage_ids)
    if student_steps_BKD is None or teacher_steps_BKD is None or student_steps_BKD.shape[1] == 0:
        inputs = (*inputs[:2], None, None, passages_ND)
    if query_ids is None or passage_ids is None:
        query_ids = passage_ids = None
    *terms, above_s_B, above_t_B, dropped_B = _Alignment.apply(
        *(None if x is None else x.to(dtype) for x in inputs),
        labels_B,
        passage_ids,
        None if query_ids is None else query_ids.reshape(len(query_ids), -1),
        margin,
        Temperatures(temperature, distill_temperature, trajectory_temperature),
        Ring(group),
        chosen,
    )
    return Alignment(AlignmentTerms(*terms), above_s_B, None if teacher_BD is None else above_t_B, dropped_B)


class _Alignment(torch.autograd.Function):
    """Four terms, then per row what is counted beside them (see `Alignment`)."""

    @staticmethod
    def forward(
        ctx: Any,
        student_BD: Tensor,
        teacher_BD: Tensor | None,
        steps_BKD: Tensor | None,
        teacher_steps_BKD: Tensor | None,
        passages_ND: Tensor,
        labels_B: Tensor,
        ids_N: Tensor | None,
        query_ids_BX: Tensor | None,
        margin: float | None,
        temperatures: Temperatures,
        ring: Ring,
        kernels: ModuleType,
    ) -> tuple[Tensor, ...]:
        passages_ND = passages_ND.detach()
        passages_ND = passages_ND if passages_ND.stride(-1) == 1 else passages_ND.contiguous()
        columns = Columns(passages_ND, labels_B, ids_N, query_ids_BX)
        tensors = _pair_up(columns, student_BD, teacher_BD, steps_BKD, teacher_steps_BKD)
        constants: dict[str, Any] = {
            "queries": len(student_BD),
            "steps": 0 if steps_BKD is None else steps_BKD.shape[1],
            "columns": ring.size * len(passages_ND),
            "temperatures": temperatures,
            "margin": margin,
        }
        pairs = Pairs(*tensors, **constants)
        parts = [kernels.statistics(pairs, held) for held in ring.columns(columns)]
        statistics_SP = parts[0] if len(parts) == 1 else merge(torch.stack(parts), pairs)
        ctx.save_for_backward(statistics_SP, *tensors, passages_ND, labels_B, ids_N, query_ids_BX)
        ctx.constants, ctx.ring, ctx.kernels, ctx.dtype = constants, ring, kernels, student_BD.dtype
        above_s_B, above_t_B, rivals_B = statistics_SP[ABOVE_S : RIVALS + 1, : pairs.queries]
        dropped_B = pairs.columns - 1 - rivals_B
        ctx.mark_non_differentiable(above_s_B, above_t_B, dropped_B)
        return *terms_of(statistics_SP, pairs), above_s_B, above_t_B, dropped_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *to_outputs: Tensor) -> tuple[Tensor | None, ...]:
        statistics_SP, *saved = ctx.saved_tensors
        pairs, columns = Pairs(*saved[:3], **ctx.constants), Columns(*saved[3:])
        gradients = score_gradients_of(to_outputs[:4], statistics_SP, pairs)
        to_rows_RD = torch.zeros_like(pairs.rows_RD, dtype=precise(ctx.dtype))
        excess_R1 = to_rows_RD.new_zeros(len(to_rows_RD), 1)

        def sweep(held: Columns, to_passages_ND: Tensor | None) -> None:
            _sweep_backward(ctx.kernels, pairs, held, gradients, to_rows_RD, excess_R1, to_passages_ND)

        to_passages_ND = ctx.ring.sweep_with_gradient(columns, sweep, wanted=ctx.needs_input_grad[4])
        # Gradients of a row's scores sum to 0; what rounding to 16 bits left over is taken from its positive's.
        own_BD = columns.passages_ND[columns.labels_B].to(to_rows_RD.dtype)
        to_rows_RD -= excess_R1 * own_BD[pairs.query_of_row()]
        to_rows = (to_rows_RD * gradients.unit).to(ctx.dtype)
        to_student, to_steps, to_teacher = to_rows.tensor_split([pairs.queries, pairs.count])
        return (
            to_student,
            to_teacher if pairs.has_teacher else None,
            to_steps.view(pairs.queries, pairs.steps, -1) if pairs.steps else None,
            None,
            to_passages_ND,
            *[None] * 7,
        )


def _pair_up(
    columns: Columns,
    student_BD: Tensor,
    teacher_BD: Tensor | None,
    steps_BKD: Tensor | None,
    teacher_steps_BKD: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The tensors of `Pairs`; without a teacher, outputs that have step pairs beside them are their own partners."""
    own_BD = columns.passages_ND[columns.labels_B].to(precise(columns.passages_ND.dtype))
    students, partners, own = [student_BD], [student_BD if teacher_BD is None else teacher_BD], [own_BD]
    if steps_BKD is not None and teacher_steps_BKD is not None:
        students.append(steps_BKD.flatten(0, 1))
        partners.append(teacher_steps_BKD.flatten(0, 1))
        own.append(own_BD.repeat_interleave(steps_BKD.shape[1], 0))
    own_scores = [torch.cat([(x * y).sum(-1) for x, y in zip(side, own, strict=True)]) for side in (students, partners)]
    return (
        torch.cat(students if teacher_BD is None else [*students, teacher_BD]),
        None if teacher_BD is None and len(partners) == 1 else torch.cat(partners),
        torch.stack(own_scores),
    )


def _sweep_backward(
    kernels: ModuleType,
    pairs: Pairs,
    columns: Columns,
    gradients: ScoreGradients,
    to_rows_RD: Tensor,
    excess_R1: Tensor,
    to_passages_ND: Tensor | None,
) -> None:
    """Add the gradient of all rows, in units of `gradients`, to to_rows_RD; fill to_passages_ND with the passages'.

    Adds to excess_R1 what the gradients of each row's scores, as rounded, sum up to.
    """
    rows_RD, passages_ND = pairs.rows_RD, columns.passages_ND
    (r, d), n = rows_RD.shape, len(passages_ND)
    most = min(kernels.WORKSPACE_BYTES // (r * rows_RD.element_size()), PRODUCT_BYTES // (4 * d), LONGEST_CHUNK)
    width = min(max(most // CHUNK_MULTIPLE, 1), -(-n // CHUNK_MULTIPLE)) * CHUNK_MULTIPLE
    workspace = rows_RD.new_empty(r, width)
    for first in range(0, n, width):
        last = min(first + width, n)
        to_scores_RC = workspace[:, : last - first]
        kernels.score_gradients(pairs, columns, first, last, gradients, to_scores_RC)
        to_rows_RD += product(to_scores_RC, passages_ND[first:last])
        excess_R1 += to_scores_RC.sum(1, keepdim=True, dtype=excess_R1.dtype)
        if to_passages_ND is not None:
            to_passages_ND[first:last] = product(to_scores_RC.T, rows_RD).mul_(gradients.unit)


def _check(
    inputs: tuple[Tensor | None, ...], labels_B: Tensor, query_ids: Tensor | None, passage_ids: Tensor | None
) -> None:
    """ValueError for what does not fit together: a kernel would read past the end instead."""
    student_BD, teacher_BD, steps_BKD, teacher_steps_BKD, passages_ND = inputs
    assert student_BD is not None and passages_ND is not None
    b, d, n = *student_BD.shape, len(passages_ND)
    k = next((x.shape[1] for x in (steps_BKD, teacher_steps_BKD) if x is not None), 0)
    for name, tensor, shape in (
        ("teacher_BD", teacher_BD, (b, d)),
        ("student_steps_BKD", steps_BKD, (b, k, d)),
        ("teacher_steps_BKD", teacher_steps_BKD, (b, k, d)),
        ("passages_ND", passages_ND, (n, d)),
        ("labels_B", labels_B, (b,)),
        ("query_ids", query_ids, (b,)),
        ("passage_ids", passage_ids, (n,)),
    ):
        if tensor is None:
            continue
        found = tuple(tensor.shape[:1]) if name == "query_ids" else tuple(tensor.shape)
        if found != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != passages_ND.device:
            raise ValueError(f"{name} is on {tensor.device}, the passages are on {passages_ND.device}")
    if not b or not n:
        raise ValueError(f"{b} queries and {n} passages: there must be at least one of each")
    if labels_B.dtype != torch.int64:
        raise ValueError(f"labels_B is {labels_B.dtype}, expected torch.int64")
    # Without waiting for the GPU; -1 would take the last passage for the positive.
    torch._assert_async(((labels_B >= 0) & (labels_B < n)).all(), "labels_B holds a column that there is not")
