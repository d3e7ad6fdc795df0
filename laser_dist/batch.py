"""The values that flow, and the legend of axis letters that names carry everywhere (`scores_BN`, `thoughts_BKD`).

B queries per rank · G passages per query, the first is the positive · P = B·G passages per rank · R = B + P rows
W ranks · Q = W·B · N = Q·G passages in the softmax · T packed tokens · D hidden size · V vocabulary
K latent steps · M segments of a rationale

One batch, from shard to gradient: Example (data/schema) -> PackedBatch (data/text) -> Views (model/retriever)
-> LossTerms (objective) -> backward and step (distributed/engine).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSequence:
    """One row: a prompt the model thinks after, and, for a training query, the rationale that follows it."""

    prompt: list[int]
    # Rationale tokens without EOS, and for each segment the index of its last token among them.
    rationale: list[int] | None = None
    segment_ends: list[int] | None = None


@dataclass(frozen=True)
class PackedBatch:
    """R rows packed end to end without padding: B queries first, then P passages; see `pack`."""

    tokens_T: Tensor  # (T,) int64 - token ids of all rows
    positions_T: Tensor  # (T,) int64 - position within the row, from 0
    lengths_R: Tensor  # (R,) int64 - tokens per row, rationale and EOS included
    prompt_lengths_R: Tensor  # (R,) int64 - tokens of the latent view's prefix
    queries: int  # B; 0 when all rows are encoded alike and nothing is compared
    segment_ends_BM: Tensor | None = None  # (B, M) int64 - index into T of each segment's last token; last repeats
    segments_B: Tensor | None = None  # (B,) int64 - segments per rationale
    labels_B: Tensor | None = None  # (B,) int64 - row among this rank's P passages that holds the positive
    positive_keys_BX: Tensor | None = None  # (B, X) int64 - keys of all positives of the query; the first repeats
    passage_keys_P: Tensor | None = None  # (P,) int64 - key of each passage: equal keys, same title and text
    query_ids: tuple[str, ...] = ()

    @property
    def has_rationale(self) -> bool:
        return self.segments_B is not None

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def select(self, rows_C: Tensor) -> "PackedBatch":
        """A batch of some rows (ascending indexes into R) to encode; what compares rows (labels, keys) stays behind."""
        starts_R = self.lengths_R.cumsum(0) - self.lengths_R
        lengths_C = self.lengths_R[rows_C]
        moved_C = starts_R[rows_C] - (lengths_C.cumsum(0) - lengths_C)
        kept_T = torch.repeat_interleave(moved_C, lengths_C)
        kept_T += torch.arange(len(kept_T), device=kept_T.device)
        queries_C = rows_C[rows_C < self.queries]
        segments: dict[str, Any] = {}
        if self.segment_ends_BM is not None and self.segments_B is not None and len(queries_C):
            moved_CM = moved_C[: len(queries_C), None]
            segments["segment_ends_BM"] = self.segment_ends_BM[queries_C] - moved_CM
            segments["segments_B"] = self.segments_B[queries_C]
        return PackedBatch(
            tokens_T=self.tokens_T[kept_T],
            positions_T=self.positions_T[kept_T],
            lengths_R=lengths_C,
            prompt_lengths_R=self.prompt_lengths_R[rows_C],
            queries=len(queries_C),
            **segments,
        )


class Views(NamedTuple):
    """What the model makes of a batch. Vectors have unit length, states do not; None where there is no rationale.

    A tuple, because ZeRO-3 looks for the tensors in a module's output and does not look inside other objects.
    """

    query_BD: Tensor
    passage_PD: Tensor
    query_steps_BKD: Tensor
    teacher_BD: Tensor | None
    segments_BKD: Tensor | None  # the segment state that each step is aligned with
    soft_token_entropy: Tensor  # scalar, nats; 0 when K = 1 needs no soft token
    row_norms_R: Tensor | None = None  # (R,) - the shortest vector of a row before it gets unit length; no gradient
    passage_steps_PKD: Tensor | None = None  # where the objective compares steps


def pack(rows: Sequence[TokenSequence], eos: int | None = None, **comparison: Any) -> PackedBatch:
    """Pack rows end to end. Rows with a rationale become [prompt ; rationale ; eos] and must come first.

    `comparison` passes queries, labels_B, positive_keys_BX, passage_keys_P and query_ids through.
    """
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    ends: list[list[int]] = []
    for row in rows:
        ids = list(row.prompt)
        if row.rationale is not None:
            if eos is None:
                raise ValueError("rows with a rationale end with EOS: give its id")
            ends.append([len(tokens) + len(ids) + end for end in row.segment_ends or []])
            ids += [*row.rationale, eos]
        tokens += ids
        positions += range(len(ids))
        lengths.append(len(ids))
    segments: dict[str, Tensor] = {}
    if ends:
        most = max(map(len, ends))
        segments["segment_ends_BM"] = torch.tensor([e + e[-1:] * (most - len(e)) for e in ends])
        segments["segments_B"] = torch.tensor([len(e) for e in ends])
    return PackedBatch(
        # Through numpy, which reads a list of ints seven times faster.
        tokens_T=torch.from_numpy(np.array(tokens, dtype=np.int64)),
        positions_T=torch.from_numpy(np.array(positions, dtype=np.int64)),
        lengths_R=torch.tensor(lengths),
        prompt_lengths_R=torch.tensor([len(row.prompt) for row in rows]),
        **{"queries": 0, **segments, **comparison},
    )
