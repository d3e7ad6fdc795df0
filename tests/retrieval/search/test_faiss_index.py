"""FAISS indexes against exact search, and what must not be reused."""

import json

import numpy as np
import pytest

from laser_dist.errors import UserError
from laser_dist.retrieval.search.exact import search
from laser_dist.retrieval.search.faiss_index import IndexOptions, open_index, recall, search_index

faiss = pytest.importorskip("faiss")


def unit_rows(rows, dim=16, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"weights": "a"}))
    return tmp_path


def found_by(kind, folder, queries, vectors, k, **options):
    options = IndexOptions(**options)
    return search_index(open_index(folder, vectors, kind, options), queries, vectors, k, kind, options)


def test_flat_is_exact_search_with_its_ties(folder):
    """Equal scores rank by index, as in exact search; FAISS itself leaves their order open."""
    vectors, queries = unit_rows(40), unit_rows(7, seed=1)
    vectors[20:] = vectors[:20]
    scores, indices = found_by("flat", folder, queries, vectors, 40)
    exact_scores, exact_indices = search(queries, vectors, 40)
    np.testing.assert_allclose(scores, exact_scores, atol=1e-6)
    np.testing.assert_array_equal(np.sort(indices), np.sort(exact_indices))
    assert (indices[:, 0::2] < indices[:, 1::2]).all()  # of each pair of equals the lower first
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_a_saved_index_finds_what_the_built_one_found(kind, folder):
    vectors, queries = unit_rows(600), unit_rows(20, seed=1)
    first = found_by(kind, folder, queries, vectors, 10)
    saved = (folder / f"{kind}.index" / "index.faiss").stat().st_ino
    again = found_by(kind, folder, queries, vectors, 10)
    np.testing.assert_array_equal(first[1], again[1])
    assert (folder / f"{kind}.index" / "index.faiss").stat().st_ino == saved  # not built again
    _, exact = search(queries, vectors, 10)
    assert recall(again[1], exact) > {"flat": 0.999, "hnsw": 0.99, "ivfpq": 0.4}[kind]
    best = np.take_along_axis(queries @ vectors.T, again[1], axis=1)
    np.testing.assert_allclose(again[0], best, atol=1e-6)  # exact scores, whatever the index rounds
    assert sorted(path.name for path in folder.iterdir()) == [f"{kind}.index", "manifest.json"]


def test_more_work_finds_more(folder):
    vectors, queries = unit_rows(800), unit_rows(50, seed=1)
    _, exact = search(queries, vectors, 10)
    options = [{"nprobe": 1, "candidates": 10}, {"nprobe": 20, "candidates": 10}, {"nprobe": 20, "candidates": 200}]
    shares = [recall(found_by("ivfpq", folder, queries, vectors, 10, **o)[1], exact) for o in options]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.95


def test_half_precision_vectors_and_k_beyond_the_corpus(folder):
    vectors, queries = unit_rows(30).astype(np.float16), unit_rows(3, seed=1)
    scores, indices = found_by("hnsw", folder, queries, vectors, 100)
    assert scores.shape == (3, 30)
    np.testing.assert_array_equal(np.sort(indices), np.tile(np.arange(30), (3, 1)))


def test_rows_that_stay_short_end_with_minus_one(folder):
    """One cell may hold fewer than k passages; FAISS fills up with -1, which is the last passage to numpy."""
    vectors, queries = unit_rows(400), unit_rows(5, seed=1)
    scores, indices = found_by("ivfpq", folder, queries, vectors, 100, nlist=40, nprobe=1)
    short = indices == -1
    assert short.any() and (scores[short] == -np.inf).all() and np.isfinite(scores[~short]).all()
    assert (np.diff(short.astype(int), axis=1) >= 0).all()


def test_a_stale_index_is_refused(folder):
    """Vectors that were encoded again have other rows: an old index would name passages at random."""
    vectors, queries = unit_rows(300), unit_rows(2, seed=1)
    found_by("hnsw", folder, queries, vectors, 5)
    (folder / "manifest.json").write_text(json.dumps({"weights": "b"}))
    with pytest.raises(UserError, match="built from other vectors.*--rebuild-index"):
        found_by("hnsw", folder, queries, vectors, 5)
    open_index(folder, vectors, "hnsw", IndexOptions(), rebuild=True)
    found_by("hnsw", folder, queries, vectors, 5)


def test_other_build_parameters_are_refused_and_search_parameters_are_not(folder):
    vectors, queries = unit_rows(300), unit_rows(2, seed=1)
    found_by("hnsw", folder, queries, vectors, 5, hnsw_m=16)
    found_by("hnsw", folder, queries, vectors, 5, ef_search=300)  # m is what it was built with
    with pytest.raises(UserError, match="hnsw_m 16, not 8.*--rebuild-index"):
        found_by("hnsw", folder, queries, vectors, 5, hnsw_m=8)


def test_a_damaged_index_is_refused(folder):
    vectors, queries = unit_rows(300), unit_rows(2, seed=1)
    found_by("flat", folder, queries, vectors, 5)
    file = folder / "flat.index" / "index.faiss"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged.*--rebuild-index"):
        found_by("flat", folder, queries, vectors, 5)


def test_an_interrupted_build_leaves_no_index(folder, monkeypatch):
    vectors, queries = unit_rows(300), unit_rows(2, seed=1)

    def full_disk(index, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise RuntimeError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", full_disk)
        with pytest.raises(UserError, match="no space left"):
            found_by("flat", folder, queries, vectors, 5)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    found_by("flat", folder, queries, vectors, 5)


def test_parameters_follow_from_the_vectors(folder):
    built = {}
    for rows, dim in ((300, 16), (5000, 24)):
        open_index(folder, unit_rows(rows, dim), "ivfpq", IndexOptions(), rebuild=True)
        built[rows] = json.loads((folder / "ivfpq.index" / "index.json").read_text())["parameters"]
    assert built == {300: {"nlist": 7, "pq_m": 4}, 5000: {"nlist": 128, "pq_m": 6}}


def test_parameters_that_do_not_fit_are_refused(folder):
    with pytest.raises(UserError, match="at least 256 vectors, here are 100"):
        open_index(folder, unit_rows(100), "ivfpq", IndexOptions())
    with pytest.raises(UserError, match="--pq-m 5 must divide the dimension 16"):
        open_index(folder, unit_rows(300), "ivfpq", IndexOptions(pq_m=5))
    with pytest.raises(UserError, match="--ef-search 0: must be at least 1"):
        IndexOptions(ef_search=0)
