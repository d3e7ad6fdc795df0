"""Packed attention with latent steps on any device and in any dtype: rows are padded, inside the attention only.

On a CPU a block mask over all packed tokens would cost T squared and double the step. Queries carry their rationale and
are longer than passages; padded apart, less is wasted.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_dist.batch import PackedBatch
from laser_dist.model.latent_kv import LatentKV


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows that are padded together."""

    rows: slice
    tokens: slice  # of T
    shape: tuple[int, int]  # (rows, longest)
    cells_T: Tensor  # where each of the group's tokens lies in the flattened (rows, longest) grid
    prompt_mask_RL: Tensor  # True where a cell holds a prompt token; L is the longest prompt


class PaddedKV(LatentKV):
    """See `LatentKV`; the prefix is K, V (kv heads, rows, L, head) of each group."""

    def __init__(self, batch: PackedBatch):
        super().__init__(batch)
        rows = len(batch.lengths_R)
        borders = sorted({0, batch.queries, rows})
        first_token_R = F.pad(batch.lengths_R.cumsum(0), (1, 0))
        self.groups = [
            _row_group(batch, slice(a, b), first_token_R) for a, b in zip(borders, borders[1:], strict=False)
        ]

    def attend_prefix(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float
    ) -> Tensor:
        outputs, prefix = [], []
        for group in self.groups:
            q, k, v = (_pad(x[:, group.tokens], group) for x in (query, key, value))
            # Right padding and causality: no token ever sees a pad, so no mask is needed.
            out = F.scaled_dot_product_attention(
                q.transpose(0, 1),
                k.transpose(0, 1),
                v.transpose(0, 1),
                scale=scaling,
                dropout_p=dropout,
                is_causal=True,
                enable_gqa=len(q) != len(k),
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, group.cells_T))
            longest = group.prompt_mask_RL.shape[1]
            prefix.append((k[:, :, :longest], v[:, :, :longest]))
        self.prefix.setdefault(layer, prefix)
        return torch.cat(outputs)

    def attend_step(
        self, step: int, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float
    ) -> Tensor:
        soft_key, soft_value = self.soft_so_far(step, layer, key, value)
        query = query.unflatten(0, (len(key), -1)).transpose(1, 2)  # (kv heads, R, queries, head)
        outputs = []
        for group, (prefix_key, prefix_value) in zip(self.groups, self.prefix[layer], strict=True):
            q, soft_k, soft_v = query[:, group.rows], soft_key[:, group.rows], soft_value[:, group.rows]
            # Scores are joined, not keys: the prefix is not copied at each step.
            of_prefix = (q @ prefix_key.mT).masked_fill(~group.prompt_mask_RL[None, :, None], -torch.inf)
            scores = torch.cat([of_prefix, q @ soft_k.mT], -1) * scaling
            weights = F.dropout(torch.softmax(scores, -1, dtype=_precise(scores)).to(q.dtype), dropout)
            of_prefix, of_soft = weights.split([prefix_key.shape[2], step], -1)
            outputs.append(of_prefix @ prefix_value + of_soft @ soft_v)
        return torch.cat(outputs, 1).transpose(1, 2).flatten(0, 1).transpose(0, 1)


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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


def _pad(x: Tensor, group: RowGroup) -> Tensor:
    """(heads, tokens, head) -> (heads, rows, longest, head), zeros where a row is shorter."""
    rows, longest = group.shape
    grid = x.new_zeros(len(x), rows * longest, x.shape[2]).index_copy(1, group.cells_T, x)
    return grid.unflatten(1, (rows, longest))
