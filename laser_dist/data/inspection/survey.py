"""One pass over a training set: lengths in tokens, what truncation does, segments, repetitions, suspicious rows.

Memory does not grow with the texts: a length is a count, a text an 8-byte key. It takes 24 bytes per query and per
distinct passage, and the query ids.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laser_dist.data.inspection.suspicion import Rule
from laser_dist.data.schema import Example, Passage, content_key, passage_key
from laser_dist.data.text import TextFormat

FIELDS = ("query", "rationale", "query + rationale", "passage")
_NAMED = 5  # ids shown per finding
_REMEMBERED = 500_000  # passages whose length is remembered: corpora repeat, and tokenising is what takes time


@dataclass
class Lengths:
    """Tokens per text before truncation, as exact counts."""

    limit: int | None  # the longest that training keeps, None where none of its own holds
    counts: Counter[int] = field(default_factory=Counter)  # tokens -> texts
    cut: int = 0  # texts that truncation shortens

    def __len__(self) -> int:
        return self.counts.total()

    def distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """(lengths,) ascending, and how many texts have each."""
        values = sorted(self.counts)
        return np.array(values, dtype=np.int64), np.array([self.counts[v] for v in values], dtype=np.int64)

    def percentile(self, percent: float) -> int:
        """The least length that `percent` of the texts do not exceed; 0 without texts."""
        values, counts = self.distribution()
        if not len(values):
            return 0
        rank = np.searchsorted(np.cumsum(counts), percent / 100 * counts.sum())
        return int(values[min(rank, len(values) - 1)])

    def summary(self) -> dict[str, Any]:
        """Count, mean, percentiles, limit and truncation as plain values."""
        values, counts = self.distribution()
        texts = len(self)
        return {
            "texts": texts,
            "mean": float((values * counts).sum() / max(1, texts)),
            **{f"p{percent}": self.percentile(percent) for percent in (5, 50, 95, 99)},
            "max": int(values[-1]) if texts else 0,
            "limit": self.limit,
            "cut": self.cut,
            "cut_share": self.cut / max(1, texts),
        }


class KeyPairs:
    """Distinct pairs of 64-bit keys, each with the number of the first row it stood in."""

    def __init__(self) -> None:
        self._table = np.empty((0, 3), dtype=np.int64)
        self._pending = array("q")

    def add(self, first: int, second: int, row: int) -> None:
        self._pending.extend((first, second, row))
        if len(self._pending) >= max(1_000_000, self._table.size):
            self._merge()

    def table(self) -> np.ndarray:
        """(pairs, 3) int64, ascending: first key, second key, row."""
        self._merge()
        return self._table

    def _merge(self) -> None:
        pending = np.frombuffer(self._pending, dtype=np.int64).reshape(-1, 3)
        self._table = _distinct(np.concatenate([self._table, pending]))
        self._pending = array("q")


class Names:
    """Strings by number, in one buffer."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, name: str) -> None:
        self._bytes += name.encode()
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return self._bytes[self._ends[number] : self._ends[number + 1]].decode()


