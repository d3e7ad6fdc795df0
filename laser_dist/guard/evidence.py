"""What a rank knows of its micro-batch that the others must hear: a row of some 25 numbers, read at once.

It replaces the gather of the terms that looking for a NaN took, so that the guard costs no collective of its own.
"""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laser_dist.batch import PackedBatch, Views
from laser_dist.objective.alignment import LossTerms

WATCHED = ("query_BD", "teacher_BD", "query_steps_BKD", "passage_PD")
"""Fields of Views through which the loss reaches the model."""


@dataclass
class MicroBatch:
    """All that a replay needs of one micro-batch, and what came of it on this rank."""

    batch: PackedBatch
    chunks: int
    random_state: dict[str, Tensor]
    """Of the generators before the forward."""
    table: list[dict[str, float]] = field(default_factory=list)
    """What all ranks gathered."""
    row_norms_R: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Field of Views -> length of the loss's gradient per row."""

    def row_gradients(self) -> Tensor | None:
        """(R,) float64 on the CPU: length of the loss's gradient to a row's vector before it got unit length.

        An upper bound: the part along the vector is not taken off.
        """
        if self.row_norms_R is None or not self.gradients:
            return None
        found = {name: norms.double().cpu() ** 2 for name, norms in self.gradients.items()}
        rows, queries = len(self.row_norms_R), self.batch.queries
        none_B, none_P = torch.zeros(queries, dtype=torch.float64), torch.zeros(rows - queries, dtype=torch.float64)
        units_B = found.get("query_BD", none_B) + found.get("teacher_BD", none_B)
        squares_R = torch.cat([units_B, found.get("passage_PD", none_P)]) / self.row_norms_R.double().cpu() ** 2
        squares_R[:queries] += found.get("query_steps_BKD", none_B)  # states have their length yet
        return squares_R.sqrt()


def of_loss(loss: LossTerms) -> dict[str, Tensor]:
    """The values that a run reports anyway."""
    return {
        **{f"loss/{name}": value for name, value in loss.terms.items()},
        "loss/total": loss.total,
        **{f"train/{name}": value for name, value in loss.diagnostics.items()},
    }


def of_views(views: Views) -> dict[str, Tensor]:
    """How long the vectors were before they got unit length, and how far this rank's passages are apart."""
    assert views.row_norms_R is not None
    shortest, row = views.row_norms_R.min(0)
    passages_PD = views.passage_PD.detach()
    alone = len(passages_PD) == 1
    apart = (passages_PD - passages_PD.mean(0)).square().sum(1).mean()
    return {
        "shortest": shortest,
        "shortest_row": row,
        "typical": views.row_norms_R.median(),
        "spread": torch.ones_like(apart) if alone else apart,
    }


def of_batch(batch: PackedBatch, counts: dict[str, int]) -> dict[str, float]:
    """Which queries these are, as a number that does not depend on their order, and how many rationales are short."""
    digests = [hashlib.blake2b(name.encode(), digest_size=6).digest() for name in batch.query_ids]
    return {
        "queries": float(sum(int.from_bytes(digest) for digest in digests) % 2**48),
        "distinct": float(len(set(batch.query_ids))),
        "rationales": float(counts["rationales"]),
        "short_rationales": float(counts["fewer_segments_than_steps"]),
    }


def watch_gradients(views: Views, micro: MicroBatch) -> None:
    """Note the length of the loss's gradient to each vector when backward passes by; costs no synchronisation."""
    micro.row_norms_R = views.row_norms_R
    for name in WATCHED:
        vectors = getattr(views, name)
        if vectors is not None and vectors.requires_grad:
            vectors.register_hook(lambda gradient, name=name: _note(micro, name, gradient))


def _note(micro: MicroBatch, name: str, gradient: Tensor) -> None:
    micro.gradients[name] = row_lengths(gradient)


def row_lengths(x: Tensor) -> Tensor:
    """(rows, ...) -> (rows,)"""
    return torch.linalg.vector_norm(x.detach().flatten(1), dim=1)
