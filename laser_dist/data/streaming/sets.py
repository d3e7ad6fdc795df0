"""The training data of a run: the sets it is mixed from, opened and checked once."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from laser_dist.config import DataConfig
from laser_dist.data.manifest import Manifest, Shard
from laser_dist.data.shards import load_manifest
from laser_dist.data.streaming.store import RemoteOptions, RemoteStore, Store, default_cache, open_store
from laser_dist.errors import UserError


@dataclass(frozen=True)
class TrainingSet:
    """Shards that are shuffled together, and their share of the positions."""

    store: Store
    shards: tuple[Shard, ...]
    weight: Fraction = Fraction(1)

    @property
    def examples(self) -> int:
        return sum(shard.examples for shard in self.shards)


@dataclass(frozen=True)
class TrainingData:
    """All sets of a run. An epoch is as many positions as they hold examples together.

    In an epoch a set of weight w (of all weights) is passed w * examples / its own examples times: once, if weights
    are the sizes.
    """

    sets: tuple[TrainingSet, ...]
    without_rationale: int = 0

    @property
    def examples(self) -> int:
        return sum(part.examples for part in self.sets)

    def fingerprint(self) -> list[tuple[str, list[str]]]:
        """What decides which example stands where: weights and contents, but not where the shards lie."""
        return [(str(part.weight), [shard.sha256 for shard in part.shards]) for part in self.sets]

    def check_enough(self, queries_per_step: int) -> None:
        """UserError if the data is smaller than one global batch (queries_per_step = B * W * accumulation)."""
        if self.examples < queries_per_step:
            raise UserError(
                f"the training set has {self.examples} examples, but one optimizer step takes {queries_per_step} "
                "(queries_per_rank x ranks x accumulation): lower --train.queries-per-rank or --train.accumulation, "
                "use fewer ranks, or prepare more data"
            )


def open_data(config: DataConfig) -> TrainingData:
    """Read and check the manifests of `data.train` or `data.mix`. Raises UserError."""
    cache = Path(config.cache) if config.cache else default_cache()
    options = RemoteOptions(cache, int(config.cache_gib * 2**30), config.timeout, config.attempts)
    sets: list[TrainingSet] = []
    without_rationale = 0
    for place, weight in config.sources.items():
        store = open_store(place, options)
        # With "skip" a missing shard is one more damage, met when it is read.
        manifest = load_manifest(store, check_files=config.on_error == "stop")
        sets += parts_of(store, manifest, Fraction(str(weight)))
        without_rationale += manifest.without_rationale
    data = TrainingData(tuple(sets), without_rationale)
    _check_cache(data, config)
    return data


def open_folder(place: str | Path) -> TrainingData:
    """The training data of one folder or address, with default options."""
    store = open_store(place)
    manifest = load_manifest(store)
    return TrainingData(tuple(parts_of(store, manifest)), manifest.without_rationale)


def parts_of(store: Store, manifest: Manifest, weight: Fraction = Fraction(1)) -> Iterator[TrainingSet]:
    """A folder as one set; or, if it was prepared with different weights for its sources, a set per source."""
    weights = {number: Fraction(str(source.weight)) for number, source in enumerate(manifest.sources)}
    used = {shard.source for shard in manifest.shards}
    if len({weights[number] for number in used}) == 1:
        yield TrainingSet(store, manifest.shards, weight)
        return
    total = sum(weights[number] for number in used)
    for number in sorted(used):
        shards = tuple(shard for shard in manifest.shards if shard.source == number)
        yield TrainingSet(store, shards, weight * weights[number] / total)


def _check_cache(data: TrainingData, config: DataConfig) -> None:
    """UserError if the cache cannot hold the window in use and the next: shards would be fetched again and again."""
    remote = [part for part in data.sets if isinstance(part.store, RemoteStore)]
    needed = sum(sum(sorted(shard.bytes for shard in part.shards)[-2 * config.shuffle_shards :]) for part in remote)
    if needed > config.cache_gib * 2**30:
        raise UserError(
            f"data.cache_gib = {config.cache_gib:g}: two windows of data.shuffle_shards = {config.shuffle_shards} "
            f"shards take up to {needed / 2**30:.3g} GiB: raise the one or lower the other"
        )
