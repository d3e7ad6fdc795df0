"""The two sweeps over the passages as Triton kernels; pair_torch.py computes the same in plain PyTorch.

Both kernels score a tile of pairs with a tile of passages in registers, `student @ passages.T` and `teacher @
passages.T`, over the same loaded passages: a pair's two rows are what one tile of a plain product would be. The first
folds the scores into sums, the second writes d loss / d score to a workspace. Scores never reach memory, nothing is
added atomically, and the order of every sum is fixed, so that results repeat bit for bit.

Exponents are kept in base 2, the GPU's own: a logit times log2(e).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from laser_kernels import reference
from laser_kernels.pairs import STATISTICS, Columns, Pairs, ScoreGradients, merge

# d loss / d score of a chunk: it stays in an H100's L2 (50 MB) between the kernel that writes it and the two products
# that read it, and products over this many scores are long past their best size.
WORKSPACE_BYTES = 32 * 2**20
# Programs per streaming multiprocessor: several, so that the last, partly filled wave costs little.
PROGRAMS_PER_PROCESSOR = 4
# What stands in for the number of multiprocessors under the interpreter: enough to split the passages in tests.
INTERPRETED_PROCESSORS = 2


class Tile(NamedTuple):
    """One program's share: pairs x columns scores, `depth` of the hidden size at a time."""

    pairs: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile(dtype: torch.dtype, pairs: int, *, crowded: bool) -> Tile:
    """What fits 64 Ki registers a multiprocessor without spills: two score tiles (three with a margin), and their sums.

    kernels/README.md says why these; `kernels/benchmarks/resources.py` shows what the assembler makes of them.
    """
    if dtype == torch.float32:
        return Tile(64, 32 if crowded else 64, 32, 8, 3)
    return Tile(64 if pairs <= 64 else 128, 64 if crowded else 128, 64, 8, 3)


