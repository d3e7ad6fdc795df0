"""The order of training as pure functions: which example stands at which position.

Position g = 0, 1, 2, ... counts examples over the whole run. `Mixture` says which set position g is drawn from and
which position of that set's own endless order it is; `Order` says which example stands there. Both depend on the seed
only, and any place in them is found without the ones before it.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np

from laser_dist.errors import UserError

_BLOCK = 1024  # least stretches in a block of a mixture
_FINEST = 2**20  # most stretches in a block: a block is permuted as a whole


@dataclass(frozen=True)
class Order:
    """The infinite order of the examples of one set.

    Each epoch permutes the shards and takes them in windows of `shuffle_shards`; each window permutes its examples.
    That is as random as the windows are large, and needs one window in memory. Without shuffle: the file order.
    """

    sizes: tuple[int, ...]  # examples per shard
    seed: int
    shuffle: bool = True
    shuffle_shards: int = 16

    @cached_property
    def starts(self) -> np.ndarray:
        """(shards + 1,) int64 - index of each shard's first example, and last their number."""
        return np.cumsum([0, *self.sizes])

    @property
    def examples(self) -> int:
        return int(self.starts[-1])

    def epoch(self, epoch: int) -> np.ndarray:
        """(examples,) int64 - the example index at each position of an epoch."""
        return np.concatenate([self.window(epoch, number) for number in range(len(self.windows(epoch)))])

    def windows(self, epoch: int) -> list[np.ndarray]:
        """The shard numbers of each window of an epoch."""
        shards = np.arange(len(self.sizes))
        if self.shuffle:
            shards = generator(self.seed, epoch, 0).permutation(shards)
        return [shards[i : i + self.shuffle_shards] for i in range(0, len(shards), self.shuffle_shards)]

    def window(self, epoch: int, number: int) -> np.ndarray:
        """The example index at each position of one window."""
        shards = self.windows(epoch)[number]
        indexes = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        # number + 1: a trailing 0 does not change a SeedSequence, so (seed, epoch) and (seed, epoch, 0) are one stream.
        return generator(self.seed, epoch, number + 1).permutation(indexes) if self.shuffle else indexes

    def window_starts(self, epoch: int) -> np.ndarray:
        """(windows + 1,) int64 - position within the epoch at which each window begins."""
        sizes = np.diff(self.starts)
        return np.cumsum([0, *(sizes[shards].sum() for shards in self.windows(epoch))])


@dataclass(frozen=True)
class Mixture:
    """Which set each position is drawn from.

    Positions come in stretches of `stretch` examples of one set (1, or the size of a homogeneous batch), stretches in
    blocks. Every block holds every set exactly in proportion to its weight, in an order drawn from the seed. A set's
    own positions are used in turn, so each of its examples comes once before any comes again.
    """

    weights: tuple[float | Fraction, ...]
    seed: int
    stretch: int = 1

    @cached_property
    def quotas(self) -> tuple[int, ...]:
        """Stretches of each set in a block. UserError: the weights are too finely graded."""
        fractions = [Fraction(str(weight)) for weight in self.weights]
        denominator = math.lcm(*(f.denominator for f in fractions))
        parts = [int(f * denominator) for f in fractions]
        parts = [part // math.gcd(*parts) for part in parts]
        if sum(parts) > _FINEST:
            raise UserError(
                f"data.mix: the weights {', '.join(map(str, self.weights))} are in the proportion "
                f"{' : '.join(map(str, parts))}, which needs blocks of {sum(parts):,}: round them"
            )
        times = -(-_BLOCK // sum(parts))
        return tuple(part * times for part in parts)

    def place(self, position: int) -> tuple[int, int]:
        """The set that `position` is drawn from, and which position of that set's own order it is."""
        block, place = divmod(position // self.stretch, sum(self.quotas))
        which = int(self._block(block)[place])
        return which, self.before(which, position)

    def before(self, which: int, position: int) -> int:
        """How many examples of set `which` stand before `position`."""
        stretch, offset = divmod(position, self.stretch)
        block, place = divmod(stretch, sum(self.quotas))
        sets = self._block(block)
        stretches = block * self.quotas[which] + int(np.count_nonzero(sets[:place] == which))
        return stretches * self.stretch + (offset if sets[place] == which else 0)

    def positions(self, which: int, first: int, last: int, end: int) -> np.ndarray:
        """(n,) int64 - positions below `end` that hold the examples first .. last - 1 of set `which`, ascending."""
        length, per_block = sum(self.quotas), self.quotas[which] * self.stretch
        found = [np.empty(0, dtype=np.int64)]
        for block in range(first // per_block, -(-last // per_block)):
            if block * length * self.stretch >= end:
                break
            starts = (block * length + np.flatnonzero(self._block(block) == which)) * self.stretch
            found.append((starts[:, None] + np.arange(self.stretch)).ravel())
        skipped = first % per_block
        positions = np.concatenate(found)[skipped : skipped + last - first]
        return positions[positions < end]

    def _block(self, block: int) -> np.ndarray:
        """The set of each stretch of a block."""
        return _shuffled(self.quotas, self.seed, block)


@lru_cache(maxsize=16)
def _shuffled(quotas: tuple[int, ...], seed: int, block: int) -> np.ndarray:
    sets = np.repeat(np.arange(len(quotas)), quotas)
    # The last part of the key keeps this stream apart from those of Order.
    return generator(seed, block, 2**63).permutation(sets) if len(quotas) > 1 else sets


def generator(*key: int) -> np.random.Generator:
    """A random generator that depends on `key` alone; negative numbers are allowed."""
    return np.random.default_rng(np.random.SeedSequence([k % 2**64 for k in key]))
