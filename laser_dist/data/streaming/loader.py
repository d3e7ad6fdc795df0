"""Packed training batches: the stream of examples, tokenised in loader processes."""

import os
import signal
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset

from laser_dist.batch import PackedBatch
from laser_dist.config import RunConfig
from laser_dist.data.streaming.quarantine import Defect
from laser_dist.data.streaming.sets import TrainingData
from laser_dist.data.streaming.stream import ExampleStream, draw_passages, plain_errors
from laser_dist.data.text import TextCounts, TextFormat


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's micro-batch, and what was cut to make it."""

    packed: PackedBatch
    epoch: float  # passes over the data so far
    counts: dict[str, int]  # see TextCounts, plus queries_reusing_negatives
    defects: tuple[Defect, ...] = ()  # what had to be skipped, see ExampleStream


class _Packer(IterableDataset):
    def __init__(self, stream: ExampleStream, text: TextFormat, config: RunConfig):
        self.stream, self.text, self.config = stream, text, config

    def __iter__(self) -> Iterator[TrainingBatch]:
        config = self.config
        for micro in self.stream:
            self.text.counts = TextCounts()
            examples = [example for _, example in micro.items]
            passages = [
                draw_passages(example, config.data.negatives, (config.seed, self.stream.passes(position)))
                for position, example in micro.items
            ]
            packed = self.text.batch(examples, passages, with_rationale=config.objective.needs_rationale)
            reusing = sum(len(example.negatives) < config.data.negatives for example in examples)
            counts = {**asdict(self.text.counts), "queries_reusing_negatives": reusing}
            yield TrainingBatch(packed, micro.epoch, counts, micro.defects)


def training_batches(
    config: RunConfig, data: TrainingData, text: TextFormat, *, rank: int, world_size: int, start: int, total: int
) -> Generator[TrainingBatch, None, None]:
    """This rank's next `total` micro-batches from position `start`, in an order that depends on the seed only."""
    stream = ExampleStream(
        data,
        seed=config.seed,
        queries_per_rank=config.train.queries_per_rank,
        total_batches=total,
        start=start,
        rank=rank,
        world_size=world_size,
        shuffle=config.data.shuffle,
        shuffle_shards=config.data.shuffle_shards,
        homogeneous=config.data.homogeneous,
        max_skipped=config.data.max_skipped if config.data.on_error == "skip" else None,
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are the parallelism
    loader = DataLoader(
        _Packer(stream, text, config),
        batch_size=None,
        num_workers=config.data.workers,
        worker_init_fn=_leave_signals_to_the_rank,
        # A generator of its own: DataLoader draws a seed from the global one, which dropout continues on resume.
        generator=torch.Generator(),
    )
    return plain_errors(loader)


def _leave_signals_to_the_rank(worker: int) -> None:
    # Schedulers signal all processes. A loader that died of it would take the rank along before it can save.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
