"""Evidence about labels, masks and gathered rows, against what it is evidence of."""

import pytest
import torch

from laser_dist.batch import PackedBatch
from laser_dist.objective.evidence import MODULUS, checksums, mixed, without_negatives, wrong_labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [3, 48])
def test_parts_have_checksums_of_their_own(dtype, columns):
    rows = torch.randn(12, columns, dtype=dtype)
    whole = checksums(rows, 3)
    assert whole.tolist() == [int(checksums(part, 1)) for part in rows.split(4)]
    assert all(0 <= value < MODULUS for value in whole.tolist()) and len(set(whole.tolist())) == 3
    assert int(checksums(rows[:4].flip(0), 1)) != whole[0]
    assert int(mixed(whole)) != int(mixed(whole.flip(0)))


def batch(keys: list[int], positives: list[list[int]]) -> PackedBatch:
    empty = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        empty, empty, empty, empty, queries=len(positives),
        positive_keys_BX=torch.tensor(positives), passage_keys_P=torch.tensor(keys),
    )  # fmt: skip


def test_a_label_is_right_where_the_passage_is_any_of_the_positives():
    made = batch([10, 11, 20, 21], [[9, 10], [20, 20]])
    keys = made.passage_keys_P
    assert int(wrong_labels(made, torch.tensor([0, 2]), keys)) == 0
    assert int(wrong_labels(made, torch.tensor([1, 3]), keys)) == 2
    assert int(wrong_labels(made, torch.tensor([2, 2]), keys)) == 1
    assert int(wrong_labels(made, torch.tensor([1, 3]), None)) == 0


def test_a_query_alone_with_its_positive_has_no_negatives_unless_there_never_were_any():
    dropped = torch.tensor([7.0, 3.0])
    assert float(without_negatives(dropped, 8)) == 0.5
    assert float(without_negatives(torch.tensor([0.0]), 1)) == 0
