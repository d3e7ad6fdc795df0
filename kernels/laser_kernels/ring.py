"""Passages that stay where they are encoded: each rank's pass by all others in a ring, and their gradient comes home.

At hop h a rank works with the passages of rank (r - h) mod W. The next ones travel while it does. In backward their
gradient, float32 (float64), follows them one hop behind, each rank adding its share, and is home after W hops. Per rank
and sweep that is (W - 1) N/W D elements of passages, and W N/W D of gradient; memory is that of 2 ranks' passages and 2
gradients, whatever W.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from laser_kernels.pairs import Columns, precise


class Ring:
    """The ranks of a process group in their order; None is a ring of this process alone."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        own = 0 if group is None else dist.get_rank(group)
        self._to, self._from = ((own + step) % self.size for step in (1, -1))

    def columns(self, own: Columns) -> Iterator[Columns]:
        """This rank's passages and then those of every other rank; only the first hold a row's own positive."""
        held = own
        for hop in range(self.size):
            travelling = self._pass_on(held) if hop + 1 < self.size else None
            yield held
            held = self._next(held, travelling) if travelling else held

    def sweep_with_gradient(
        self, own: Columns, sweep: Callable[[Columns, Tensor | None], None], *, wanted: bool
    ) -> Tensor | None:
        """`sweep(columns, out)` at every hop, `out` to be filled with a gradient; returns that of this rank's own."""
        if not wanted:
            for held in self.columns(own):
                sweep(held, None)
            return None
        passages_ND = own.passages_ND
        if self.size == 1:
            gradient_ND = torch.empty_like(passages_ND, memory_format=torch.contiguous_format)
            sweep(own, gradient_ND)
            return gradient_ND
        arriving: _Travelling | None = None
        for held in self.columns(own):
            share_ND = torch.empty_like(held.passages_ND, dtype=precise(passages_ND.dtype))
            sweep(held, share_ND)
            if arriving:
                share_ND += arriving.wait()[0]
            arriving = self._send([share_ND])
        assert arriving is not None
        return arriving.wait()[0].to(passages_ND.dtype)

    def _pass_on(self, held: Columns) -> "_Travelling":
        return self._send([held.passages_ND.contiguous()] + ([] if held.ids_N is None else [held.ids_N.contiguous()]))

    def _next(self, held: Columns, travelling: "_Travelling") -> Columns:
        passages_ND, *ids = travelling.wait()
        return Columns(passages_ND, torch.full_like(held.labels_B, -1), ids[0] if ids else None, held.query_ids_BX)

    def _send(self, tensors: list[Tensor]) -> "_Travelling":
        received = [torch.empty_like(x) for x in tensors]
        operations = []
        for out, into in zip(tensors, received, strict=True):
            operations.append(dist.P2POp(dist.isend, out, group=self.group, group_peer=self._to))
            operations.append(dist.P2POp(dist.irecv, into, group=self.group, group_peer=self._from))
        return _Travelling(received, tensors, dist.batch_isend_irecv(operations))


class _Travelling:
    """Tensors on their way to the next rank, and those on their way here."""

    def __init__(self, received: list[Tensor], sent: list[Tensor], requests: list[dist.Work]):
        self._received, self._sent, self._requests = received, sent, requests

    def wait(self) -> list[Tensor]:
        for request in self._requests:
            request.wait()
        return self._received
