"""BM25, the baseline beside every result: what a search without any model finds in the same files."""

from typing import Any

import bm25s
import Stemmer
import torch

from laser_dist.retrieval.collection import Corpus, Queries
from laser_dist.retrieval.metrics import Run
from laser_dist.retrieval.search import top_k


def bm25_run(corpus: Corpus, queries: Queries, k: int) -> Run:
    """The k best passages of each query by BM25: {query id: [(passage id, score), ...]}, best first.

    Lucene's variant, k1 = 1.5, b = 0.75, English stop words, Snowball stems; title and text are indexed together.
    Passages that share no term with the query (score 0) are left out. Equal scores rank by position in the corpus.
    """
    texts = [f"{title} {text}" for title, text in zip(corpus.titles, corpus.texts, strict=True)]
    words: dict[str, Any] = {
        "stopwords": "english",
        "stemmer": Stemmer.Stemmer("english"),
        "return_ids": False,
        "show_progress": False,
    }
    passages = bm25s.tokenize(texts, **words)
    if not any(passages):
        return {query: [] for query in queries.ids}
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index(passages, show_progress=False)
    run: Run = {}
    for query, tokens in zip(queries.ids, bm25s.tokenize(queries.texts, **words), strict=True):
        known = [token for token in tokens if token in index.vocab_dict]
        # bm25s' own selection leaves the order of equal scores open.
        scores, rows = top_k(torch.from_numpy(index.get_scores(known))[None], k) if known else (torch.empty(1, 0),) * 2
        pairs = zip(map(float, scores[0]), map(int, rows[0]), strict=True)
        run[query] = [(corpus.ids[row], score) for score, row in pairs if score > 0]
    return run