class Survey:
    """What is found in the examples given to `add`; `text` says what the trainer would make of them."""

    def __init__(self, text: TextFormat, rules: Sequence[Rule], *, with_rationale: bool = True):
        self.text, self.rules, self.with_rationale = text, rules, with_rationale
        config = text.config
        limits = (config.max_query_tokens, None, config.max_explicit_tokens, config.max_passage_tokens)
        self.lengths = {name: Lengths(limit) for name, limit in zip(FIELDS, limits, strict=True)}
        self.segments: Counter[int] = Counter()  # segments that training sees -> rationales
        self.suspects: dict[str, list[str]] = {rule.name: [] for rule in rules}  # rule -> the first ids
        self.counts: Counter[str] = Counter()  # rule -> rows; "" counts rows with any
        self.ids = Names()
        self._queries, self._positives, self._negatives = KeyPairs(), KeyPairs(), KeyPairs()
        self._known: dict[int, int] = {}  # hash of a passage -> its tokens

    def add(self, examples: Sequence[Example]) -> None:
        """Take in some examples (at least one); more at once are faster, the tokenizer takes them in parallel."""
        self._measure_queries(examples)
        self._measure_passages([p for example in examples for p in (*example.positives, *example.negatives)])
        for example in examples:
            self._suspect(example)
            row = len(self.ids)
            self.ids.append(example.query_id)
            self._queries.add(passage_key(example.query), row, row)
            for passages, pairs in ((example.positives, self._positives), (example.negatives, self._negatives)):
                for passage in passages:
                    pairs.add(content_key(passage), passage_key(passage.id), row)

    def _measure_queries(self, examples: Sequence[Example]) -> None:
        query, rationale, both = (self.lengths[name] for name in FIELDS[:3])
        for whole in self.text.whole_queries(examples, with_rationale=self.with_rationale):
            cut = self.text.cut_query(whole)
            query.counts[len(whole.prompt)] += 1
            query.cut += len(cut.prompt) < len(whole.prompt)
            if whole.rationale and cut.rationale is not None and cut.segment_ends is not None:
                shortened = len(cut.rationale) < len(whole.rationale)
                rationale.counts[len(whole.rationale)] += 1
                both.counts[len(cut.prompt) + len(whole.rationale) + 1] += 1  # 1: EOS
                rationale.cut += shortened
                both.cut += shortened
                self.segments[len(cut.segment_ends)] += 1

    def _measure_passages(self, passages: Sequence[Passage]) -> None:
        keys = [hash((passage.title, passage.text)) for passage in passages]
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        new = {key: passage for key, passage in zip(keys, passages, strict=True) if key not in self._known}
        if new:
            lengths = map(len, self.text.whole_passages(list(new.values())))
            self._known.update(zip(new, lengths, strict=True))
        passage = self.lengths["passage"]
        for key in keys:
            passage.counts[self._known[key]] += 1
            passage.cut += self._known[key] > self.text.config.max_passage_tokens

    def _suspect(self, example: Example) -> None:
        shown = [rule.name for rule in self.rules if rule.holds(example)]
        self.counts.update(shown)
        self.counts[""] += bool(shown)
        for name in shown:
            if len(self.suspects[name]) < _NAMED:
                self.suspects[name].append(example.query_id)

    def summary(self) -> dict[str, Any]:
        """Everything as plain values."""
        rationales, fewer = self.segments.total(), sum(n for m, n in self.segments.items() if m < self.text.steps)
        return {
            "read": len(self.ids),
            "lengths": {name: lengths.summary() for name, lengths in self.lengths.items()},
            "segments": {
                "rationales": rationales,
                "counts": {str(m): self.segments[m] for m in sorted(self.segments)},
                "fewer_than_steps": fewer,
                "fewer_than_steps_share": fewer / max(1, rationales),
            },
            "repetitions": self._repetitions(),
            "suspicious": {
                "rows": self.counts[""],
                "share": self.counts[""] / max(1, len(self.ids)),
                "rules": [
                    {
                        "name": rule.name,
                        "statement": rule.statement,
                        "rows": self.counts[rule.name],
                        "examples": self.suspects[rule.name],
                    }
                    for rule in self.rules
                ],
            },
        }

    def _repetitions(self) -> list[dict[str, Any]]:
        positives, negatives = self._positives.table(), self._negatives.table()
        passages = _distinct(np.concatenate([positives, negatives]))
        swapped = _distinct(passages[:, [1, 0, 2]])
        shared = negatives[np.isin(negatives[:, 0], positives[:, 0])]
        _, first = np.unique(shared[:, 0], return_index=True)
        found = (
            ("repeated query", "rows whose query text another row before them has", _later(self._queries.table())),
            (
                "passage with several ids",
                "further ids of a passage: copies, but for case, width and spacing",
                _later(passages),
            ),
            ("id with several texts", "further texts under one passage id", _later(swapped)),
            ("negative that is a positive", "distinct passages that answer another row's query", shared[first, 2]),
        )
        return [
            {"name": name, "statement": statement, "count": len(rows), "examples": self._names(rows)}
            for name, statement, rows in found
        ]

    def _names(self, rows: Iterable[int]) -> list[str]:
        return [self.ids[row] for row in sorted(set(map(int, rows)))[:_NAMED]]


def _distinct(table: np.ndarray) -> np.ndarray:
    """Sorted by first and second key, the first row of each pair."""
    table = table[np.lexsort((table[:, 2], table[:, 1], table[:, 0]))]
    return table[np.append(True, (table[1:, :2] != table[:-1, :2]).any(1))[: len(table)]]


def _later(table: np.ndarray) -> np.ndarray:
    """Rows of the pairs whose first key a pair before them has."""
    return table[1:, 2][table[1:, 0] == table[:-1, 0]]
