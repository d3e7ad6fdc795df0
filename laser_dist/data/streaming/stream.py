"""Reading training examples in order, on any rank, in any loader process, from any position.

order.py says which example stands at position g = 0, 1, 2, ... of the run; ranks and workers merely decide who takes
which positions. So every W sees the same sequence, every rank has equally many queries at every step, and a run
continues from any position, with other ranks, workers or batch sizes, by reading one window of shards per set.
"""

import heapq
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from laser_dist.data.schema import Example, Passage, decode_example, passage_key
from laser_dist.data.shards import read_members
from laser_dist.data.streaming.ahead import one_ahead
from laser_dist.data.streaming.order import Mixture, Order, generator
from laser_dist.data.streaming.quarantine import Defect, Quarantine
from laser_dist.data.streaming.sets import TrainingData, TrainingSet, open_folder
from laser_dist.data.streaming.store import CacheError
from laser_dist.errors import UserError
from laser_dist.reading import LONGEST_ROW

T = TypeVar("T")


@dataclass(frozen=True)
class Microbatch:
    """What one rank reads for one forward."""

    position: int  # of its first query, all ranks counted; whoever has used it continues at position + Q
    epoch: float  # passes over the data before this micro-batch, all ranks counted
    items: list[tuple[int, Example]]  # B pairs (position, example), positions position + r*B and following
    defects: tuple[Defect, ...] = ()  # met since the last micro-batch of this loader process


class Row(NamedTuple):
    """The undecoded text of one example."""

    shard: int  # number within its set
    member: str  # name within the shard
    text: bytes


