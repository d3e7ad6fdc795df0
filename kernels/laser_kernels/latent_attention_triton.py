"""The kernels of `latent_attention`. One program serves one row and one head of keys and values, with all of its
queries: it walks the row's tokens in tiles, then the soft tokens, so each key and value is read once, by one program.

Backward recomputes the weights from the logarithm of their sum. Only one program touches a token's gradients, so they
are written, not added: no atomics, the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Tokens a program takes at a time, and the padded sizes of the rest; tensor cores want 16 or more of each."""

    tokens: int
    queries: int
    soft: int
    depth: int
    warps: int
    stages: int


def tile(group: int, soft: int, head_size: int) -> Tile:
    """4096 numbers of keys and as many of values at a time: what backward holds in registers without spills."""
    queries, soft, depth = (max(16, triton.next_power_of_2(n)) for n in (group, soft, head_size))
    return Tile(max(16, 4096 // depth), queries, soft, depth, 4, 2)


def forward(
    query_RHE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    soft_key_RJGE: Tensor,
    soft_value_RJGE: Tensor,
    starts_R: Tensor,
    lengths_R: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output (R, H, E), and log2 of each head's sum of weights (R, H), float32. Arguments are contiguous."""
    rows, heads, _ = query_RHE.shape
    # The interpreter cuts bfloat16 off where a GPU rounds, so it leaves that to PyTorch.
    output = torch.empty_like(query_RHE, dtype=None if query_RHE.is_cuda else torch.float32)
    logsumexp = torch.empty(rows, heads, dtype=torch.float32, device=query_RHE.device)
    with torch.cuda.device_of(query_RHE):
        _forward_kernel[(rows, key_TGE.shape[1])](
            query_RHE, key_TGE, value_TGE, soft_key_RJGE, soft_value_RJGE, starts_R, lengths_R, output, logsumexp,
            **_sizes(query_RHE, key_TGE, soft_key_RJGE, scale),
        )  # fmt: skip
    return output.to(query_RHE.dtype), logsumexp


def backward(
    query_RHE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    soft_key_RJGE: Tensor,
    soft_value_RJGE: Tensor,
    starts_R: Tensor,
    lengths_R: Tensor,
    output_RHE: Tensor,
    logsumexp_RH: Tensor,
    gradient_RHE: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of query, keys, values and the soft tokens' keys and values; zero for tokens of no row's prompt."""
    inputs = (query_RHE, key_TGE, value_TGE, soft_key_RJGE, soft_value_RJGE)
    dtype = None if query_RHE.is_cuda else torch.float32
    gradients = [torch.zeros_like(x, dtype=dtype) for x in inputs]
    with torch.cuda.device_of(query_RHE):
        _backward_kernel[(len(query_RHE), key_TGE.shape[1])](
            *inputs, starts_R, lengths_R, output_RHE, logsumexp_RH, gradient_RHE, *gradients,
            **_sizes(query_RHE, key_TGE, soft_key_RJGE, scale),
        )  # fmt: skip
    return [gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True)]


def _sizes(query_RHE: Tensor, key_TGE: Tensor, soft_key_RJGE: Tensor, scale: float) -> dict[str, object]:
    heads, groups, head_size, soft = query_RHE.shape[1], key_TGE.shape[1], key_TGE.shape[2], soft_key_RJGE.shape[1]
    t = tile(heads // groups, soft, head_size)
    return {
        "scale": scale,
        "G": groups,
        "J": soft,
        "GROUP": heads // groups,
        "HEAD": head_size,
        "PRECISION": "ieee" if query_RHE.dtype == torch.float32 else "tf32",
        # The interpreter multiplies the bits of bfloat16 as if they were integers (triton 3.6 to 3.9).
        "WIDEN": not query_RHE.is_cuda,
        "TOKENS": t.tokens,
        "QUERIES": t.queries,
        "SOFT": t.soft,
        "DEPTH": t.depth,
        "num_warps": t.warps,
        "num_stages": t.stages,
    }


@triton.jit
def _load(pointer, rows, row_stride, count, HEAD: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr):
    """(rows, DEPTH) from `pointer`, 0 past `count` rows and past the head."""
    depth = tl.arange(0, DEPTH)
    inside = (rows < count)[:, None] & (depth < HEAD)[None, :]
    x = tl.load(pointer + rows.to(tl.int64)[:, None] * row_stride + depth[None, :], mask=inside, other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(pointer, rows, row_stride, count, x, HEAD: tl.constexpr, DEPTH: tl.constexpr):
    depth = tl.arange(0, DEPTH)
    inside = (rows < count)[:, None] & (depth < HEAD)[None, :]
    out = pointer + rows.to(tl.int64)[:, None] * row_stride + depth[None, :]
    tl.store(out, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _fold(query, key, value, inside, scale_log2, highest, total, sums, PRECISION: tl.constexpr):
    """Take a tile of keys into the running maximum, the sum of weights and the weighted sum of values."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
    scores = tl.where(inside[None, :], scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return higher, total, sums


@triton.jit
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, soft_key_ptr, soft_value_ptr, starts_ptr, lengths_ptr, out_ptr, logsumexp_ptr,
    scale, G, J, GROUP: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr, SOFT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(starts_ptr + row).to(tl.int64), tl.load(lengths_ptr + row).to(tl.int32)
    queries, soft = tl.arange(0, QUERIES), tl.arange(0, SOFT)
    own = (row * G + g) * GROUP
    query = _load(query_ptr + own * HEAD, queries, HEAD, GROUP, HEAD, DEPTH, WIDEN)
    scale_log2 = scale * 1.4426950408889634
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, DEPTH), tl.float32)
    for first in range(0, length, TOKENS):
        token = first + tl.arange(0, TOKENS)
        at = (start * G + g) * HEAD
        key = _load(key_ptr + at, token, G * HEAD, length, HEAD, DEPTH, WIDEN)
        value = _load(value_ptr + at, token, G * HEAD, length, HEAD, DEPTH, WIDEN)
        highest, total, sums = _fold(query, key, value, token < length, scale_log2, highest, total, sums, PRECISION)
    at = (row * J * G + g) * HEAD
    key = _load(soft_key_ptr + at, soft, G * HEAD, J, HEAD, DEPTH, WIDEN)
    value = _load(soft_value_ptr + at, soft, G * HEAD, J, HEAD, DEPTH, WIDEN)
    highest, total, sums = _fold(query, key, value, soft < J, scale_log2, highest, total, sums, PRECISION)
    _store(out_ptr + own * HEAD, queries, HEAD, GROUP, sums / total[:, None], HEAD, DEPTH)
    tl.store(logsumexp_ptr + own + queries, highest + tl.log2(total), mask=queries < GROUP)


@triton.jit
def _gradients(
    query, gradient, key, value, inside, logsumexp, delta, scale, PRECISION: tl.constexpr, DTYPE: tl.constexpr
):
    """Of a tile of keys and values, and their share of the queries'."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * 1.4426950408889634)
    weights = tl.where(inside[None, :], tl.exp2(scores - logsumexp[:, None]), 0.0)
    of_value = tl.dot(tl.trans(weights).to(DTYPE), gradient, input_precision=PRECISION)
    of_weights = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
    of_scores = (weights * (of_weights - delta[:, None]) * scale).to(DTYPE)
    of_key = tl.dot(tl.trans(of_scores), query, input_precision=PRECISION)
    return tl.dot(of_scores, key, input_precision=PRECISION), of_key, of_value


@triton.jit
def _backward_kernel(
    query_ptr, key_ptr, value_ptr, soft_key_ptr, soft_value_ptr, starts_ptr, lengths_ptr, out_ptr, logsumexp_ptr,
    gradient_ptr, of_query_ptr, of_key_ptr, of_value_ptr, of_soft_key_ptr, of_soft_value_ptr,
    scale, G, J, GROUP: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr, SOFT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(starts_ptr + row).to(tl.int64), tl.load(lengths_ptr + row).to(tl.int32)
    queries, soft = tl.arange(0, QUERIES), tl.arange(0, SOFT)
    own = (row * G + g) * GROUP
    query = _load(query_ptr + own * HEAD, queries, HEAD, GROUP, HEAD, DEPTH, WIDEN)
    gradient = _load(gradient_ptr + own * HEAD, queries, HEAD, GROUP, HEAD, DEPTH, WIDEN)
    out = _load(out_ptr + own * HEAD, queries, HEAD, GROUP, HEAD, DEPTH, WIDEN)
    logsumexp = tl.load(logsumexp_ptr + own + queries, mask=queries < GROUP, other=0.0)
    delta = tl.sum(out.to(tl.float32) * gradient.to(tl.float32), 1)
    of_query = tl.zeros((QUERIES, DEPTH), tl.float32)
    for first in range(0, length, TOKENS):
        token = first + tl.arange(0, TOKENS)
        at = (start * G + g) * HEAD
        key = _load(key_ptr + at, token, G * HEAD, length, HEAD, DEPTH, WIDEN)
        value = _load(value_ptr + at, token, G * HEAD, length, HEAD, DEPTH, WIDEN)
        share, of_key, of_value = _gradients(
            query, gradient, key, value, token < length, logsumexp, delta, scale, PRECISION, query.dtype
        )
        of_query += share
        _store(of_key_ptr + at, token, G * HEAD, length, of_key, HEAD, DEPTH)
        _store(of_value_ptr + at, token, G * HEAD, length, of_value, HEAD, DEPTH)
    at = (row * J * G + g) * HEAD
    key = _load(soft_key_ptr + at, soft, G * HEAD, J, HEAD, DEPTH, WIDEN)
    value = _load(soft_value_ptr + at, soft, G * HEAD, J, HEAD, DEPTH, WIDEN)
    share, of_key, of_value = _gradients(
        query, gradient, key, value, soft < J, logsumexp, delta, scale, PRECISION, query.dtype
    )
    _store(of_soft_key_ptr + at, soft, G * HEAD, J, of_key, HEAD, DEPTH)
    _store(of_soft_value_ptr + at, soft, G * HEAD, J, of_value, HEAD, DEPTH)
    _store(of_query_ptr + own * HEAD, queries, HEAD, GROUP, of_query + share, HEAD, DEPTH)
