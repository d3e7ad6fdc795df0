import json
import pickle
import threading
from collections import Counter
from itertools import chain, pairwise, repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from laser_dist.config import DataConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.shards import load_manifest, write_shards
from laser_dist.data.streaming import stream as stream_module
from laser_dist.data.streaming.order import Mixture, Order
from laser_dist.data.streaming.sets import TrainingData, open_data, open_folder
from laser_dist.data.streaming.stream import ExampleStream, draw_passages, plain_errors
from laser_dist.errors import UserError

EXAMPLES = 48


def write(out, count=EXAMPLES, prefix="q", **options):
    rows = (Example(f"{prefix}{i}", f"query {i}", "", (Passage(f"p{i}", "x"),)) for i in range(count))
    write_shards(rows, out, source="test", **{"shard_examples": 5} | options)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "shards")


def read(data, *, workers=0, world_size=1, per_rank=4, total=12, start=0, **options):
    """Per rank the list of micro-batches."""
    options = {"seed": 3, "shuffle_shards": 3} | options
    streams = [
        ExampleStream(
            data,
            queries_per_rank=per_rank,
            total_batches=total,
            start=start,
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


@pytest.mark.parametrize("workers", [0, 2, 3])
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
        assert [batch.position for batch in batches] == list(range(0, 96, 8))
        assert {len(batch.items) for batch in batches} == {per_rank}
        assert [batch.epoch for batch in batches] == [m * 8 / EXAMPLES for m in range(12)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> TrainingData:
    """Three sets of 48, 23 and 11 examples in the proportion 3 : 2 : 1."""
    root = tmp_path_factory.mktemp("mixed")
    places = {str(write(root / name, count, name)): weight for name, count, weight in MIX}
    return open_data(DataConfig(mix=places))


MIX = (("a", 48, 3.0), ("b", 23, 2.0), ("c", 11, 1.0))


def in_the_large(orders, mixture, count) -> list[str]:
    """The first ids of a mixture, by the plainest means: a pointer into each set's own sequence."""
    sequences = [chain.from_iterable(map(order.epoch, range(10**6))) for order in orders]
    return [f"{MIX[which][0]}{next(sequences[which])}" for which, _ in map(mixture.place, range(count))]


def go_on(data, lives, total=160) -> list[tuple[int, str]]:
    """The first `total` positions as read by one life after the other: (W, queries per rank, workers, micro-batches).

    Each goes on at the position that the one before it reached; the last life is repeated until all is read.
    """
    position, got = 0, []
    for world_size, per_rank, workers, batches in chain(lives, repeat(lives[-1])):
        got += sequence(
            read(data, workers=workers, world_size=world_size, per_rank=per_rank, total=batches, start=position)
        )
        position += batches * world_size * per_rank
        if position >= total:
            return got[:total]
    raise AssertionError


@settings(max_examples=40, deadline=None)
@given(
    lives=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 7), st.just(0), st.integers(1, 9)), min_size=1)
)
def test_kills_and_resumes_with_other_ranks_and_batches_go_on_exactly(mixed, lives):
    """Kills at random positions, each time another W and another batch size: the ids are the undisturbed ones."""
    assert go_on(mixed, lives) == sequence(read(mixed, per_rank=1, total=160))


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_kill_and_a_resume_with_other_workers_go_on_exactly(mixed, world_size, workers):
    rng = np.random.default_rng(world_size * 10 + workers)
    kills = rng.integers(2, 9, size=2).tolist()
    lives = [(world_size, 3, workers, kills[0]), (4 // world_size, 5, 3 - workers, kills[1]), (1, 40, 0, 4)]
    assert go_on(mixed, lives) == sequence(read(mixed, per_rank=1, total=160))


def test_a_mixture_is_its_sets_orders_dealt_out_by_weight(mixed):
    names = [name for _, name in sequence(read(mixed, per_rank=32, total=96, seed=5))]
    orders = [Order(tuple(s.examples for s in part.shards), 5, True, 3) for part in mixed.sets]
    mixture = Mixture((3, 2, 1), 5)
    assert names == in_the_large(orders, mixture, 96 * 32)
    block = sum(mixture.quotas)
    assert block == 1026
    for first in (0, block):
        assert Counter(name[0] for name in names[first : first + block]) == {"a": 513, "b": 342, "c": 171}
    assert 0.3 < sum(a[0] == b[0] for a, b in pairwise(names)) / len(names) < 0.5  # 14/36 by chance: no long runs


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.1, 0.25, 1.0, 1.5, 3.0, 7.0]), min_size=1, max_size=4),
    stretch=st.integers(1, 9),
    seed=st.integers(-5, 5),
    data=st.data(),
)
def test_places_and_positions_are_inverse_and_found_without_what_is_before(weights, stretch, seed, data):
    mixture = Mixture(tuple(weights), seed, stretch)
    block = sum(mixture.quotas) * stretch
    assert [quota * sum(weights) for quota in mixture.quotas] == pytest.approx(
        [weight * sum(mixture.quotas) for weight in weights]
    )
    first = data.draw(st.integers(0, 10**12))
    places = [mixture.place(position) for position in range(first, first + 40)]
    for which in range(len(weights)):
        own = [(first + i, local) for i, (w, local) in enumerate(places) if w == which]
        start, end = mixture.before(which, first), mixture.before(which, first + 40)
        assert [local for _, local in own] == list(range(start, end))
        assert mixture.positions(which, start, end, first + 40).tolist() == [position for position, _ in own]
        assert mixture.positions(which, start, end + 5, first + 40).tolist() == [position for position, _ in own]
        assert mixture.before(which, first * block) == first * mixture.quotas[which] * stretch


