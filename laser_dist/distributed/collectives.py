"""Collectives of the objective. All are the identity in a single process; all ranks must call them alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from laser_dist.observability.spans import span

T = TypeVar("T")

# torch 2.13 renames the two and warns at every call of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_rows(rows: Tensor) -> Tensor:
    """(P, ...) on each rank -> (W*P, ...) on every rank, in rank order, without gradient. P is equal on all ranks."""
    if world_size() == 1:
        return rows
    gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    with span("gather"):
        _all_gather(gathered, rows.detach().contiguous())
    _count_received(rows)
    return gathered


def gather_rows_with_gradient(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`gather_rows` in `dtype`, whose backward sums each row's gradient over all ranks (SUM reduce-scatter).

    The sum is taken in the dtype of `rows`: bfloat16 would round once per rank.
    """
    return _GatherRows.apply(rows, dtype) if world_size() > 1 else rows.to(dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = rows.dtype
        return gather_rows(rows.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(len(gradient) // world_size(), *gradient.shape[1:], dtype=ctx.dtype)
        with span("gather's backward"):
            _reduce_scatter(own, gradient.to(ctx.dtype).contiguous(), op=dist.ReduceOp.SUM)
        _count_received(own)
        return own, None


class Ranks:
    """The ranks of the process group, as the objective meets them."""

    @property
    def own(self) -> int:
        """This one's number, from 0."""
        return rank()

    @property
    def count(self) -> int:
        """W."""
        return world_size()

    def gather_rows(self, rows: Tensor) -> Tensor:
        return gather_rows(rows)

    def gather_rows_with_gradient(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return gather_rows_with_gradient(rows, dtype)


_received = 0


def _count_received(rows: Tensor) -> None:
    """Count a rank's rows, or as many of its peers' gradients, from each of its peers."""
    global _received
    _received += (world_size() - 1) * rows.nbytes


def bytes_received() -> int:
    """Bytes that this rank received in `gather_rows` and its gradient, and in tables, since the last call."""
    global _received
    received, _received = _received, 0
    return received


@contextmanager
def uncounted() -> Iterator[None]:
    """Around what belongs to no step: `bytes_received` does not count it."""
    global _received
    before = _received
    try:
        yield
    finally:
        _received = before


def gather_table(values: dict[str, float]) -> list[dict[str, float]]:
    """Every rank's values, as one dict per rank."""
    rows = gather_rows(torch.tensor([list(values.values())], dtype=torch.float64, device=_device()))
    return [dict(zip(values, row, strict=True)) for row in rows.tolist()]


def gather_scalars(values: dict[str, Tensor], known: dict[str, float]) -> list[dict[str, float]]:
    """`gather_table` of scalars on this rank's device and of numbers that the host knows; synchronises once.

    All are exact as float64, whole numbers up to 2^53.
    """
    host = torch.tensor(list(known.values()), dtype=torch.float64).to(_device(), non_blocking=True)
    own = torch.cat([torch.stack([x.detach().to(_device(), torch.float64) for x in values.values()]), host])
    names = [*values, *known]
    return [dict(zip(names, row, strict=True)) for row in gather_rows(own[None]).tolist()]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order; slow, for rare occasions."""
    everyone: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def merge_rows(rows: np.ndarray) -> np.ndarray:
    """(n, D) on each rank, each row computed on at least one and zero elsewhere -> all rows on every rank."""
    table = torch.from_numpy(rows).to(_device())
    # A row that two ranks computed must not count twice, as it would in a sum.
    largest, smallest = table.clone(), table.clone()
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return torch.where(largest > 0, largest, smallest).cpu().numpy()


def _device() -> torch.device:
    nccl = dist.is_initialized() and "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