class ExampleStream(IterableDataset):
    """`total_batches` micro-batches of one rank from position `start`; for `DataLoader(stream, batch_size=None)`.

    With k workers, worker w takes every k-th micro-batch, which is the order in which DataLoader asks. Reads only
    shards that hold rows of its own, and keeps two windows of own rows per set: the one in use and, read in the
    background, the next.

    A damaged shard or row is a UserError; with `max_skipped` (a share of all examples) it is skipped up to that share,
    reported in `Microbatch.defects`, and its position filled by another row of the window (see `_SetReader.stand_ins`).
    """

    def __init__(
        self,
        data: str | Path | TrainingData,
        *,
        seed: int,
        queries_per_rank: int,
        total_batches: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        shuffle_shards: int = 16,
        homogeneous: int = 0,
        max_skipped: float | None = None,
    ) -> None:
        self.data = data if isinstance(data, TrainingData) else open_folder(data)
        sets = self.data.sets
        self.orders = [Order(tuple(s.examples for s in part.shards), seed, shuffle, shuffle_shards) for part in sets]
        self.mixture = Mixture(tuple(part.weight for part in sets), seed, homogeneous or 1)
        self.queries_per_rank, self.rank, self.world_size = queries_per_rank, rank, world_size
        self.queries = queries_per_rank * world_size
        self.start, self.end = start, start + total_batches * self.queries
        self.total_batches, self.max_skipped = total_batches, max_skipped
        if homogeneous % self.queries or (homogeneous and start % self.queries):
            raise UserError(
                f"data.homogeneous = {homogeneous} with {self.queries} queries per global micro-batch, from position "
                f"{start}: both must be multiples of queries_per_rank x ranks, or batches would hold several sets"
            )

    def __iter__(self) -> Iterator[Microbatch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        quarantine = None if self.max_skipped is None else Quarantine(self.data.examples, self.max_skipped)

        def own(positions: np.ndarray) -> np.ndarray:
            batches, places = np.divmod(positions - self.start, self.queries)
            mine = (batches % stride == first) & (places // self.queries_per_rank == self.rank)
            return mine & (positions >= self.start)

        # Processes begin a window at different shards, so that those of one machine fetch different ones at a time.
        readers = [
            _SetReader(self, which, own, quarantine, self.rank * stride + first) for which in range(len(self.orders))
        ]
        items = heapq.merge(*readers, key=itemgetter(0))
        for index in range(first, self.total_batches, stride):
            batch = list(itertools.islice(items, self.queries_per_rank))
            position = self.start + index * self.queries
            defects = quarantine.take_new() if quarantine else ()
            yield Microbatch(position, position / self.data.examples, batch, defects)

    def passes(self, position: int) -> int:
        """How often the set that `position` is drawn from was passed as a whole before it."""
        which, place = self.mixture.place(position)
        return place // self.orders[which].examples


class _SetReader:
    """(position, example) of one set in ascending order, for the positions that `own` marks."""

    def __init__(
        self,
        stream: ExampleStream,
        which: int,
        own: Callable[[np.ndarray], np.ndarray],
        quarantine: Quarantine | None,
        turn: int,
    ) -> None:
        self.stream, self.which, self.own, self.quarantine, self.turn = stream, which, own, quarantine, turn
        self.set: TrainingSet = stream.data.sets[which]
        self.order = stream.orders[which]
        self.damaged: set[int] = set()  # numbers of shards
        # Only stand-ins read through this: at most one window of whole shards, and only if something is damaged.
        self.shard = lru_cache(maxsize=self.order.shuffle_shards)(self._shard)

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        for epoch, number, positions, offsets, indexes, rows in one_ahead(self._windows()):
            for position, offset in zip(positions.tolist(), offsets.tolist(), strict=True):
                example = self._decode(rows.pop(int(indexes[offset]), None))
                yield position, example or self._stand_in(epoch, number, offset)

    def _windows(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray, dict[int, Row]]]:
        """Epoch, number, own positions and their offsets in the window, the window's indexes, own rows by index."""
        mixture, end = self.stream.mixture, self.stream.end
        first_epoch, offset = divmod(mixture.before(self.which, self.stream.start), self.order.examples)
        for epoch in itertools.count(first_epoch):
            starts = self.order.window_starts(epoch)
            passed = int(np.searchsorted(starts, offset, side="right")) - 1
            for number in range(passed, len(starts) - 1):
                first, last = (epoch * self.order.examples + int(start) for start in starts[number : number + 2])
                positions = mixture.positions(self.which, first, last, end)
                if not len(positions):
                    return
                offsets = np.flatnonzero(self.own(positions))
                if len(offsets):
                    indexes = self.order.window(epoch, number)
                    yield epoch, number, positions[offsets], offsets, indexes, self._rows(indexes[offsets])
            offset = 0

    def _rows(self, indexes: np.ndarray) -> dict[int, Row]:
        """index -> row, reading each shard that holds one of `indexes` once; without those of damaged shards."""
        starts = self.order.starts
        rows: dict[int, Row] = {}
        numbers = np.searchsorted(starts, indexes, side="right") - 1
        for number in np.roll(np.unique(numbers), -self.turn).tolist():
            if members := self._shard(number):
                mine = indexes[numbers == number].tolist()
                rows |= {index: Row(number, *members[index - int(starts[number])]) for index in mine}
        return rows

    def _shard(self, number: int) -> list[tuple[str, bytes]] | None:
        """The members of a shard; None if it is damaged and may be skipped."""
        if number in self.damaged:
            return None
        shard = self.set.shards[number]
        try:
            return read_members(self.set.store, shard)
        except CacheError:
            raise
        except UserError as error:
            self._quarantine(error, Defect(self.set.store.locate(shard.name), None, str(error), shard.examples))
            self.damaged.add(number)
            return None

    def _decode(self, row: Row | None) -> Example | None:
        """The example of a row; None if it or its shard is damaged and may be skipped."""
        if row is None:
            return None
        place = self.set.store.locate(self.set.shards[row.shard].name)
        where = f"{place}:{row.member}"
        try:
            if len(row.text) > LONGEST_ROW:
                raise UserError(f"{where}: {len(row.text):,} bytes, but at most {LONGEST_ROW:,} are read: shorten it")
            return decode_example(row.text, where)
        except UserError as error:
            self._quarantine(error, Defect(place, row.member, str(error), 1))
            return None

    def _stand_in(self, epoch: int, number: int, offset: int) -> Example:
        for index in self.stand_ins(epoch, number, offset):
            shard = int(np.searchsorted(self.order.starts, index, side="right")) - 1
            members = self.shard(shard)
            if members and (example := self._decode(Row(shard, *members[index - int(self.order.starts[shard])]))):
                return example
        raise UserError(f"{self.set.store.locate('')}: no example can be read; write the folder again")

    def stand_ins(self, epoch: int, number: int, offset: int) -> Iterator[int]:
        """Indexes of the rows that may fill a damaged place of a window; the first readable one does.

        Half a window further, so that a row and its copy seldom meet in a batch, and on from there; then the epoch's
        next windows. What fills a place thus depends on the seed and on what is damaged, and moves no other row.
        """
        windows = len(self.order.windows(epoch))
        for further in range(windows):
            indexes = self.order.window(epoch, (number + further) % windows)
            half = offset + len(indexes) // 2
            yield from (int(indexes[(half + i) % len(indexes)]) for i in range(len(indexes)))

    def _quarantine(self, error: UserError, defect: Defect) -> None:
        if self.quarantine is None:
            raise error
        self.quarantine.add([defect])


def draw_passages(example: Example, negatives: int, rng_key: tuple[int, int]) -> tuple[Passage, ...]:
    """One positive and then `negatives` negatives of an example.

    `rng_key` is (seed, epoch): with the query id it fixes the draw, whichever rank or worker makes it. The seed puts a
    query's passages in an order, and epochs take them in turn: none comes again before all others came. A query with
    fewer negatives than asked for reuses them; with none at all it is a UserError. There is one positive per draw,
    because InfoNCE has one label per query, and masks the query's other positives.
    """
    seed, epoch = rng_key
    rng = generator(seed, passage_key(example.query_id))
    positive = example.positives[rng.permutation(len(example.positives))[epoch % len(example.positives)]]
    if negatives == 0:
        return (positive,)
    if not example.negatives:
        raise UserError(
            f'query "{example.query_id}" has no negatives, but data.negatives = {negatives}: '
            "add hard negatives to the source and prepare it again, or train with --data.negatives 0"
        )
    order = rng.permutation(len(example.negatives))
    turns = range(epoch * negatives, (epoch + 1) * negatives)
    return positive, *(example.negatives[order[turn % len(order)]] for turn in turns)


def plain_errors(loader: Iterable[T]) -> Generator[T, None, None]:
    """The items of a DataLoader; a UserError raised in a worker comes out as itself, not as a quoted traceback."""
    try:
        yield from loader
    except UserError as error:
        error.__traceback__ = None  # holds the loader in a cycle, which would end its processes late and slowly
        name = f"{type(error).__module__}.{type(error).__qualname__}: "
        raise UserError(str(error).rpartition(name)[2].rstrip()) from None
