"""Packed attention with latent steps, as an attention function that transformers models call by name.

1. Step 0 sees all rows packed end to end and attends causally within each row. It stores each row's prompt K/V.
2. Step j > 0 sees one soft token per row; it attends to the row's prompt (never to its rationale) and to the row's
   soft tokens so far, itself included. The prompts' K/V are read where step 0 left them.

This file is what transformers calls; padded.py and varlen.py are the two ways to compute it.

Invariant: the store is written once per (layer, step) and the step travels by value. Activation checkpointing
therefore recomputes a layer exactly as it ran, and the K/V that leave it keep their gradient (use_reentrant=False).
"""

import functools

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from laser_dist.errors import UserError
from laser_dist.model.latent_kv import LatentKV

NAME = "laser_packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, tokens, head)
    key: Tensor,  # (1, kv heads, tokens, head)
    value: Tensor,
    attention_mask: Tensor | None,
    latent: tuple[LatentKV, int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention output (1, tokens, heads, head); `latent` carries the store and the step this call runs in."""
    if latent is None:
        raise UserError("this model was loaded for packed latent thinking; call it through LaserRetriever")
    if s_aux is not None or softcap is not None:
        raise UserError(
            f"{type(module).__name__} has attention sinks or soft-capped scores, which latent thinking does not "
            "support: use a model with plain attention (Qwen3, Llama, Mistral, ...)"
        )
    store, step = latent
    if sliding_window is not None and store.longest + step > sliding_window:
        raise UserError(
            f"a text of {store.longest} tokens exceeds the model's sliding window of {sliding_window}, which latent "
            f"thinking does not support: lower text.max_*_tokens to {sliding_window - step}"
        )
    attend = store.attend_prefix if step == 0 else functools.partial(store.attend_step, step)
    # scaling is a keyword of transformers' interface with a default; its models always give it.
    output = attend(module.layer_idx, query[0], key[0], value[0], scaling=scaling, dropout=dropout)
    return output[None], None


AttentionInterface.register(NAME, packed_attention)
# The layout above replaces transformers' masks: build none.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
