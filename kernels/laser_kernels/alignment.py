"""The objective as one autograd function over two sweeps through the passages, never holding a [B, N] matrix.

1. Forward sweeps the passages once for a few sums per pair of rows (pairs.py); the terms follow in closed form.
2. Backward sweeps them again, in chunks of columns: d loss / d score of a chunk is written to a bounded workspace, and
   two library matrix products per chunk turn it into gradients of rows and of passages.
3. With a process group, each rank holds its own passages only, and both sweeps take W hops of a ring.

Invariant: value and every gradient equal `alignment_loss_reference` on all passages, whatever the chunk, split or hop.
"""

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from laser_kernels.dispatch import implementation
from laser_kernels.pairs import (
    ABOVE_S,
    ABOVE_T,
    RIVALS,
    Columns,
    Pairs,
    ScoreGradients,
    Temperatures,
    merge,
    precise,
    product,
    score_gradients_of,
    terms,
)
from laser_kernels.reference import Alignment, AlignmentTerms, alignment_reference
from laser_kernels.ring import Ring

# The workspace of d loss / d score. 32 MiB stay in an H100's L2 (50 MB) between the kernel that writes them and the two
# products that read them; products over this many scores are long past their best size.
WORKSPACE_BYTES = 32 * 2**20
# Rows of the workspace are multiples of this: kernels store aligned, and products have a useful inner dimension.
CHUNK_MULTIPLE = 128
# With few rows 32 MiB would hold millions of columns; past this many nothing is gained.
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
    those of the other ranks pass by in a ring. Values and gradients are as if all had been gathered.
    `kernel`: auto, triton, chunked or reference (see dispatch.py). ValueError: that one cannot run here.
    """
    inputs = (student_BD, teacher_BD, student_steps_BKD, teacher_steps_BKD, passages_ND)
    chosen = implementation(kernel, passages_ND.device, passages_ND.dtype)
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
    dtypes = [x.dtype for x in inputs if x is not None]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    if query_ids is None or passage_ids is None:
        query_ids = passage_ids = None
    *terms, above_s_B, above_t_B, dropped_B = _Alignment.apply(
        *(None if x is None else x.to(dtype) for x in inputs),
        labels_B,
        passage_ids,
        None if query_ids is None else query_ids.view(len(query_ids), -1),
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
        rows = (student_BD, teacher_BD, steps_BKD, teacher_steps_BKD)
        pairs = _pair_up(*rows, columns, margin, temperatures)
        parts = [kernels.statistics(pairs, held) for held in ring.columns(columns)]
        statistics_SP = parts[0] if len(parts) == 1 else merge(torch.stack(parts), pairs)
        ctx.save_for_backward(passages_ND, labels_B, ids_N, query_ids_BX, statistics_SP)
        ctx.pairs, ctx.ring, ctx.kernels, ctx.dtype = pairs, ring, kernels, student_BD.dtype
        above_s_B, above_t_B, rivals_B = statistics_SP[[ABOVE_S, ABOVE_T, RIVALS], : pairs.queries]
        dropped_B = ring.size * len(passages_ND) - 1 - rivals_B
        ctx.mark_non_differentiable(above_s_B, above_t_B, dropped_B)
        return *terms(statistics_SP, pairs), above_s_B, above_t_B, dropped_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *to_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *columns, statistics_SP = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        gradients = score_gradients_of(torch.stack(to_outputs[:4]), statistics_SP, pairs)
        to_rows_RD = torch.zeros_like(pairs.rows_RD, dtype=precise(ctx.dtype))

        def sweep(held: Columns, to_passages_ND: Tensor | None) -> None:
            _sweep_backward(ctx.kernels, pairs, held, gradients, to_rows_RD, to_passages_ND)

        to_passages_ND = ctx.ring.sweep_with_gradient(Columns(*columns), sweep, wanted=ctx.needs_input_grad[4])
        to_rows_RD *= gradients.unit
        b, p, dtype = pairs.queries, pairs.pairs, ctx.dtype
        to_steps = to_rows_RD[b:p].to(dtype).view(b, pairs.steps, -1) if pairs.steps else None
        to_teacher = to_rows_RD[p:].to(dtype) if pairs.has_teacher else None
        return to_rows_RD[:b].to(dtype), to_teacher, to_steps, None, to_passages_ND, *[None] * 7


def _pair_up(
    student_BD: Tensor,
    teacher_BD: Tensor | None,
    steps_BKD: Tensor | None,
    teacher_steps_BKD: Tensor | None,
    columns: Columns,
    margin: float | None,
    temperatures: Temperatures,
) -> Pairs:
    own_BD = columns.passages_ND[columns.labels_B].to(precise(columns.passages_ND.dtype))
    students = [student_BD] if steps_BKD is None else [student_BD, steps_BKD.flatten(0, 1)]
    partners = [student_BD if teacher_BD is None else teacher_BD]
    if teacher_steps_BKD is not None:
        partners.append(teacher_steps_BKD.flatten(0, 1))
    own_parts = [own_BD, own_BD.repeat_interleave(0 if steps_BKD is None else steps_BKD.shape[1], 0)]
    own = [torch.cat([(x * y).sum(-1) for x, y in zip(side, own_parts)]) for side in (students, partners)]  # noqa: B905
    return Pairs(
        rows_RD=torch.cat(students if teacher_BD is None else [*students, teacher_BD]),
        partners_PD=torch.cat(partners) if teacher_BD is not None or teacher_steps_BKD is not None else None,
        queries=len(student_BD),
        steps=0 if steps_BKD is None else steps_BKD.shape[1],
        temperatures=temperatures,
        margin=margin,
        own_2P=torch.stack(own),
    )


def _sweep_backward(
    kernels: ModuleType,
    pairs: Pairs,
    columns: Columns,
    gradients: ScoreGradients,
    to_rows_RD: Tensor,
    to_passages_ND: Tensor | None,
) -> None:
    """Add the gradient of all rows, in units of `gradients`, to to_rows_RD; fill to_passages_ND with the passages'."""
    rows_RD, passages_ND = pairs.rows_RD, columns.passages_ND
    n = len(passages_ND)
    width = WORKSPACE_BYTES // (len(rows_RD) * rows_RD.element_size()) // CHUNK_MULTIPLE * CHUNK_MULTIPLE
    width = min(max(width, CHUNK_MULTIPLE), LONGEST_CHUNK, -(-n // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)
    workspace = rows_RD.new_empty(len(rows_RD), width)
    for first in range(0, n, width):
        last = min(first + width, n)
        to_scores_RC = workspace[:, : last - first]
        kernels.score_gradients(pairs, columns, first, last, gradients, to_scores_RC)
        to_rows_RD += product(to_scores_RC, passages_ND[first:last])
        if to_passages_ND is not None:
            to_passages_ND[first:last] = product(to_scores_RC.T, rows_RD) * gradients.unit


def _check(
    inputs: tuple[Tensor | None, ...], labels_B: Tensor, query_ids: Tensor | None, passage_ids: Tensor | None
) -> None:
    """ValueError for shapes that do not fit: a kernel would read past the end instead."""
    student_BD, teacher_BD, steps_BKD, teacher_steps_BKD, passages_ND = inputs
    assert student_BD is not None and passages_ND is not None
    b, d = student_BD.shape
    k = None if steps_BKD is None else steps_BKD.shape[1]
    wanted = {
        "teacher_BD": (teacher_BD, (b, d)),
        "student_steps_BKD": (steps_BKD, (b, k, d)),
        "teacher_steps_BKD": (teacher_steps_BKD, (b, teacher_steps_BKD.shape[1] if k is None else k, d))
        if teacher_steps_BKD is not None
        else (None, ()),
        "passages_ND": (passages_ND, (len(passages_ND), d)),
        "labels_B": (labels_B, (b,)),
        "query_ids": (query_ids, () if query_ids is None else (b, *query_ids.shape[1:2])),
        "passage_ids": (passage_ids, (len(passages_ND),)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor is not None and tensor.device != passages_ND.device:
            raise ValueError(f"{name} is on {tensor.device}, the passages are on {passages_ND.device}")
    if not b or not len(passages_ND):
        raise ValueError(f"{b} queries and {len(passages_ND)} passages: there must be at least one of each")
