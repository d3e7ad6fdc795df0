"""BM25, the baseline beside every result: what a search without any model finds in the same files."""

from collections.abc import Iterator, Sequence
from typing import Any

import bm25s
import numpy as np
import Stemmer
import torch

from laser_dist.retrieval.collection import Corpus, Qrels, Queries
from laser_dist.retrieval.metrics import Run
from laser_dist.retrieval.search.exact import top_k


class Bm25Index:
    """Lucene's variant, k1 = 1.5, b = 0.75, English stop words and Snowball stems."""

    def __init__(self, texts: Sequence[str]):
        passages = _words(texts)
        self._size = len(passages)
        self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene") if any(passages) else None  # it cannot index nothing
        if self._index is not None:
            self._index.index(passages, show_progress=False)

    def scores(self, queries: Sequence[str]) -> Iterator[np.ndarray]:
        """Per query (texts,) float32; 0 where a text shares no term with it."""
        for words in _words(queries):
            known = [word for word in words if self._index is not None and word in self._index.vocab_dict]
            yield self._index.get_scores(known) if known else np.zeros(self._size, np.float32)


def bm25_run(corpus: Corpus, queries: Queries, k: int) -> Run:
    """The k best passages of each query by BM25: {query id: [(passage id, score), ...]}, best first.

    Title and text are indexed together. Passages that share no term with the query (score 0) are left out. Equal scores
    rank by position in the corpus.
    """
    index = Bm25Index([f"{title} {text}" for title, text in zip(corpus.titles, corpus.texts, strict=True)])
    run: Run = {}
    for query, scores_N in zip(queries.ids, index.scores(queries.texts), strict=True):
        # bm25s' own selection leaves the order of equal scores open.
        best, rows = top_k(torch.from_numpy(scores_N)[None], k)
        pairs = zip(map(float, best[0]), map(int, rows[0]), strict=True)
        run[query] = [(corpus.ids[row], score) for score, row in pairs if score > 0]
    return run


def out_of_reach(corpus: Corpus, queries: Queries, qrels: Qrels) -> Qrels:
    """The judgements of relevant passages that share no term with their query: no keyword search finds them.

    Queries that have none are left out.
    """
    judged = {name for grades in qrels.values() for name in grades}
    rows = [row for row, name in enumerate(corpus.ids) if name in judged]
    words_of = _words([f"{corpus.titles[row]} {corpus.texts[row]}" for row in rows])
    terms = {corpus.ids[row]: set(words) for row, words in zip(rows, words_of, strict=True)}
    found: Qrels = {}
    for query, words in zip(queries.ids, _words(queries.texts), strict=True):
        relevant = {name: grade for name, grade in qrels.get(query, {}).items() if grade > 0}
        if hidden := {name: grade for name, grade in relevant.items() if not terms[name] & {*words}}:
            found[query] = hidden
    return found


def _words(texts: Sequence[str]) -> list[list[str]]:
    options: dict[str, Any] = {"stopwords": "english", "stemmer": Stemmer.Stemmer("english")}
    return bm25s.tokenize(list(texts), **options, return_ids=False, show_progress=False)
