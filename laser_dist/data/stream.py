"""The order of training, and reading it: which example comes when, on which rank, in which loader process.

Position g = 0, 1, 2, ... counts examples over all epochs. Which example a position holds depends on seed and epoch
only; ranks and workers merely decide who takes which positions. So every W sees the same sequence, every rank has
equally many queries at every step, and a run resumes at any micro-batch without replaying.
"""

import itertools
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from laser_dist.batch import Example, Passage
from laser_dist.data.schema import decode_example, passage_key
from laser_dist.data.shards import Manifest, load_manifest, read_shard
from laser_dist.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Order:
    """The infinite order of examples, as a pure function.

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
            shards = _rng(self.seed, epoch, 0).permutation(shards)
        return [shards[i : i + self.shuffle_shards] for i in range(0, len(shards), self.shuffle_shards)]

    def window(self, epoch: int, number: int) -> np.ndarray:
        """The example index at each position of one window."""
        shards = self.windows(epoch)[number]
        indexes = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        # number + 1: a trailing 0 does not change a SeedSequence, so (seed, epoch) and (seed, epoch, 0) are one stream.
        return _rng(self.seed, epoch, number + 1).permutation(indexes) if self.shuffle else indexes

    def window_starts(self, epoch: int) -> np.ndarray:
        """(windows + 1,) int64 - position within the epoch at which each window begins."""
        return np.cumsum([0, *(sum(self.sizes[s] for s in shards) for shards in self.windows(epoch))])


@dataclass(frozen=True)
class Microbatch:
    """What one rank reads for one forward."""

    index: int  # micro-batch m of the run, from 0; resume with start_batch = m + 1
    epoch: float  # passes over the data before this micro-batch, all ranks counted
    items: list[tuple[int, Example]]  # B pairs (position, example), positions m*Q + r*B and following


class ExampleStream(IterableDataset):
    """Micro-batches start_batch .. total_batches - 1 of one rank; give it to `DataLoader(stream, batch_size=None)`.

    With k workers, worker w takes every k-th micro-batch, which is the order in which DataLoader asks. Reads only
    shards that hold rows of its own, and keeps one window of own rows. UserError: a shard is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int,
        queries_per_rank: int,
        total_batches: int,
        start_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        shuffle_shards: int = 16,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        self.order = Order(tuple(s.examples for s in self.manifest.shards), seed, shuffle, shuffle_shards)
        self.queries_per_rank, self.rank, self.world_size = queries_per_rank, rank, world_size
        self.start_batch, self.total_batches = start_batch, total_batches

    def __iter__(self) -> Iterator[Microbatch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = range(self.start_batch + first, self.total_batches, stride)
        items = self._read(itertools.chain.from_iterable(map(self._positions, batches)))
        queries = self.queries_per_rank * self.world_size
        for index in batches:
            own = list(itertools.islice(items, self.queries_per_rank))
            yield Microbatch(index, index * queries / self.order.examples, own)

    def _positions(self, batch: int) -> range:
        first = (batch * self.world_size + self.rank) * self.queries_per_rank
        return range(first, first + self.queries_per_rank)

    def _read(self, positions: Iterable[int]) -> Iterator[tuple[int, Example]]:
        """(position, example) for ascending positions, one window at a time."""
        window_starts = lru_cache(maxsize=2)(self.order.window_starts)

        def window_of(position: int) -> tuple[int, int]:
            epoch, offset = divmod(position, self.order.examples)
            return epoch, int(np.searchsorted(window_starts(epoch), offset, side="right")) - 1

        for (epoch, number), group in itertools.groupby(positions, window_of):
            first = epoch * self.order.examples + int(window_starts(epoch)[number])
            own = list(group)
            indexes = self.order.window(epoch, number)[np.array(own) - first]
            rows = self._read_rows(indexes)
            for position, index in zip(own, indexes.tolist(), strict=True):
                yield position, decode_example(*rows.pop(index))

    def _read_rows(self, indexes: np.ndarray) -> dict[int, tuple[bytes, str]]:
        """index -> (JSON text, where), reading each shard that holds one of `indexes` once."""
        rows, starts = {}, self.order.starts
        numbers = np.searchsorted(starts, indexes, side="right") - 1
        for number in np.unique(numbers):
            shard = self.manifest.shards[number]
            texts = read_shard(self.folder, shard)
            for index in indexes[numbers == number].tolist():
                row = index - int(starts[number])
                rows[index] = texts[row], f"{self.folder / shard.name}:{row + 1}"
        return rows


def draw_passages(example: Example, negatives: int, rng_key: tuple[int, int]) -> tuple[Passage, ...]:
    """One positive and then `negatives` negatives of an example, drawn at random.

    `rng_key` is (seed, position): with the query id it fixes the draw, whichever rank or worker makes it. A query
    with fewer negatives than asked for reuses them in turn; with none at all it is a UserError.
    """
    rng = _rng(*rng_key, passage_key(example.query_id))
    positive = example.positives[rng.integers(len(example.positives))]
    if negatives == 0:
        return (positive,)
    if not example.negatives:
        raise UserError(
            f'query "{example.query_id}" has no negatives, but data.negatives = {negatives}: '
            "add hard negatives to the source and prepare it again, or train with --data.negatives 0"
        )
    order = rng.permutation(len(example.negatives))
    return positive, *(example.negatives[order[i % len(order)]] for i in range(negatives))


def check_enough(manifest: Manifest, queries_per_step: int) -> None:
    """UserError if the set is smaller than one global batch (queries_per_step = B * W * accumulation)."""
    if manifest.examples < queries_per_step:
        raise UserError(
            f"the training set has {manifest.examples} examples, but one optimizer step takes {queries_per_step} "
            "(queries_per_rank x ranks x accumulation): lower --train.queries-per-rank or --train.accumulation, "
            "use fewer ranks, or prepare more data"
        )


def plain_errors(loader: Iterable[T]) -> Generator[T, None, None]:
    """The items of a DataLoader; a UserError raised in a worker comes out as itself, not as a quoted traceback."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).rpartition("laser_dist.errors.UserError: ")[2].rstrip()) from error


def _rng(*key: int) -> np.random.Generator:
    # SeedSequence takes no negative numbers.
    return np.random.default_rng(np.random.SeedSequence([k % 2**64 for k in key]))
