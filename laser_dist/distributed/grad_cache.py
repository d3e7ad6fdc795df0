"""GradCache: the exact gradient of a large batch in the memory of a small one (Gao et al. 2021, arXiv:2101.06983).

1. Every chunk of rows runs without a graph; its vectors and states are kept, nothing else.
2. The loss of the whole batch gives the gradient of each of them (collectives included: once per micro-batch).
3. Every chunk runs again, with a graph and with the random numbers of its first run, and passes its gradients on.

A batch that fits into one chunk runs once, with its graph: the same calls, and no cost.
"""

import torch
from torch import Tensor

from laser_dist.batch import PackedBatch, Views
from laser_dist.chunks import split_rows
from laser_dist.distributed.engine import Engine
from laser_dist.distributed.rng import rng_state, set_rng_state


class GradCache:
    """Forward and backward of one micro-batch at a time through the engine, in as many chunks as asked for."""

    def __init__(self, engine: Engine, *, always: bool = False):
        """`always`: run twice also what fits into one chunk, so that no graph outlives its own chunk's turn."""
        self.engine = engine
        self.always = always

    def forward(self, batch: PackedBatch, chunks: int) -> Views:
        """The batch's views, ready for a loss. All ranks must ask for equally many chunks."""
        self.batch = batch
        self.states: list[dict[str, Tensor]] = []
        rows = [torch.tensor(chunk) for chunk in split_rows(batch.lengths_R.tolist(), chunks)]
        self.chunks = [chunk.to(batch.lengths_R.device) for chunk in rows]
        if chunks == 1 and not self.always:
            self.views = self.engine(batch)
            return self.views
        parts = []
        with torch.no_grad():
            for chunk in self.chunks:
                self.states.append(rng_state(self.engine.device))
                parts.append(self.engine(batch.select(chunk)))
        self.views = _join(parts, self.chunks, batch.queries)
        return self.views

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of a loss of these views to the parameters'; `last` of those that the step averages."""
        if not self.states:
            self.engine.backward(loss, last=last)
            return
        leaves = [x for x in self.views if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
        self.pass_on([next(found) if x is not None and x.requires_grad else None for x in self.views], last=last)

    def pass_on(self, gradients: list[Tensor | None], *, last: bool = True) -> None:
        """Run the chunks again with these gradients of the fields of their views (None: it has none)."""
        for number, (chunk, state) in enumerate(zip(self.chunks, self.states, strict=True), start=1):
            set_rng_state(state, self.engine.device)
            views = self.engine(self.batch.select(chunk))
            vectors = views.query_BD
            places = _places(chunk, self.batch.queries)
            pairs = [
                (x, g[at]) for x, g, at in zip(views, gradients, places, strict=True) if x is not None and g is not None
            ]
            # Its value says nothing; its gradient is the loss's.
            surrogate = torch.stack([(x * g).sum(dtype=vectors.dtype) for x, g in pairs]).sum()
            self.engine.backward(surrogate, last=last and number == len(self.chunks))


def _places(chunk: Tensor, queries: int) -> Views:
    """For each field of Views, where a chunk's rows lie in the whole batch's."""
    of_queries, of_passages = chunk[chunk < queries], chunk[chunk >= queries] - queries
    return Views(of_queries, of_passages, of_queries, of_queries, of_queries, chunk, chunk, of_passages)


def _join(parts: list[Views], chunks: list[Tensor], queries: int) -> Views:
    """The chunks' views in the batch's order, as leaves that take gradients."""
    places = [_places(chunk, queries) for chunk in chunks]
    joined: dict[str, Tensor | None] = {}
    for field in (name for name in Views._fields if name != "soft_token_entropy"):  # a mean, and no rows
        found = [(getattr(part, field), getattr(at, field)) for part, at in zip(parts, places, strict=True)]
        kept = [(x, at) for x, at in found if x is not None]
        if not kept:
            joined[field] = None
            continue
        order = torch.cat([at for _, at in kept]).argsort()
        joined[field] = torch.cat([x for x, _ in kept])[order].requires_grad_(field != "row_norms_R")
    rows = sum(map(len, chunks))
    entropy = torch.stack(
        [part.soft_token_entropy * len(chunk) / rows for part, chunk in zip(parts, chunks, strict=True)]
    )
    return Views(**joined, soft_token_entropy=entropy.sum())  # type: ignore[arg-type]  # queries and passages are there
