"""Attention of one latent step: every row's soft token over its own prompt's K/V, where they lie, and its soft tokens.

The prompts' keys and values stay packed end to end, as the prefix sweep left them; nothing is gathered, padded or
copied, however many steps follow. Axes: R rows · H heads · G heads of keys and values · E head size · T packed tokens ·
J soft tokens so far, this step's included.
"""

import importlib

import torch
from torch import Tensor

from laser_kernels.dispatch import choose


def latent_attention_reference(
    query_RHE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    starts_R: Tensor,
    lengths_R: Tensor,
    soft_key_RJGE: Tensor,
    soft_value_RJGE: Tensor,
    scale: float,
) -> Tensor:
    """(R, H, E): softmax(scale q.k) v over tokens starts .. starts + lengths - 1 and the row's J soft tokens."""
    group = query_RHE.shape[1] // key_TGE.shape[1]
    rows = []
    for r, (start, length) in enumerate(zip(starts_R.tolist(), lengths_R.tolist(), strict=True)):
        key = torch.cat([key_TGE[start : start + length], soft_key_RJGE[r]]).repeat_interleave(group, 1)
        value = torch.cat([value_TGE[start : start + length], soft_value_RJGE[r]]).repeat_interleave(group, 1)
        weights = torch.softmax(torch.einsum("he,xhe->hx", query_RHE[r], key) * scale, -1)
        rows.append(torch.einsum("hx,xhe->he", weights, value))
    return torch.stack(rows)


def latent_attention(
    query_RHE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    starts_R: Tensor,
    lengths_R: Tensor,
    soft_key_RJGE: Tensor,
    soft_value_RJGE: Tensor,
    scale: float,
) -> Tensor:
    """As `latent_attention_reference`, by a Triton kernel that reads every prompt's K/V once; with gradients.

    Arguments are bfloat16 or float16 (also float32, which spills registers on a GPU), of one dtype, with at least one
    token a row; sums are float32. Raises ValueError where Triton cannot run (see `laser_kernels.choose`).
    """
    choose("triton", query_RHE.device, query_RHE.dtype)
    return _LatentAttention.apply(
        query_RHE, key_TGE, value_TGE, starts_R, lengths_R, soft_key_RJGE, soft_value_RJGE, scale
    )


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, starts, lengths, soft_key, soft_value, scale):  # type: ignore[no-untyped-def]
        kernels = importlib.import_module("laser_kernels.latent_attention_triton")
        contiguous = [x.contiguous() for x in (query, key, value, soft_key, soft_value)]
        output, logsumexp = kernels.forward(*contiguous, starts, lengths, scale)
        ctx.save_for_backward(*contiguous, starts, lengths, output, logsumexp)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        kernels = importlib.import_module("laser_kernels.latent_attention_triton")
        query, key, value, soft_key, soft_value = kernels.backward(*ctx.saved_tensors, gradient.contiguous(), ctx.scale)
        return query, key, value, None, None, soft_key, soft_value, None
