from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from torch.utils.data import DataLoader

from laser_dist.batch import Example, Passage
from laser_dist.data import stream as stream_module
from laser_dist.data.shards import load_manifest, write_shards
from laser_dist.data.stream import ExampleStream, Order, check_enough, draw_passages, plain_errors
from laser_dist.errors import UserError

EXAMPLES = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "shards"
    rows = (Example(f"q{i}", f"query {i}", "", (Passage(f"p{i}", "x"),)) for i in range(EXAMPLES))
    write_shards(rows, out, source="test", shard_examples=5)
    return out


def read(folder, *, workers=0, world_size=1, per_rank=4, total=12, start=0, **options):
    """Per rank the list of micro-batches."""
    options = {"seed": 3, "shuffle_shards": 3} | options
    streams = [
        ExampleStream(
            folder,
            queries_per_rank=per_rank,
            total_batches=total,
            start_batch=start,
            rank=rank,
            world_size=world_size,
            **options,
        )
        for rank in range(world_size)
    ]
    return [list(plain_errors(DataLoader(s, batch_size=None, num_workers=workers))) for s in streams]


def sequence(ranks) -> list[tuple[int, str]]:
    """The global sequence of (position, query_id): micro-batch by micro-batch, rank by rank."""
    return [(pos, ex.query_id) for micro in zip(*ranks, strict=True) for batch in micro for pos, ex in batch.items]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_example_once_per_epoch_in_an_order_that_ignores_ranks_and_workers(folder, world_size, workers):
    per_rank = 8 // world_size
    ranks = read(folder, workers=workers, world_size=world_size, per_rank=per_rank, total=2 * EXAMPLES // 8)
    got = sequence(ranks)
    assert [position for position, _ in got] == list(range(2 * EXAMPLES))
    for epoch in range(2):
        part = Counter(name for _, name in got[epoch * EXAMPLES : (epoch + 1) * EXAMPLES])
        assert part == Counter({f"q{i}": 1 for i in range(EXAMPLES)})
    order = Order((5,) * 9 + (3,), seed=3, shuffle_shards=3)
    assert [name for _, name in got] == [f"q{i}" for epoch in range(2) for i in order.epoch(epoch)]
    for batches in ranks:
        assert [batch.index for batch in batches] == list(range(12))
        assert {len(batch.items) for batch in batches} == {per_rank}
        assert [batch.epoch for batch in batches] == [m * 8 / EXAMPLES for m in range(12)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 5, 11, 12])
def test_resume_is_the_tail(folder, start, workers):
    # 7 divides neither shards, windows nor the epoch, so batches straddle all of them.
    whole = read(folder, per_rank=7, world_size=2)
    resumed = read(folder, per_rank=7, world_size=2, start=start, workers=workers)
    assert resumed == [batches[start:] for batches in whole]


def test_a_resume_reads_only_the_shards_it_needs(folder, monkeypatch):
    opened = []

    def spy(folder, shard):
        opened.append(shard.name)
        return original(folder, shard)

    original = stream_module.read_shard
    monkeypatch.setattr(stream_module, "read_shard", spy)
    read(folder, total=EXAMPLES // 4)
    assert len(opened) == len(set(opened)) == 10  # an epoch opens each shard once
    opened.clear()
    read(folder, total=1001, start=1000)
    assert len(opened) <= 4


def test_seed_and_epoch_change_the_order_and_without_shuffle_it_is_the_files():
    sizes = (5,) * 9 + (3,)
    orders = [Order(sizes, seed=seed).epoch(epoch) for seed in (0, 1, -1, 2**40) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(EXAMPLES))
    assert len({tuple(order) for order in orders}) == len(orders)
    assert np.array_equal(Order(sizes, seed=0).epoch(0), orders[0])
    assert list(Order(sizes, seed=0, shuffle=False).epoch(5)) == list(range(EXAMPLES))


def test_a_window_mixes_its_shards_and_no_others():
    order = Order((10,) * 8, seed=0, shuffle_shards=2)
    starts = order.window_starts(0)
    assert list(starts) == [0, 20, 40, 60, 80]
    for first, last in pairwise(starts):
        shards = order.epoch(0)[first:last] // 10
        assert len(set(shards)) == 2 and list(shards) != sorted(shards)
    assert [list(shards) for shards in order.windows(0)] != [list(shards) for shards in order.windows(1)]
    # The shard permutation and the first window's are different streams: equal ones would correlate.
    assert list(Order((1,) * 8, seed=0, shuffle_shards=8).epoch(0)) != list(
        np.concatenate(Order((1,) * 8, seed=0, shuffle_shards=1).windows(0))
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_stops_training_with_a_plain_message(folder, tmp_path, workers):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    path = copy / "shard-000004.tar"
    path.write_bytes(path.read_bytes().replace(b"query 22", b"query 99"))
    with pytest.raises(UserError) as error:
        read(copy, workers=workers)
    assert str(error.value).startswith(f"shard {path} is damaged") and "Traceback" not in str(error.value)


def _example(negatives: int, positives: int = 1) -> Example:
    def passages(kind, count):
        return tuple(Passage(f"{kind}{i}", kind) for i in range(count))

    return Example("q", "query", "", passages("p", positives), passages("n", negatives))


def test_draws_are_a_function_of_the_key():
    example = _example(8, positives=3)
    np.random.seed(0)
    draws = [draw_passages(example, 2, (0, position)) for position in range(60)]
    np.random.seed(1)
    assert [draw_passages(example, 2, (0, position)) for position in range(60)] == draws
    assert [draw_passages(example, 2, (1, position)) for position in range(60)] != draws
    for positive, *negatives in draws:
        assert positive in example.positives
        assert len(set(negatives)) == 2 and set(negatives) <= set(example.negatives)
    assert {draw[0] for draw in draws} == set(example.positives)
    assert {passage for draw in draws for passage in draw[1:]} == set(example.negatives)


def test_few_negatives_are_reused_in_turn_and_none_is_an_error():
    drawn = draw_passages(_example(2), 5, (0, 0))[1:]
    assert sorted(Counter(drawn).values()) == [2, 3] and drawn[:2] == drawn[2:4]
    assert len(draw_passages(_example(0), 0, (0, 0))) == 1
    with pytest.raises(UserError, match='"q" has no negatives.*--data.negatives 0'):
        draw_passages(_example(0), 1, (0, 0))


def test_less_than_one_batch_is_refused(folder):
    manifest = load_manifest(folder)
    check_enough(manifest, EXAMPLES)
    with pytest.raises(UserError, match="has 48 examples, but one optimizer step takes 49"):
        check_enough(manifest, EXAMPLES + 1)
