"""A frozen teacher: what LaSER's co-learning is compared with.

It has a space of its own, so its query vectors are compared with its own passage vectors. Rows twice as wide do that in
the same kernels: [v, 0] . [d, d*] is the student's score, [0, v*] . [d, d*] the teacher's.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from laser_dist.batch import PackedBatch, Views
from laser_dist.chunks import chunks_needed, split_rows
from laser_dist.model.retriever import LaserRetriever, unit
from laser_dist.model.thinking import aligned_segments


@dataclass(frozen=True)
class Taught:
    """What the teacher makes of a batch, with D its own hidden size; without gradient."""

    teacher_BD: Tensor
    segments_BKD: Tensor  # K: the student's steps
    passage_PD: Tensor


class FrozenTeacher:
    """A trained retriever, whole on every rank, that reads [query ; rationale ; EOS] and thinks about passages."""

    def __init__(self, retriever: LaserRetriever, *, steps: int, convention: str, chunk_tokens: int = 0):
        """`steps` and `convention` are the student's; `chunk_tokens` bounds a forward, 0 runs the batch at once."""
        self.retriever = retriever.eval().requires_grad_(False)
        self.steps = steps
        self.convention = convention
        self.chunk_tokens = chunk_tokens

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> Taught:
        """Its explicit view of B queries and its vectors of P passages. Nothing waits for other ranks."""
        lengths = batch.lengths_R.tolist()
        count = chunks_needed(lengths, self.chunk_tokens) if self.chunk_tokens else 1
        rows = [torch.tensor(chunk, device=batch.lengths_R.device) for chunk in split_rows(lengths, count)]
        parts = [self._read(batch if count == 1 else batch.select(chunk)) for chunk in rows]
        queries = torch.cat([chunk[chunk < batch.queries] for chunk in rows]).argsort()
        passages = torch.cat([chunk[chunk >= batch.queries] for chunk in rows]).argsort()
        teacher, segments, passage = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Taught(teacher[queries], segments[queries], passage[passages])

    def _read(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        hidden_TD, thoughts_RKD, _ = self.retriever.think(batch)
        b, wide = batch.queries, hidden_TD.shape[1]
        teacher_BD, segments_BKD = hidden_TD.new_zeros(0, wide), hidden_TD.new_zeros(0, self.steps, wide)
        if batch.segments_B is not None and batch.segment_ends_BM is not None:  # a chunk may hold no query
            teacher_BD = hidden_TD[batch.lengths_R.cumsum(0)[:b] - 1]
            segment_BK = aligned_segments(batch.segments_B, self.steps, self.convention)
            segments_BKD = hidden_TD[batch.segment_ends_BM.gather(1, segment_BK)]
        return unit(teacher_BD), segments_BKD, unit(thoughts_RKD[b:].mean(1))


def beside(views: Views, taught: Taught) -> Views:
    """Views in rows of both spaces: the student's parts first, the teacher's behind, zeros in the other's place."""
    ours, theirs = views.query_BD.shape[1], taught.passage_PD.shape[1]
    return views._replace(
        query_BD=F.pad(views.query_BD, (0, theirs)),
        passage_PD=torch.cat([views.passage_PD, taught.passage_PD.to(views.passage_PD.dtype)], 1),
        query_steps_BKD=F.pad(views.query_steps_BKD, (0, theirs)),
        teacher_BD=F.pad(taught.teacher_BD.to(views.query_BD.dtype), (ours, 0)),
        segments_BKD=F.pad(taught.segments_BKD.to(views.query_steps_BKD.dtype), (ours, 0)),
    )
