"""Counters that a step runs inside: what autograd saves, what collectives carry, which bytes are alive, FLOPs."""

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class saving(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801 - a context manager, as its base
    """Inside, what autograd saves is counted into `found`, storage by storage, without the parameters themselves."""

    def __init__(self, found: dict[int, int], parameters: Iterable[Tensor]):
        own = {p.untyped_storage()._cdata for p in parameters}

        def packed(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and not isinstance(tensor, torch.nn.Parameter):
                found[storage._cdata] = storage.nbytes()
            return tensor

        super().__init__(packed, lambda tensor: tensor)


def _attention_flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    rows, heads, length, head = query
    return 4 * rows * heads * length * int(key[2]) * head


def _attention_backward_flops(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    return _attention_flops(query, key) * 5 // 2


# torch counts attention on GPUs only. Like there, a causal square counts whole.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}

# Operator -> which of its arguments is the whole tensor: what all ranks send together, or each gets.
_WHOLE = {
    "allreduce_": 0,
    "_allgather_base_": 0,
    "allgather_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "reduce_": 0,
    "broadcast_": 0,
    "alltoall_base_": 1,
    "alltoall_": 1,
}


class Collectives(TorchDispatchMode):
    """Bytes and calls of each collective inside, gathered by name; seen below every library's own wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            kind = name.removeprefix("c10d::")
            if kind in _WHOLE:
                whole = torch.utils._pytree.tree_leaves(args[_WHOLE[kind]])
                size = sum(x.numel() * x.element_size() for x in whole if isinstance(x, Tensor))
                kind += _of_some(args)
                self.bytes[kind] = self.bytes.get(kind, 0) + size
                self.calls[kind] = self.calls.get(kind, 0) + 1
        return func(*args, **(kwargs or {}))


def _of_some(args: Any) -> str:
    """What a collective's name gets: nothing if all ranks take part, ' of 2' if two of more do."""
    for arg in args:
        try:
            size = torch.distributed.ProcessGroup.unbox(arg).size()
        except (TypeError, RuntimeError):
            continue
        return "" if size == torch.distributed.get_world_size() else f" of {size}"
    return ""


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages, those of `live` at the start included, and their peak: no allocator rounds them."""

    def __init__(self, live: list[Tensor]) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self.now = self.peak = 0
        self._add(live)

    def _add(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = weakref.ref(storage, self._remove(storage._cdata, storage.nbytes()))
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> Callable[[Any], None]:
        def remove(_: Any) -> None:
            del self.known[key]
            self.now -= size

        return remove

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._add(torch.utils._pytree.tree_leaves(result))
        return result


def all_tensors() -> list[Tensor]:
    """Every tensor that Python knows of."""
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, Tensor) and x.device.type != "meta"]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Storage -> bytes of these tensors, each storage once."""
    found = (x.untyped_storage() for x in tensors if x.device.type != "meta")
    return {storage._cdata: storage.nbytes() for storage in found}