def statistics(pairs: Pairs, columns: Columns) -> Tensor:
    """(STATISTICS, P): the sums over all columns; the splits' shares are merged in a fixed order."""
    n, p, t = len(columns.passages_ND), pairs.count, _tile_of(pairs)
    blocks, tiles = triton.cdiv(p, t.pairs), triton.cdiv(n, t.columns)
    splits = min(tiles, max(1, PROGRAMS_PER_PROCESSOR * _processors(columns.passages_ND) // blocks))
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    shifts_2P = pairs.fixed_shifts_2P()
    parts_XSP = pairs.own_2P.new_empty(splits, STATISTICS, p)
    with torch.cuda.device_of(parts_XSP):
        _statistics_kernel[(blocks, splits)](
            **_arguments(pairs, columns),
            shifts_ptr=pairs.own_2P if shifts_2P is None else shifts_2P,
            out_ptr=parts_XSP,
            N=n,
            tiles_per_split=per_split,
            RUNNING_SHIFT=shifts_2P is None,
            **_options(pairs, columns, t),
        )
    return merge(parts_XSP, pairs)


def score_gradients(
    pairs: Pairs, columns: Columns, first: int, last: int, gradients: ScoreGradients, out_RC: Tensor
) -> None:
    """Fill out_RC with d loss / d score of the columns first .. last - 1; see `ScoreGradients` for the formula."""
    t = _tile_of(pairs)
    grid = (triton.cdiv(pairs.count, t.pairs), triton.cdiv(last - first, t.columns))
    # The interpreter cuts bfloat16 off where a GPU rounds, so it leaves that to PyTorch.
    written_RC = out_RC if out_RC.is_cuda else torch.empty_like(out_RC, dtype=torch.float32)
    with torch.cuda.device_of(out_RC):
        _score_gradients_kernel[grid](
            **_arguments(pairs, columns),
            levels_ptr=gradients.levels_4P,
            coefficients_ptr=gradients.coefficients_4P,
            own_gradients_ptr=gradients.own_2P,
            out_ptr=written_RC,
            stride_out=written_RC.stride(0),
            first=first,
            last=last,
            HAS_TEACHER=pairs.has_teacher,
            **_options(pairs, columns, t),
        )
    if written_RC is not out_RC:
        out_RC.copy_(written_RC)


def _tile_of(pairs: Pairs) -> Tile:
    return tile(pairs.rows_RD.dtype, pairs.count, crowded=pairs.margin is not None or pairs.temperatures.differ)


def _arguments(pairs: Pairs, columns: Columns) -> dict[str, object]:
    """What both kernels read; where there is nothing to read, a pointer that is never followed."""
    rows_RD = pairs.rows_RD
    query_keys_BX, keys_N = columns.keys or (columns.labels_B[:, None], columns.labels_B)
    return {
        "rows_ptr": rows_RD,
        "partners_ptr": rows_RD if pairs.partners_PD is None else pairs.partners_PD,
        "passages_ptr": columns.passages_ND,
        "stride_passages": columns.passages_ND.stride(0),
        "labels_ptr": columns.labels_int32_B,
        "query_keys_ptr": query_keys_BX,
        "keys_ptr": keys_N,
        "keys_per_query": query_keys_BX.shape[1],
        "own_ptr": pairs.own_2P,
        "scales_ptr": pairs.scales_2P,
        "margin": 0.0 if pairs.margin is None else pairs.margin,
        "B": pairs.queries,
        "K": max(pairs.steps, 1),
        "P": pairs.count,
        "D": rows_RD.shape[1],
    }


def _options(pairs: Pairs, columns: Columns, t: Tile) -> dict[str, object]:
    return {
        "HAS_PARTNERS": pairs.partners_PD is not None,
        "HAS_KEYS": columns.keys is not None,
        "HAS_MARGIN": pairs.margin is not None,
        "TWO_TEMPERATURES": pairs.temperatures.differ,
        "EVEN_DEPTH": pairs.rows_RD.shape[1] % t.depth == 0,
        # TF32 would cost float32 inputs 13 of their 24 bits: at temperature 0.02 that is 2 % of a logit's exponential.
        "PRECISION": "ieee" if pairs.rows_RD.dtype == torch.float32 else "tf32",
        # The interpreter multiplies the bits of bfloat16 as if they were integers (triton 3.6 to 3.9).
        "WIDEN": not pairs.rows_RD.is_cuda and pairs.rows_RD.dtype == torch.bfloat16,
        "BLOCK_P": t.pairs,
        "BLOCK_N": t.columns,
        "BLOCK_D": t.depth,
        "num_warps": t.warps,
        "num_stages": t.stages,
        "enable_fp_fusion": True,
    }


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else INTERPRETED_PROCESSORS


TIE = tl.constexpr(reference.TIE)
# A score no rows can have, below even the shift of rows that have seen no rival yet.
DROPPED = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-1e28)


@triton.jit
def _operand(pointers, inside, EVEN_DEPTH: tl.constexpr, WIDEN: tl.constexpr):
    """A tile of one factor, 0 past the hidden size."""
    if EVEN_DEPTH:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=inside, other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _scores(
    rows_ptr, partners_ptr, passages_ptr, stride_passages, labels_ptr, query_keys_ptr, keys_ptr, keys_per_query,
    own_ptr, margin, own_pair, own_column, B, K, P, D, last,
    HAS_PARTNERS: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_MARGIN: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores (BLOCK_P, BLOCK_N) of student and teacher; DROPPED where a column is no rival of the row.

    DROPPED, too, is the row's own positive. No mask is kept beside the scores, because registers are scarce: the
    exponential of a dropped score is 0, and so is the difference of two.
    """
    pair = tl.minimum(own_pair, P - 1)  # past the end the last one repeats, so that loads need no mask
    column = tl.minimum(own_column, last - 1)
    query = tl.where(pair < B, pair, (pair - B) // K)
    inner = tl.arange(0, BLOCK_D)
    # int64: 10^6 passages of 4096 numbers are past 2^31.
    rows = rows_ptr + pair.to(tl.int64)[:, None] * D + inner[None, :]
    partners = partners_ptr + pair.to(tl.int64)[:, None] * D + inner[None, :]
    queries = rows_ptr + query.to(tl.int64)[:, None] * D + inner[None, :]
    passages = passages_ptr + column.to(tl.int64)[None, :] * stride_passages + inner[:, None]
    student = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    teacher = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    query_score = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = inner + start < D
        d = _operand(passages + start, inside[:, None], EVEN_DEPTH, WIDEN)
        x = _operand(rows + start, inside[None, :], EVEN_DEPTH, WIDEN)
        student = tl.dot(x, d, student, input_precision=PRECISION)
        if HAS_PARTNERS:
            y = _operand(partners + start, inside[None, :], EVEN_DEPTH, WIDEN)
            teacher = tl.dot(y, d, teacher, input_precision=PRECISION)
        if HAS_MARGIN:
            q = _operand(queries + start, inside[None, :], EVEN_DEPTH, WIDEN)
            query_score = tl.dot(q, d, query_score, input_precision=PRECISION)
    if HAS_KEYS:
        key_of_column = tl.load(keys_ptr + column)
        for i in range(0, keys_per_query):
            key_of_row = tl.load(query_keys_ptr + query * keys_per_query + i)
            same = key_of_row[:, None] == key_of_column[None, :]
            student = tl.where(same, DROPPED, student)
            if HAS_PARTNERS:
                teacher = tl.where(same, DROPPED, teacher)
    if HAS_MARGIN:
        too_close = query_score > tl.load(own_ptr + query)[:, None] + margin + TIE
        student = tl.where(too_close, DROPPED, student)
        if HAS_PARTNERS:
            teacher = tl.where(too_close, DROPPED, teacher)
    is_own = own_column[None, :] == tl.load(labels_ptr + query)[:, None]
    student = tl.where(is_own | (own_column >= last)[None, :], DROPPED, student)
    if HAS_PARTNERS:
        teacher = tl.where(is_own | (own_column >= last)[None, :], DROPPED, teacher)
    return student, teacher


# Counts would otherwise be compiled in when they are 1 or multiples of 16, a new kernel for each: they change nothing.
_COUNTS = ["B", "K", "P", "keys_per_query"]


@triton.jit(do_not_specialize=[*_COUNTS, "N", "tiles_per_split"])
def _statistics_kernel(
    rows_ptr,  # (R, D); the first P are the students
    partners_ptr,  # (P, D)
    passages_ptr,  # (N, D), rows stride_passages apart
    stride_passages,
    labels_ptr,  # (B,) int32
    query_keys_ptr,  # (B, keys_per_query) int32
    keys_ptr,  # (N,) int32
    keys_per_query,
    own_ptr,  # (2, P) - score of the query's own positive, by student and teacher
    scales_ptr,  # (2, P) - log2(e) / tau, in the divergence and the contrast
    shifts_ptr,  # (2, P) - scores of student and teacher that exponents are relative to, unless RUNNING_SHIFT
    margin,
    out_ptr,  # (splits, 10, P), ordered as in pairs.py
    B, K, P, D, N,
    tiles_per_split,
    RUNNING_SHIFT: tl.constexpr,  # whether only the running maximum keeps the sums in float32
    HAS_PARTNERS: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_MARGIN: tl.constexpr, TWO_TEMPERATURES: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per pair, over the rivals in this split's columns, with scores s, t, their shifts and x = log2(e) / tau:

    sum 2^(x (s - shift_s)), sum 2^(x (t - shift_t)), sum 2^(x (t - shift_t)) (t - s) / tau; the first two under the
    contrast's temperature; how many have s, t above the positive's; how many there are.
    """
    # Program ids run along the pairs first: programs side by side share their passages, which then come from L2.
    own_pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    split = tl.program_id(1)
    pair = tl.minimum(own_pair, P - 1)
    query = tl.where(pair < B, pair, (pair - B) // K)
    own_s = tl.load(own_ptr + query) + TIE
    own_t = tl.load(own_ptr + P + query) + TIE
    scale = tl.load(scales_ptr + pair)[:, None]
    ce_scale = tl.load(scales_ptr + P + pair)[:, None]
    shift_s = tl.load(shifts_ptr + pair)
    shift_t = tl.load(shifts_ptr + P + pair)
    if RUNNING_SHIFT:
        shift_s = tl.zeros((BLOCK_P,), tl.float32) + LOWEST
        shift_t = tl.zeros((BLOCK_P,), tl.float32) + LOWEST
    sum_s = tl.zeros((BLOCK_P,), tl.float32)
    sum_t = tl.zeros((BLOCK_P,), tl.float32)
    cross = tl.zeros((BLOCK_P,), tl.float32)
    ce_sum_s = tl.zeros((BLOCK_P,), tl.float32)
    ce_sum_t = tl.zeros((BLOCK_P,), tl.float32)
    above_s = tl.zeros((BLOCK_P,), tl.float32)
    above_t = tl.zeros((BLOCK_P,), tl.float32)
    rivals = tl.zeros((BLOCK_P,), tl.float32)

    for i in range(0, tiles_per_split):
        own_column = (split * tiles_per_split + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        student, teacher = _scores(
            rows_ptr, partners_ptr, passages_ptr, stride_passages, labels_ptr, query_keys_ptr, keys_ptr,
            keys_per_query, own_ptr, margin, own_pair, own_column, B, K, P, D, N,
            HAS_PARTNERS, HAS_KEYS, HAS_MARGIN, EVEN_DEPTH, PRECISION, WIDEN, BLOCK_P, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        above_s += tl.sum(tl.where(student > own_s[:, None], 1.0, 0.0), 1)
        rivals += tl.sum(tl.where(student > DROPPED / 2, 1.0, 0.0), 1)
        if RUNNING_SHIFT:
            highest = tl.maximum(shift_s, tl.max(student, 1))
            lower = (shift_s - highest)[:, None]
            sum_s *= tl.exp2(lower * scale).reshape((BLOCK_P,))
            ce_sum_s *= tl.exp2(lower * ce_scale).reshape((BLOCK_P,))
            shift_s = highest
        # Subtract first: (s - shift) is exact where it matters, and large logits would lose what it has.
        below_s = student - shift_s[:, None]
        sum_s += tl.sum(tl.exp2(below_s * scale), 1)
        if TWO_TEMPERATURES:
            ce_sum_s += tl.sum(tl.exp2(below_s * ce_scale), 1)
        if HAS_PARTNERS:
            above_t += tl.sum(tl.where(teacher > own_t[:, None], 1.0, 0.0), 1)
            if RUNNING_SHIFT:
                highest = tl.maximum(shift_t, tl.max(teacher, 1))
                lower = (shift_t - highest)[:, None]
                sum_t *= tl.exp2(lower * scale).reshape((BLOCK_P,))
                cross *= tl.exp2(lower * scale).reshape((BLOCK_P,))
                ce_sum_t *= tl.exp2(lower * ce_scale).reshape((BLOCK_P,))
                shift_t = highest
            below_t = teacher - shift_t[:, None]
            e = tl.exp2(below_t * scale)
            sum_t += tl.sum(e, 1)
            cross += tl.sum(e * (teacher - student), 1)
            if TWO_TEMPERATURES:
                ce_sum_t += tl.sum(tl.exp2(below_t * ce_scale), 1)
    if not TWO_TEMPERATURES:
        ce_sum_s = sum_s
        ce_sum_t = sum_t

    out = out_ptr + split.to(tl.int64) * 10 * P + own_pair
    there = own_pair < P
    is_output = own_pair < B
    LN_2: tl.constexpr = 0.6931471805599453
    tl.store(out, shift_s, mask=there)
    tl.store(out + P, shift_t, mask=there)
    tl.store(out + 2 * P, sum_s, mask=there)
    tl.store(out + 3 * P, sum_t, mask=there)
    tl.store(out + 4 * P, ce_sum_s, mask=there)
    tl.store(out + 5 * P, ce_sum_t, mask=there)
    tl.store(out + 6 * P, cross * scale.reshape((BLOCK_P,)) * LN_2, mask=there)
    tl.store(out + 7 * P, tl.where(is_output, above_s, 0.0), mask=there)
    tl.store(out + 8 * P, tl.where(is_output, above_t, 0.0), mask=there)
    tl.store(out + 9 * P, tl.where(is_output, rivals, 0.0), mask=there)


@triton.jit(do_not_specialize=[*_COUNTS, "first", "last"])
def _score_gradients_kernel(
    rows_ptr, partners_ptr, passages_ptr, stride_passages, labels_ptr, query_keys_ptr, keys_ptr, keys_per_query,
    own_ptr, scales_ptr, margin,  # all as above
    levels_ptr,  # (4, P) - this and the next two: see pairs.ScoreGradients
    coefficients_ptr,  # (4, P)
    own_gradients_ptr,  # (2, P)
    out_ptr,  # (R, last - first), rows stride_out apart
    stride_out,
    B, K, P, D, first, last,
    HAS_TEACHER: tl.constexpr,
    HAS_PARTNERS: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_MARGIN: tl.constexpr, TWO_TEMPERATURES: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of a rival, c0 q_S + c1 p_S - c2 p_T for the student, and c3 q_T for the teacher's output."""
    own_pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    pair = tl.minimum(own_pair, P - 1)
    query = tl.where(pair < B, pair, (pair - B) // K)
    label = tl.load(labels_ptr + query)
    scale = tl.load(scales_ptr + pair)[:, None]
    ce_scale = tl.load(scales_ptr + P + pair)[:, None]
    offset = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own_column = first + offset
    student, teacher = _scores(
        rows_ptr, partners_ptr, passages_ptr, stride_passages, labels_ptr, query_keys_ptr, keys_ptr, keys_per_query,
        own_ptr, margin, own_pair, own_column, B, K, P, D, last,
        HAS_PARTNERS, HAS_KEYS, HAS_MARGIN, EVEN_DEPTH, PRECISION, WIDEN, BLOCK_P, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    c0 = tl.load(coefficients_ptr + pair)[:, None]
    c1 = tl.load(coefficients_ptr + P + pair)[:, None]
    c2 = tl.load(coefficients_ptr + 2 * P + pair)[:, None]
    c3 = tl.load(coefficients_ptr + 3 * P + pair)[:, None]
    is_own = own_column[None, :] == label[:, None]
    inside = (own_column < last)[None, :]
    out = out_ptr + own_pair.to(tl.int64)[:, None] * stride_out + offset[None, :]

    p_s = tl.exp2((student - tl.load(levels_ptr + pair)[:, None]) * scale)
    q_s = p_s
    if TWO_TEMPERATURES:
        q_s = tl.exp2((student - tl.load(levels_ptr + 2 * P + pair)[:, None]) * ce_scale)
    to_student = c0 * q_s
    if HAS_PARTNERS:
        p_t = tl.exp2((teacher - tl.load(levels_ptr + P + pair)[:, None]) * scale)
        to_student += c1 * p_s - c2 * p_t
    to_student = tl.where(is_own, tl.load(own_gradients_ptr + pair)[:, None], to_student)
    tl.store(out, to_student.to(out_ptr.dtype.element_ty), mask=inside & (own_pair < P)[:, None])
    if HAS_TEACHER:
        q_t = p_t
        if TWO_TEMPERATURES:
            q_t = tl.exp2((teacher - tl.load(levels_ptr + 3 * P + pair)[:, None]) * ce_scale)
        to_teacher = tl.where(is_own, tl.load(own_gradients_ptr + P + pair)[:, None], c3 * q_t)
        behind = out + P.to(tl.int64) * stride_out
        tl.store(behind, to_teacher.to(out_ptr.dtype.element_ty), mask=inside & (own_pair < B)[:, None])
