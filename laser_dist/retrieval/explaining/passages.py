"""The passages that states are compared with: encoded now, or a folder of vectors that this model made."""

import dataclasses
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from laser_dist.model.retriever import unit
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.collection import iter_passages, read_corpus
from laser_dist.retrieval.search.exact import search
from laser_dist.retrieval.search.origin import check_passages, check_same_corpus, check_same_model
from laser_dist.retrieval.vectors import load_vectors

if TYPE_CHECKING:
    from laser_dist.retrieval.encoder import LaserEncoder


class Passages:
    """Ids and vectors [P, dim] of a corpus, and its file if there is one to read texts from."""

    def __init__(self, ids: Sequence[str], vectors: np.ndarray, corpus: Path | None):
        self.ids = ids
        self.vectors = vectors
        self.corpus = corpus

    @classmethod
    def open(cls, folder: Path, corpus: Path | None, model: str, steps: int | None) -> "Passages":
        """A folder of vectors. UserError for another model's, for queries, and for another corpus than the file's."""
        ids, vectors = load_vectors(folder)
        check_passages(folder)
        card = RetrieverCard.load(Path(model))
        if steps is not None:
            card = dataclasses.replace(card, thinking=dataclasses.replace(card.thinking, steps=steps))
        check_same_model(folder, model, card)
        if corpus is not None:
            check_same_corpus(folder, ids, corpus, [passage_id for passage_id, _, _ in iter_passages(corpus)])
        return cls(ids, vectors, corpus)

    @classmethod
    def encode(cls, encoder: "LaserEncoder", path: Path) -> "Passages":
        """The passages of a corpus.jsonl, encoded now and kept in memory."""
        corpus = read_corpus(path)
        return cls(corpus.ids, encoder.encode_passages(corpus.texts, titles=corpus.titles, progress=True), path)

    def nearest(self, states_ND: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and rows of the k passages nearest to each state, both [N, min(k, P)], best first."""
        return search(self.fitted(states_ND), self.vectors, k)

    def fitted(self, states_ND: Tensor) -> np.ndarray:
        """States [N, D] as the passages' vectors are: cut to their dimension and of unit length."""
        return unit(states_ND[:, : self.vectors.shape[1]]).float().numpy()

    def texts(self, rows: set[int]) -> dict[int, str]:
        """Title and text of these rows, in one reading of the file; nothing where there is no file."""
        if self.corpus is None or not rows:
            return {}
        found = enumerate(islice(iter_passages(self.corpus), max(rows) + 1))
        return {row: f"{title} {text}".strip() for row, (_, text, title) in found if row in rows}
