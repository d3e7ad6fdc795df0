"""Packed training batches: the stream of examples, tokenised in loader processes."""

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset

from laser_dist.batch import PackedBatch
from laser_dist.chunks import chunks_needed
from laser_dist.config import RunConfig
from laser_dist.data.schema import Passage
from laser_dist.data.streaming.quarantine import Defect
from laser_dist.data.streaming.sets import TrainingData
from laser_dist.data.streaming.stream import ExampleStream, draw_passages, plain_errors
from laser_dist.data.text import TextCounts, TextFormat
from laser_dist.errors import UserError


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's micro-batch, and what was cut to make it."""

    packed: PackedBatch
    epoch: float  # passes over the data so far
    counts: dict[str, int]  # see TextCounts, plus queries_reusing_negatives
    defects: tuple[Defect, ...] = ()  # what had to be skipped, see ExampleStream
    chunks: int = 1  # that this rank needs to keep to train.chunk_tokens


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
            chunks = _chunks(packed, passages, config.train.chunk_tokens)
            yield TrainingBatch(packed, micro.epoch, counts, micro.defects, chunks)


def _chunks(packed: PackedBatch, passages: list[tuple[Passage, ...]], budget: int) -> int:
    """Chunks of at most `budget` tokens that the batch needs. UserError names a text that no chunk can hold."""
    lengths = packed.lengths_R.tolist()
    if not budget or sum(lengths) <= budget:
        return 1
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > budget:
        flat = [passage for group in passages for passage in group]
        is_query = longest < packed.queries
        name = (
            f"query {packed.query_ids[longest]!r} with its rationale"
            if is_query
            else f"passage {flat[longest - packed.queries].id!r}"
        )
        limit = "text.max_explicit_tokens" if is_query else "text.max_passage_tokens"
        raise UserError(
            f"{name} has {lengths[longest]} tokens, more than train.chunk_tokens = {budget}: raise it, or lower {limit}"
        )
    return chunks_needed(lengths, budget)


def training_batches(
    config: RunConfig,
    data: TrainingData,
    text: TextFormat,
    *,
    rank: int,
    world_size: int,
    start: int,
    total: int,
    gaps: Sequence[tuple[int, int]] = (),
) -> Generator[TrainingBatch, None, None]:
    """This rank's next `total` micro-batches from position `start`, in an order that depends on the seed only.

    `gaps`: (first, end) of micro-batches, counted from 0 and ascending, that are left out and not even read.
    """
    firsts, ends = [0, *(end for _, end in gaps)], [*(first for first, _ in gaps), total]
    for first, end in zip(firsts, ends, strict=True):
        position = start + first * config.train.queries_per_rank * world_size
        if first < end:
            yield from plain_errors(_loader(config, data, text, rank, world_size, position, end - first))


def micro_batches_of(steps: Sequence[int], start: int, total: int, accumulation: int) -> list[tuple[int, int]]:
    """(first, end) of the micro-batches of these steps (from 1), counted from those of step `start` (from 0) on."""
    return [
        ((s - 1 - start) * accumulation, (s - start) * accumulation) for s in sorted(set(steps)) if start < s <= total
    ]


def _loader(
    config: RunConfig, data: TrainingData, text: TextFormat, rank: int, world_size: int, start: int, total: int
) -> DataLoader:
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
    return DataLoader(
        _Packer(stream, text, config),
        batch_size=None,
        num_workers=config.data.workers,
        worker_init_fn=_leave_signals_to_the_rank,
        # A generator of its own: DataLoader draws a seed from the global one, which dropout continues on resume.
        generator=torch.Generator(),
    )


def _leave_signals_to_the_rank(worker: int) -> None:
    # Schedulers signal all processes. A loader that died of it would take the rank along before it can save.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
