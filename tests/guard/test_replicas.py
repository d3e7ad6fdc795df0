"""Checksums see any one bit, and say on which rank; master copies are compared with what they made."""

import pytest
import torch

from laser_dist.guard.replicas import Difference, _difference, bit_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (0,)])
def test_every_bit_counts(dtype, shape, monkeypatch):
    monkeypatch.setattr("laser_dist.guard.replicas.BLOCK", 10)
    x = torch.randn(shape, dtype=dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    before = int(bit_sum(x))
    for place in range(x.numel()):
        for bit in range(8 * x.element_size() - 1):
            changed = x.clone()
            changed.view(integers).view(-1)[place] ^= 1 << bit
            assert int(bit_sum(changed)) != before
    assert int(bit_sum(x.clone())) == before


def test_nan_is_equal_to_itself_and_blocks_have_places(monkeypatch):
    monkeypatch.setattr("laser_dist.guard.replicas.BLOCK", 2)
    x = torch.tensor([torch.nan, 1.0, 2.0, 3.0])
    assert int(bit_sum(x)) == int(bit_sum(x.clone()))
    assert int(bit_sum(x)) != int(bit_sum(x[[2, 3, 0, 1]]))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[1, 2], [1, 2], [1, 2]], None),
        ([[1, 2], [1, 5], [1, 2]], Difference((1,), ("b",), True)),
        ([[1, 2], [1, 5]], Difference((0, 1), ("b",), False)),
        ([[4, 5], [1, 2], [1, 2], [1, 2]], Difference((0,), ("a", "b"), True)),
        ([[1, 2], [1, 2], [3, 2], [3, 2]], Difference((0, 1, 2, 3), ("a",), False)),
    ],
)
def test_the_majority_is_right_where_there_is_one(table, expected):
    assert _difference(["a", "b"], table) == expected


def test_one_bit_on_one_rank_is_found_whatever_the_stage(on_two_ranks) -> None:
    """Under ZeRO-3 a master copy has no other rank to be compared with: it names its own."""
    assert [kind for kind, _ in on_two_ranks["differences"]] == ["trained", "frozen", "small", "master", "master"]
    for kind, found in on_two_ranks["differences"]:
        assert found is not None, kind
        assert (found.ranks, found.certain) == (((1,), True) if kind == "master" else ((0, 1), False))
        assert bool(found.parameters) == (kind != "master")
