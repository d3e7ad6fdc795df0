"""BM25: Lucene's formula, and the corners of a corpus."""

import math

import pytest

from laser_dist.retrieval.bm25 import bm25_run, out_of_reach
from laser_dist.retrieval.collection import Corpus, Queries


def corpus(*texts, titles=None):
    return Corpus([f"d{i}" for i in range(len(texts))], list(texts), titles or [""] * len(texts))


def queries(*texts):
    return Queries([f"q{i}" for i in range(len(texts))], list(texts), [None] * len(texts), [None] * len(texts))


def test_scores_follow_the_formula():
    run = bm25_run(corpus("apple apple pear", "pear plum", "plum grape melon kiwi"), queries("apple pear"), k=3)
    mean_length = 3

    def term(frequency, length, documents):
        idf = math.log(1 + (3 - documents + 0.5) / (documents + 0.5))
        return idf * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * length / mean_length))

    # Lucene left (k1 + 1) out of the numerator; it changes no ranking.
    assert run["q0"] == [("d0", pytest.approx(term(2, 3, 1) + term(1, 3, 2))), ("d1", pytest.approx(term(1, 2, 2)))]


def test_unrelated_passages_and_queries_without_known_words():
    run = bm25_run(corpus("apple", "pear", "the of and"), queries("pear zebra", "zebra", "the of"), k=10)
    assert [passage for passage, _ in run["q0"]] == ["d1"]
    assert (run["q1"], run["q2"]) == ([], [])


def test_titles_are_searched():
    run = bm25_run(corpus("fruit", "tree", titles=["", "apple"]), queries("apple"), k=1)
    assert run["q0"][0][0] == "d1"


def test_equal_scores_rank_by_position():
    run = bm25_run(corpus(*["pear tree"] * 20, "plum"), queries("pear"), k=5)
    assert [passage for passage, _ in run["q0"]] == ["d0", "d1", "d2", "d3", "d4"]


def test_a_corpus_of_stop_words_finds_nothing():
    assert bm25_run(corpus("the", "of"), queries("apple"), k=5) == {"q0": []}


def test_is_quiet(capfd):
    bm25_run(corpus("apple", "pear"), queries("pear"), k=1)
    assert capfd.readouterr() == ("", "")


def test_what_shares_no_word_is_out_of_reach():
    passages = corpus("pears ripen", "apple trees", "a plum", "the plum of it")
    asked = queries("the pear", "an apple", "which of it")
    qrels = {"q0": {"d0": 1, "d1": 1, "d2": 0}, "q1": {"d1": 2}, "q2": {"d3": 1}}
    # "pears" is found by its stem, "of it" are stop words, and d2 is not relevant.
    assert out_of_reach(passages, asked, qrels) == {"q0": {"d1": 1}, "q2": {"d3": 1}}
    assert all("d1" != name for name, _ in bm25_run(passages, asked, 10)["q0"])
