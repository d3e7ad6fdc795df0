"""Search against brute force in numpy, for every way of cutting the corpus into blocks."""

import numpy as np
import pytest
import torch

from laser_dist.errors import UserError
from laser_dist.retrieval.search import exact as search_module
from laser_dist.retrieval.search.exact import search, top_k
from laser_dist.retrieval.search.runs import to_run, write_run


def small_integers(rows, dim=6, seed=0, dtype=np.float32):
    """Products of small integers are exact in float32, and many of them are equal: ties everywhere."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, dim)).astype(dtype)


def brute_force(queries, passages, k):
    scores = queries.astype(np.float64) @ passages.astype(np.float64).T
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, indices, axis=1), indices


@pytest.mark.parametrize("block", [1, 3, 7, 100, 101, 102, 65536])
@pytest.mark.parametrize("k", [1, 10, 101, 500])
def test_equals_brute_force_with_ties(block, k, monkeypatch):
    monkeypatch.setattr(search_module, "_SCORES_AT_ONCE", 200)  # several slices of queries, too
    queries, passages = small_integers(9), small_integers(101, seed=1)
    scores, indices = search(queries, passages, k, block=block)
    expected_scores, expected_indices = brute_force(queries, passages, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(scores, expected_scores)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_read_only_memory_maps(tmp_path, dtype):
    np.save(tmp_path / "v.npy", small_integers(50, dtype=dtype))
    passages = np.load(tmp_path / "v.npy", mmap_mode="r")
    _, indices = search(small_integers(4), passages, 5, block=8)
    np.testing.assert_array_equal(indices, brute_force(small_integers(4), passages, 5)[1])


def test_random_unit_vectors():
    rng = np.random.default_rng(3)
    queries, passages = (rng.normal(size=(n, 32)).astype(np.float32) for n in (5, 400))
    scores, indices = search(queries, passages, 20, block=64)
    expected_scores, expected_indices = brute_force(queries, passages, 20)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


def test_top_k_orders_all_kinds_of_floats():
    row = torch.tensor([0.0, -0.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, 1.0])
    scores, indices = top_k(row[None], 9)
    assert indices[0].tolist() == [5, 7, 8, 3, 0, 1, 4, 2, 6]
    assert torch.equal(scores[0], row[indices[0]])


def test_misuse_is_refused():
    queries, passages = small_integers(2), small_integers(5)
    with pytest.raises(ValueError, match="vectors"):
        search(queries, passages[:, :3], 2)
    with pytest.raises(ValueError, match="positive"):
        search(queries, passages, 0)
    for bad in (np.nan, -np.nan, np.inf):
        passages[3, 0] = bad
        with pytest.raises(ValueError, match="not finite"):
            search(queries, passages, 1, block=2)


def test_an_empty_corpus_finds_nothing():
    scores, indices = search(small_integers(2), np.empty((0, 6), np.float32), 3)
    assert scores.shape == indices.shape == (2, 0)


def test_run_and_run_file(tmp_path):
    scores, indices = np.array([[0.1, -2.0]], np.float32), np.array([[1, 0]])
    run = to_run(scores, indices, ["q"], ["a", "b"])
    assert [passage for passage, _ in run["q"]] == ["b", "a"]
    write_run(tmp_path / "sub" / "run.txt", run, tag="ours")
    lines = (tmp_path / "sub" / "run.txt").read_text().splitlines()
    assert lines == ["q Q0 b 1 0.100000001 ours", "q Q0 a 2 -2 ours"]
    assert np.float32(lines[0].split()[4]) == scores[0, 0]
    with pytest.raises(UserError, match="blank space"):
        write_run(tmp_path / "bad.txt", {"q q": [("a", 1.0)]})
    assert not (tmp_path / "bad.txt").exists()
