"""Runs: what a search found, by id, and as TREC files, which every evaluation tool reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from laser_dist.errors import UserError
from laser_dist.files import replacing
from laser_dist.retrieval.metrics import Run


def to_run(scores: np.ndarray, indices: np.ndarray, query_ids: Sequence[str], passage_ids: Sequence[str]) -> Run:
    """What a search found ([n, k] each), by id: {query id: [(passage id, score), ...]}, best first.

    An index of -1 marks a place that stayed empty (FAISS may find fewer than k).
    """
    return {
        query: [(passage_ids[index], score) for score, index in zip(row_scores, row_indices, strict=True) if index >= 0]
        for query, row_scores, row_indices in zip(query_ids, scores.tolist(), indices.tolist(), strict=True)
    }


def write_run(path: str | Path, run: Mapping[str, Sequence[tuple[str, float]]], tag: str = "laser-dist") -> None:
    """Write a TREC run file, `query Q0 passage rank score tag` per line, under a temporary name first.

    Scores keep 9 digits, so float32 scores come back as they were. Raises UserError for an id with blank space in it.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for query, ranking in run.items():
            for rank, (passage, score) in enumerate(ranking, start=1):
                line = f"{query} Q0 {passage} {rank} {score:.9g} {tag}"
                if len(line.split()) != 6:
                    raise UserError(f"{path}: ids {query!r}, {passage!r}: a TREC run file allows no blank space in ids")
                file.write(line + "\n")
