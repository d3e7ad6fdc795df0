"""Which of the passages that a search found may serve as hard negatives of a query, and which of those are taken.

What ranks high for a query and is not marked as relevant is often relevant all the same. The rules below leave out what
can be told: marked passages in whatever disguise, and passages that score nearly as high as the positive (the
positive-aware filter of NV-Retriever, Moreira et al. 2024, "TopK-PercPos").
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from laser_dist.data.schema import Example, Passage

# Every candidate in the rank window is counted under the first that holds.
REASONS = (
    "positive of this row",
    "positive of the same query",
    "relevant in the qrels",
    "same text as the query",
    "near-duplicate of a positive",
    "scores too near the positive",
    "scores 0",
    "already a negative",
    "not needed",
)
_SHINGLE_WORDS = 3


@dataclass(frozen=True)
class Rules:
    """What is left out, and how many are taken from the rest."""

    negatives: int
    ranks: tuple[int, int]  # first and last, counted from 1
    max_score_ratio: float  # inf: no limit
    margin: float | None
    reference: Literal["highest", "lowest", "mean"]
    max_overlap: float
    pick: Literal["sample", "top"]
    seed: int
    positive_scores_only: bool  # BM25: 0 means that no word is shared

    def highest_score(self, positives: Sequence[float]) -> float:
        """The score that a candidate must stay below, given those of the positives."""
        scores = np.array(positives)
        score = float({"highest": scores.max(), "lowest": scores.min(), "mean": scores.mean()}[self.reference])
        limits = [float("inf")]
        if self.max_score_ratio < float("inf"):
            limits.append(score - (1 - self.max_score_ratio) * abs(score))  # below it, for negative scores too
        if self.margin is not None:
            limits.append(score - self.margin)
        return min(limits)


@dataclass(frozen=True)
class Candidate:
    """A passage that a search found; ranks count from 1."""

    passage: Passage
    rank: int
    score: float


class KnownPositives:
    """Everything that the source and the qrels call relevant, by query."""

    def __init__(self, qrels: Mapping[str, Mapping[str, int]] | None = None):
        self._of_text: dict[int, set[int]] = {}
        self._qrels = qrels or {}

    def add(self, example: Example) -> None:
        known = self._of_text.setdefault(_hash(normalised(example.query)), set())
        for passage in example.positives:
            known |= {_hash(passage.id), _hash(normalised(passage.text))}

    def in_source(self, example: Example, passage: Passage) -> bool:
        """Whether any row with the same query has this passage, by id or text, among its positives."""
        known = self._of_text.get(_hash(normalised(example.query)), ())
        return _hash(passage.id) in known or _hash(normalised(passage.text)) in known

    def in_qrels(self, example: Example, passage: Passage) -> bool:
        return self._qrels.get(example.query_id, {}).get(passage.id, 0) > 0


def select(
    example: Example,
    candidates: Iterable[Candidate],
    positive_scores: Sequence[float],
    rules: Rules,
    known: KnownPositives,
    existing: Sequence[Passage] = (),
) -> tuple[list[Candidate], Counter[str]]:
    """At most `rules.negatives` of the candidates, best first, and how many of the others were left out and why."""
    limit = rules.highest_score(positive_scores)
    query = normalised(example.query)
    taken = {normalised(passage.text) for passage in existing} | {passage.id for passage in existing}
    left, excluded = [], Counter[str]()
    for candidate in candidates:
        passage = candidate.passage
        text = normalised(passage.text)
        if _is_positive(passage, text, example):
            reason = "positive of this row"
        elif known.in_source(example, passage):
            reason = "positive of the same query"
        elif known.in_qrels(example, passage):
            reason = "relevant in the qrels"
        elif text == query:
            reason = "same text as the query"
        elif any(overlap(passage.text, p.text) > rules.max_overlap for p in example.positives):
            reason = "near-duplicate of a positive"
        elif rules.positive_scores_only and candidate.score <= 0:
            reason = "scores 0"
        elif candidate.score >= limit:
            reason = "scores too near the positive"
        elif text in taken or passage.id in taken:
            reason = "already a negative"
        else:
            taken |= {text, passage.id}
            left.append(candidate)
            continue
        excluded[reason] += 1
    picked = _pick(left, example.query_id, rules)
    if len(left) > len(picked):
        excluded["not needed"] = len(left) - len(picked)
    return picked, excluded


@lru_cache(maxsize=1 << 14)
def normalised(text: str) -> str:
    """Words only, in one case and one form: texts that differ in nothing a reader would notice become equal.

    A text without any word stays as it is.
    """
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())) or text


def overlap(a: str, b: str) -> float:
    """Jaccard similarity of the sets of three-word shingles, from 0 to 1; of words where a text is shorter."""
    size = min(_SHINGLE_WORDS, normalised(a).count(" ") + 1, normalised(b).count(" ") + 1)
    first, second = _shingles(a, size), _shingles(b, size)
    return len(first & second) / len(first | second)


@lru_cache(maxsize=1 << 14)
def _shingles(text: str, size: int) -> frozenset[str]:
    words = normalised(text).split(" ")
    return frozenset(" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def _is_positive(passage: Passage, text: str, example: Example) -> bool:
    return any(passage.id == p.id or text == normalised(p.text) for p in example.positives)


def _pick(left: list[Candidate], query_id: str, rules: Rules) -> list[Candidate]:
    if rules.pick == "top" or len(left) <= rules.negatives:
        return left[: rules.negatives]
    # Seeded by the query, so that it does not matter which process meets it and when.
    rng = np.random.default_rng(_hash(f"{rules.seed} {query_id}"))
    return [left[i] for i in sorted(rng.choice(len(left), rules.negatives, replace=False))]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
