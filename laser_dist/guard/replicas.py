"""Whether what ranks hold in common is still the same, to the bit, and each rank's parameters still their master copy.

ZeRO-0 to 2: every parameter is whole on every rank, and those that LoRA freezes are never written again, so that an
error in one stays. Trained ones are overwritten from the master copies at each update: that is why the comparison comes
right before one. ZeRO-3: small parameters are whole everywhere; of the others a rank has a part that no other has, and
its float32 master beside it.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from laser_dist.distributed.collectives import gather_rows
from laser_dist.distributed.engine import Engine

BLOCK = 2**22
"""Elements looked at a time: sums of int32 take a copy in int64 on a CPU, and master copies are cast."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """What the ranks named do not hold as the others do."""

    ranks: tuple[int, ...]
    parameters: tuple[str, ...]
    """Names, or none if only a rank's own master copy differs."""
    certain: bool
    """False where as many ranks say the one as the other."""

    @property
    def reason(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        if not self.parameters:
            return f"parameters of rank {ranks} are not their float32 master copy"
        more = f" and {len(self.parameters) - 1} more" if len(self.parameters) > 1 else ""
        who = f"on rank {ranks} from all others" if self.certain else f"among ranks {ranks}, where none is the majority"
        return f"parameter {self.parameters[0]}{more} differs in its bits {who}"


def bit_sum(x: Tensor) -> Tensor:
    """() int64 - a sum of all elements' bits, blocks weighted by odd numbers: any one bit that flips changes it.

    Whole numbers add up to the same in any order, so that ranks can be compared.
    """
    bits = x.detach().reshape(-1).view(_INTEGERS[x.element_size()])
    sums = [(2 * i + 1) * block.sum(dtype=torch.int64) for i, block in enumerate(bits.split(BLOCK))]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64, device=x.device)


def compare_replicas(engine: Engine) -> Difference | None:
    """A collective: one gather of a number per parameter, and one for the rank's own part."""
    shared = engine.replicated()
    own = [int(_differs(low, master)) for low, master in engine.masters()]
    row = [bit_sum(x).to(engine.device) for x in shared.values()] + [torch.tensor(sum(own), device=engine.device)]
    table = gather_rows(torch.stack(row)[None]).tolist()
    if ranks := tuple(r for r, found in enumerate(table) if found[-1]):
        return Difference(ranks, (), True)
    return _difference(list(shared), [found[:-1] for found in table])


def _differs(low: Tensor, master: Tensor) -> bool:
    integers = _INTEGERS[low.element_size()]  # as numbers a NaN would differ from itself
    parts = zip(low.detach().reshape(-1).split(BLOCK), master.reshape(-1).split(BLOCK), strict=True)
    return any(not torch.equal(x.view(integers), y.to(x.dtype).to(x.device).view(integers)) for x, y in parts)


def _difference(names: list[str], table: list[list[int]]) -> Difference | None:
    """The ranks that the first parameter that differs is other on, and all parameters that differ."""
    columns = list(zip(*table, strict=True))
    broken = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if not broken:
        return None
    column = columns[broken[0]]
    (common, count), *_ = Counter(column).most_common()
    certain = 2 * count > len(column)
    ranks = tuple(r for r, value in enumerate(column) if value != common or not certain)
    return Difference(ranks, tuple(names[i] for i in broken), certain)
