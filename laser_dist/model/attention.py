"""Packed attention with latent steps, as an attention function that transformers models call by name.

1. Step 0 sees all rows packed end to end and attends causally within each row. It stores each row's prompt K/V.
2. Step j > 0 sees one soft token per row; it attends to the row's prompt (never to its rationale) and to the row's
   soft tokens so far, itself included.

Invariant: the store is written once per (layer, step) and the step travels by value. Activation checkpointing
therefore recomputes a layer exactly as it ran, and the K/V that leave it keep their gradient (use_reentrant=False).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from laser_dist.batch import PackedBatch
from laser_dist.errors import UserError

NAME = "laser_packed"


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows that are padded together, inside the attention only."""

    rows: slice
    tokens: slice  # of T
    shape: tuple[int, int]  # (rows, longest)
    cells_T: Tensor  # where each of the group's tokens lies in the flattened (rows, longest) grid
    prompt_mask_RL: Tensor  # True where a cell holds a prompt token; L is the longest prompt


class LatentKV:
    """The layout of one packed batch and the K/V that later steps read; lives for one forward and its backward."""

    def __init__(self, batch: PackedBatch):
        self.rows = len(batch.lengths_R)
        self.longest = int(batch.lengths_R.max())
        # Queries carry their rationale and are longer than passages: padded apart, less is wasted.
        borders = sorted({0, batch.queries, self.rows})
        first_token_R = F.pad(batch.lengths_R.cumsum(0), (1, 0))
        self.groups = [
            _row_group(batch, slice(a, b), first_token_R) for a, b in zip(borders, borders[1:], strict=False)
        ]
        self.prefix: dict[int, list[tuple[Tensor, Tensor]]] = {}  # layer -> per group K, V (rows, heads, L, head)
        self.soft: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (layer, step) -> K, V (rows, heads, 1, head)


def _row_group(batch: PackedBatch, rows: slice, first_token_R: Tensor) -> RowGroup:
    lengths, prompts = batch.lengths_R[rows], batch.prompt_lengths_R[rows]
    tokens = slice(int(first_token_R[rows.start]), int(first_token_R[rows.stop]))
    longest = int(lengths.max())
    row_T = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    within_T = torch.arange(len(row_T), device=lengths.device) - (lengths.cumsum(0) - lengths)[row_T]
    return RowGroup(
        rows=rows,
        tokens=tokens,
        shape=(len(lengths), longest),
        cells_T=row_T * longest + within_T,
        prompt_mask_RL=torch.arange(int(prompts.max()), device=lengths.device) < prompts[:, None],
    )


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
    attend = _attend_prefix if step == 0 else _attend_step
    output = attend(store, step, module.layer_idx, query[0], key[0], value[0], scaling, dropout)  # type: ignore[arg-type]
    return output[None], None


def _attend_prefix(
    store: LatentKV, step: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float
) -> Tensor:
    outputs, prefix = [], []
    for group in store.groups:
        q, k, v = (_pad(x[:, group.tokens], group) for x in (query, key, value))
        # Right padding and causality: no token ever sees a pad, so no mask is needed.
        out = _sdpa(q, k, v, scaling=scaling, dropout=dropout, is_causal=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, group.cells_T))
        longest = group.prompt_mask_RL.shape[1]
        prefix.append((k[:, :, :longest], v[:, :, :longest]))
    store.prefix.setdefault(layer, prefix)
    return torch.cat(outputs)


def _attend_step(
    store: LatentKV, step: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float
) -> Tensor:
    query, key, value = (x.transpose(0, 1)[:, :, None] for x in (query, key, value))  # (rows, heads, 1, head)
    store.soft.setdefault((layer, step), (key, value))
    earlier = [store.soft[layer, j] for j in range(1, step)] + [(key, value)]
    outputs = []
    for group, (prefix_key, prefix_value) in zip(store.groups, store.prefix[layer], strict=True):
        k = torch.cat([prefix_key, *(kv[0][group.rows] for kv in earlier)], 2)
        v = torch.cat([prefix_value, *(kv[1][group.rows] for kv in earlier)], 2)
        mask = F.pad(group.prompt_mask_RL, (0, step), value=True)[:, None, None]
        outputs.append(_sdpa(query[group.rows], k, v, scaling=scaling, dropout=dropout, attn_mask=mask))
    return torch.cat(outputs)[:, :, 0]


def _pad(x: Tensor, group: RowGroup) -> Tensor:
    """(heads, tokens, head) -> (rows, heads, longest, head), zeros where a row is shorter."""
    heads, _, head = x.shape
    rows, longest = group.shape
    grid = x.new_zeros(rows * longest, heads, head).index_copy(0, group.cells_T, x.transpose(0, 1))
    return grid.view(rows, longest, heads, head).transpose(1, 2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float, **mask: object) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=grouped,
        **mask,  # type: ignore[arg-type]
    )


AttentionInterface.register(NAME, packed_attention)
# The layout above replaces transformers' masks: build none.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
