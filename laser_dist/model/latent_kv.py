"""What the two ways to compute packed attention (padded.py, varlen.py) share: the K/V that later steps read."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from laser_dist.batch import PackedBatch


class LatentKV(ABC):
    """The layout of one packed batch and the K/V that later steps read; lives for one forward and its backward."""

    def __init__(self, batch: PackedBatch):
        self.longest = int(batch.lengths_R.max())
        """Tokens of the longest row."""
        self.prefix: dict[int, Any] = {}  # layer -> its prompts' K and V, laid out as the subclass reads them
        self.soft: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (layer, step) -> K, V (kv heads, R, head)

    @property
    def layers(self) -> int:
        """How many have stored their prefix."""
        return len(self.prefix)

    @abstractmethod
    def attend_prefix(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float
    ) -> Tensor:
        """Step 0: query (heads, T, head), key and value (kv heads, T, head) -> (T, heads, head)."""

    @abstractmethod
    def attend_step(
        self, step: int, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float
    ) -> Tensor:
        """Step > 0: the same with R soft tokens instead of T."""

    def soft_so_far(self, step: int, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a step's K and V (kv heads, R, head); those of all steps up to it, (kv heads, R, step, head)."""
        self.soft.setdefault((layer, step), (key, value))
        keys, values = zip(*[self.soft[layer, j] for j in range(1, step)], (key, value), strict=True)
        return torch.stack(keys, 2), torch.stack(values, 2)
