import json

import pytest
import torch

from laser_dist.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TextConfig, TrainConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.shards import write_shards
from laser_dist.data.streaming.loader import training_batches
from laser_dist.data.streaming.sets import open_data
from laser_dist.data.text import TextFormat
from laser_dist.model.backbone import load_tokenizer
from laser_dist.testing import tiny_model_folder

EXAMPLES = 30


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return TextFormat(
        load_tokenizer(ModelConfig(name=str(tiny_model_folder(tmp_path_factory.mktemp("m"))))), TextConfig()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def passages(kind, i, count):
        return tuple(Passage(f"{kind}{i}-{j}", f"{kind} {i} {j}") for j in range(count))

    rows = (
        Example(f"q{i}", f"query {i}", "first\n\nsecond", passages("p", i, 2), passages("n", i, 3))
        for i in range(EXAMPLES)
    )
    write_shards(rows, out := tmp_path_factory.mktemp("data") / "shards", source="test", shard_examples=5)
    return out


def batches(folder, text, *, world_size=1, queries=6, start=0, total=10, gaps=(), **data):
    """Per rank the list of its batches."""
    config = RunConfig(data=DataConfig(train=str(folder), **data), train=TrainConfig(queries_per_rank=queries))
    opened = open_data(config.data)
    return [
        list(training_batches(config, opened, text, rank=r, world_size=world_size, start=start, total=total, gaps=gaps))
        for r in range(world_size)
    ]


def test_a_batch_is_the_same_whoever_makes_it_and_wherever_it_starts(folder, text):
    [whole] = batches(folder, text, workers=0)
    [resumed] = batches(folder, text, workers=2, start=24, total=6)
    for expected, got in zip(whole[4:], resumed, strict=True):
        assert got.packed.query_ids == expected.packed.query_ids and got.epoch == expected.epoch
        assert torch.equal(got.packed.tokens_T, expected.packed.tokens_T)  # the passages drawn, too
    two = batches(folder, text, world_size=2, queries=3, workers=0)
    for expected, *halves in zip(whole, *two, strict=True):
        assert sum((half.packed.query_ids for half in halves), ()) == expected.packed.query_ids
        keys = torch.cat([half.packed.passage_keys_P for half in halves])
        assert torch.equal(keys, expected.packed.passage_keys_P)


@pytest.mark.parametrize(("gaps", "kept"), [([(0, 1)], range(1, 8)), ([(2, 4), (7, 8)], [0, 1, 4, 5, 6])])
def test_what_is_passed_over_moves_nothing_else(folder, text, gaps, kept):
    [whole] = batches(folder, text, workers=0, total=8)
    [left] = batches(folder, text, workers=0, total=8, gaps=gaps)
    assert [batch.packed.query_ids for batch in left] == [whole[i].packed.query_ids for i in kept]
    assert [batch.epoch for batch in left] == [whole[i].epoch for i in kept]


def test_epochs_take_other_passages_of_the_same_query(folder, text):
    [got] = batches(folder, text, workers=0, total=15)
    drawn: dict[str, list[tuple]] = {}
    for batch in got:
        keys = batch.packed.passage_keys_P.view(-1, 2).tolist()
        for name, (positive, negative) in zip(batch.packed.query_ids, keys, strict=True):
            drawn.setdefault(name, []).append((positive, negative))
    assert len(drawn) == EXAMPLES
    for pairs in drawn.values():
        positives, negatives = zip(*pairs, strict=True)
        assert len(pairs) == 3 and len(set(positives[:2])) == 2 and len(set(negatives)) == 3


def test_copies_of_a_positive_under_other_ids_have_its_key(tmp_path, text):
    """So the objective masks them: another id, other case, width and spacing; but not another title."""
    rows = [
        Example("q0", "a", "", (Passage("d0", "The Answer is 42."),)),
        Example("q1", "b", "", (Passage("other", "the  answer\nis ４２."),)),
        Example("q2", "c", "", (Passage("d0", "something else"),)),
        Example("q3", "d", "", (Passage("d3", "The Answer is 42.", title="A title"),)),
    ]
    write_shards(rows, tmp_path / "shards", source="test")
    config = RunConfig(
        data=DataConfig(train=str(tmp_path / "shards"), negatives=0, shuffle=False, workers=0),
        objective=ObjectiveConfig(explicit_weight=0.0, output_weight=0.0, trajectory_weight=0.0),
        train=TrainConfig(queries_per_rank=4),
    )
    [batch] = training_batches(config, open_data(config.data), text, rank=0, world_size=1, start=0, total=1)
    equal_BP = (batch.packed.positive_keys_BX[:, :, None] == batch.packed.passage_keys_P).any(1)
    assert equal_BP.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_defects_travel_with_the_batch(folder, text, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "shard-000002.tar").write_bytes(b"")
    ranks = batches(copy, text, world_size=2, queries=3, workers=1, on_error="skip", max_skipped=0.2, total=5)
    for rank in ranks:
        assert [len(batch.packed.query_ids) for batch in rank] == [3] * 5
        [defect] = [defect for batch in rank for defect in batch.defects]
        assert defect.shard == str(copy / "shard-000002.tar") and json.dumps(defect.reason)