@pytest.mark.parametrize("world_size", [1, 2])
def test_homogeneous_batches_hold_one_set_each_on_all_ranks(mixed, world_size):
    ranks = read(mixed, world_size=world_size, per_rank=8 // world_size, total=150, homogeneous=8)
    got = sequence(ranks)
    batches = [{name[0] for _, name in got[i : i + 8]} for i in range(0, len(got), 8)]
    assert {len(batch) for batch in batches} == {1} and set().union(*batches) == {"a", "b", "c"}
    assert got == sequence(read(mixed, per_rank=8, total=150, homogeneous=8))
    with pytest.raises(UserError, match="homogeneous = 8 with 6 queries.*multiples"):
        read(mixed, per_rank=6, homogeneous=8)
    with pytest.raises(UserError, match="from position 4: both must be multiples"):
        read(mixed, per_rank=8, homogeneous=8, start=4)


def test_weights_that_need_huge_blocks_are_refused():
    with pytest.raises(UserError, match="data.mix: the weights 0.1234567, 1.0 .*round them"):
        _ = Mixture((0.1234567, 1.0), 0).quotas


def test_one_set_has_the_order_it_has_alone(folder):
    alone = sequence(read(folder))
    assert sequence(read(open_data(DataConfig(mix={str(folder): 0.3})))) == alone
    # Pinned: a run goes on with the ids it would have had under the version before.
    assert [name for _, name in alone[:6]] == ["q33", "q30", "q34", "q3", "q4", "q1"]


def test_sources_prepared_with_different_weights_are_sets_of_their_own(folder):
    manifest = load_manifest(folder)
    import dataclasses

    from laser_dist.data.manifest import Source
    from laser_dist.data.streaming.sets import parts_of
    from laser_dist.data.streaming.store import open_store

    def prepared(*weights):
        sources = tuple(Source(f"s{i}", weight=weight) for i, weight in enumerate(weights))
        shards = tuple(dataclasses.replace(s, source=int(i > 3)) for i, s in enumerate(manifest.shards))
        return list(parts_of(open_store(folder), dataclasses.replace(manifest, sources=sources, shards=shards)))

    assert [(len(part.shards), part.weight) for part in prepared(1.0, 1.0)] == [(10, 1)]
    assert [(len(part.shards), float(part.weight)) for part in prepared(1.0, 3.0)] == [(4, 0.25), (6, 0.75)]


def test_a_resume_reads_only_the_shards_it_needs(folder, monkeypatch):
    opened = []

    def spy(folder, shard):
        opened.append(shard.name)
        return original(folder, shard)

    original = stream_module.read_members
    monkeypatch.setattr(stream_module, "read_members", spy)
    read(folder, total=EXAMPLES // 4)
    assert len(opened) == len(set(opened)) == 10  # an epoch opens each shard once
    opened.clear()
    read(folder, total=1, start=4000)
    assert len(opened) <= 4


def test_the_next_window_is_read_while_one_is_in_use(folder, monkeypatch):
    opened, third = [], threading.Event()

    def spy(folder, shard):
        opened.append(threading.current_thread().name)
        if len(opened) == 6:
            third.set()
        return original(folder, shard)

    original = stream_module.read_members
    monkeypatch.setattr(stream_module, "read_members", spy)
    batches = iter(ExampleStream(folder, seed=3, queries_per_rank=1, total_batches=EXAMPLES, shuffle_shards=3))
    next(batches)
    assert third.wait(10), "the second window was not read although nothing of the first is left to read"
    assert set(opened) == {"read-ahead"} and len(opened) == 6
    batches.close()


def test_the_stream_survives_pickling(folder):
    # Loader processes may be spawned instead of forked.
    stream = ExampleStream(folder, seed=3, queries_per_rank=4, total_batches=12, shuffle_shards=3)
    assert list(pickle.loads(pickle.dumps(stream))) == list(stream)


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


@pytest.fixture
def copy(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_stops_training_with_a_plain_message(copy, workers):
    path = copy / "shard-000004.tar"
    path.write_bytes(path.read_bytes().replace(b"query 22", b"query 99"))
    with pytest.raises(UserError) as error:
        read(copy, workers=workers)
    assert str(error.value).startswith(f"shard {path} is damaged") and "Traceback" not in str(error.value)


def rewrite(folder, number, change):
    """Shard `number` with its members changed by `change(name, text) -> [(name, text)]`, and a manifest that fits."""
    import hashlib
    import io
    import tarfile

    path, table = folder / f"shard-{number:06d}.tar", json.loads((folder / "manifest.json").read_text())
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text in (changed for member in members for changed in change(*member)):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    path.write_bytes(buffer.getvalue())
    entry = table["shards"][number]
    entry |= {"bytes": len(buffer.getvalue()), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    entry["offsets"] = list(range(entry["examples"] + 1))
    (folder / "manifest.json").write_text(json.dumps(table))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran')",)


LONG = json.dumps({"query": "x" * stream_module.LONGEST_ROW, "positives": [{"text": "y"}]}).encode()
ROWS = {
    "not JSON": (b"{", "not valid JSON"),
    "another type": (b"[1]", "expected a JSON object"),
    "a number for a text": (b'{"query": 1, "positives": [{"text": "y"}]}', '"query" must be a string'),
    "not UTF-8": (b'{"query": "\xff"}', "not UTF-8"),
    "empty text": (b'{"query": "q", "positives": [{"text": " "}]}', '"text" is empty'),
    "absurdly long": (LONG, "bytes, but at most 8,388,608 are read"),
    "absurdly nested": (b"[" * 100_000, "nested too deeply"),
}
# What is wrong with member 21 of shard 4, or with the whole of it; whether only the row is lost; words of the reason.
SHARDS = {
    "an extra member": (lambda n, t: [(n, t), (n.replace("json", "txt"), t)], "only .json members"),
    "a pickled member": (lambda n, t: [(n, t), (n.replace("json", "pkl"), pickle.dumps(Bomb()))], "only .json members"),
    "a member without its pair": (lambda n, t: [(n.replace("json", "txt"), t)], "only .json members"),
    "a member less": (lambda n, t: [], "holds 4 examples, the manifest says 5"),
    "a path that leads out": (lambda n, t: [(f"../{n}", t)], "members lie in no folder"),
    "an absolute path": (lambda n, t: [(f"/{n}", t)], "members lie in no folder"),
}


def spoil(copy, kind):
    """Damage shard 4; the words of the reason, and whether all of the shard is lost."""
    path = copy / "shard-000004.tar"
    if kind in ROWS:
        text, words = ROWS[kind]
        rewrite(copy, 4, lambda n, t: [(n, text if "21" in n else t)])
        return words, False
    if kind in SHARDS:
        change, words = SHARDS[kind]
        rewrite(copy, 4, lambda n, t: change(n, t) if "21" in n else [(n, t)])
    elif kind == "corrupt":
        path.write_bytes(path.read_bytes().replace(b"query 22", b"query 99"))
        words = "its sha256 differs"
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
        words = "its sha256 differs"
    else:
        path.unlink()
        words = "cannot be read"
    return words, True


@pytest.mark.parametrize("kind", [*ROWS, *SHARDS, "corrupt", "truncated", "vanished"])
def test_what_is_damaged_stops_the_run_or_is_skipped_and_reported(folder, copy, kind):
    """With skip: equally many rows, only the damaged ones replaced, one report that names shard, member and reason."""
    stream = open_folder(copy)  # opened while it was intact, so that a shard vanishes in the middle of a run
    words, whole = spoil(copy, kind)
    data = stream if kind in ("truncated", "vanished") else open_folder(copy)
    with pytest.raises(UserError, match=words):
        read(data, total=24)
    intact, ranks = sequence(read(folder, total=24)), read(data, total=24, max_skipped=0.2)
    lost = {f"q{i}" for i in (range(20, 25) if whole else [21])}
    got = sequence(ranks)
    assert [position for position, _ in got] == list(range(96))
    for (_, before), (_, after) in zip(intact, got, strict=True):
        assert after not in lost and (before in lost or after == before)
    [defect] = [defect for batch in ranks[0] for defect in batch.defects]
    assert words in defect.reason and defect.examples == len(lost)
    assert defect.shard == str(copy / "shard-000004.tar") and defect.member == (None if whole else "000000021.json")
    for world_size, workers in ((2, 0), (4, 2)):  # the same rows stand in, whoever reads
        assert sequence(read(data, workers=workers, world_size=world_size, per_rank=4 // world_size, total=24,
                             max_skipped=0.2)) == got  # fmt: skip
    assert sequence(read(data, total=14, start=40, max_skipped=0.2)) == got[40:]


def test_stand_ins_are_spread_and_come_from_the_window(folder, copy):
    spoil(copy, "corrupt")
    got = dict(sequence(read(copy, total=24, max_skipped=0.2)))
    order = Order((5,) * 9 + (3,), seed=3, shuffle_shards=3)
    expected = [f"q{i}" for epoch in range(2) for i in order.epoch(epoch)]
    replaced = [position for position, name in enumerate(expected) if got[position] != name]
    assert len(replaced) == 10
    for epoch in range(2):
        names = [got[position] for position in replaced if position // EXAMPLES == epoch]
        assert len(set(names)) >= 4  # a place further on may be damaged too, and its stand-in then serves twice
    distances = [
        abs(position - expected.index(got[position], position // EXAMPLES * EXAMPLES)) for position in replaced
    ]
    assert min(distances) >= 4


def test_a_window_without_a_readable_row_is_filled_from_the_next(copy):
    for number in range(10):
        if number != 7:
            (copy / f"shard-{number:06d}.tar").write_bytes(b"")
    data = open_data(DataConfig(train=str(copy), on_error="skip"))
    names = {name for _, name in sequence(read(data, max_skipped=0.99))}
    assert names == {f"q{i}" for i in range(35, 40)}
    (copy / "shard-000007.tar").unlink()
    with pytest.raises(UserError, match="no example can be read"):
        read(data, max_skipped=1.0)


def test_more_damage_than_allowed_stops_the_run(copy):
    spoil(copy, "corrupt")
    read(copy, total=24, max_skipped=0.11)
    with pytest.raises(UserError, match=r"5 of 48 training examples are damaged.*data.max_skipped = 0.1 .*000004.tar"):
        read(copy, total=24, max_skipped=0.1)


def _example(negatives: int, positives: int = 1) -> Example:
    def passages(kind, count):
        return tuple(Passage(f"{kind}{i}", kind) for i in range(count))

    return Example("q", "query", "", passages("p", positives), passages("n", negatives))


def test_draws_are_a_function_of_seed_epoch_and_query():
    example = _example(8, positives=3)
    np.random.seed(0)
    draws = [draw_passages(example, 2, (0, epoch)) for epoch in range(12)]
    np.random.seed(1)
    assert [draw_passages(example, 2, (0, epoch)) for epoch in range(12)] == draws
    assert [draw_passages(example, 2, (1, epoch)) for epoch in range(12)] != draws


@given(positives=st.integers(1, 5), negatives=st.integers(1, 9), drawn=st.integers(1, 9), seed=st.integers(0, 3))
def test_epochs_take_passages_in_turn_without_replacement(positives, negatives, drawn, seed):
    example = _example(negatives, positives)
    draws = [draw_passages(example, drawn, (seed, epoch)) for epoch in range(positives * negatives)]
    for first in range(0, len(draws), positives):
        assert {draw[0] for draw in draws[first : first + positives]} == set(example.positives)
    for draw in draws:
        assert len(set(draw[1:])) == min(drawn, negatives)
    used = Counter(passage for draw in draws for passage in draw[1:])
    assert set(used.values()) == {len(draws) * drawn // negatives}


def test_the_stream_counts_the_passes_of_each_set(mixed):
    stream = ExampleStream(mixed, seed=3, queries_per_rank=4, total_batches=100)
    seen: Counter = Counter()
    for batch in stream:
        for position, example in batch.items:
            assert stream.passes(position) == seen[example.query_id]
            seen[example.query_id] += 1


def test_few_negatives_are_reused_in_turn_and_none_is_an_error():
    drawn = draw_passages(_example(2), 5, (0, 0))[1:]
    assert sorted(Counter(drawn).values()) == [2, 3] and drawn[:2] == drawn[2:4]
    assert len(draw_passages(_example(0), 0, (0, 0))) == 1
    with pytest.raises(UserError, match='"q" has no negatives.*--data.negatives 0'):
        draw_passages(_example(0), 1, (0, 0))


def test_less_than_one_batch_is_refused(folder):
    data = open_folder(folder)
    data.check_enough(EXAMPLES)
    with pytest.raises(UserError, match="has 48 examples, but one optimizer step takes 49"):
        data.check_enough(EXAMPLES + 1)
