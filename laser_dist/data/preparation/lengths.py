"""How long texts are: histograms that add up, take little room, and are exact below 64 and within 1.6 % above."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from laser_dist.data.schema import Example

FIELDS = ("query", "rationale", "positive", "negative")
UNITS = ("characters", "words", "tokens", "segments")
Measured = list[tuple[str, int]]
"""(what, length) pairs of one example, `what` being "query characters" and the like."""


class Histogram:
    """Number, sum and largest of some lengths, and how many fell into each bin."""

    def __init__(self, count: int = 0, total: int = 0, largest: int = 0, bins: dict[str, int] | None = None) -> None:
        self.count, self.total, self.largest = count, total, largest
        self.bins = Counter({int(bin): number for bin, number in (bins or {}).items()})

    def add(self, length: int) -> None:
        self.count += 1
        self.total += length
        self.largest = max(self.largest, length)
        # Six leading bits are kept, so that a histogram has 64 bins and 32 more for every doubling.
        shift = max(0, length.bit_length() - 6)
        self.bins[length >> shift << shift] += 1

    def merge(self, other: "Histogram") -> None:
        self.count, self.total = self.count + other.count, self.total + other.total
        self.largest = max(self.largest, other.largest)
        self.bins.update(other.bins)

    def quantile(self, share: float) -> int:
        """The middle of the bin that holds this quantile."""
        rank, seen = share * self.count, 0
        for bin in sorted(self.bins):
            seen += self.bins[bin]
            if seen >= rank:
                width = 1 << max(0, bin.bit_length() - 6)
                return min(bin + width // 2, self.largest)
        return self.largest

    def summary(self) -> dict[str, float]:
        quantiles = {f"p{round(100 * share)}": self.quantile(share) for share in (0.5, 0.95, 0.99)}
        return {"count": self.count, "mean": round(self.total / self.count, 2), **quantiles, "max": self.largest}


class Lengths:
    """Histograms of every text field in every unit."""

    def __init__(self) -> None:
        self.histograms: defaultdict[str, Histogram] = defaultdict(Histogram)

    def add(self, measured: Iterable[tuple[str, int]]) -> None:
        for what, length in measured:
            self.histograms[what].add(length)

    def merge(self, other: "Lengths") -> None:
        for what, histogram in other.histograms.items():
            self.histograms[what].merge(histogram)

    def to_json(self) -> dict[str, Any]:
        return {what: vars(histogram) for what, histogram in self.histograms.items()}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> "Lengths":
        lengths = cls()
        lengths.histograms.update({what: Histogram(**values) for what, values in table.items()})
        return lengths

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """field -> unit -> count, mean, p50, p95, p99, max; in a fixed order, fields that never occurred left out."""
        table: dict[str, dict[str, dict[str, float]]] = {}
        for field in FIELDS:
            for unit in UNITS:
                if histogram := self.histograms.get(f"{field} {unit}"):
                    table.setdefault(field, {})[unit] = histogram.summary()
        return table


def measure(example: Example) -> Measured:
    """The lengths of an example's texts in characters and words, and of its rationale in segments."""
    from laser_dist.data.text import segment_last_characters

    texts = texts_of(example)
    measured = [(f"{field} characters", len(text)) for field, text in texts]
    measured += [(f"{field} words", len(text.split())) for field, text in texts]
    if example.rationale:
        measured.append(("rationale segments", len(segment_last_characters(example.rationale))))
    return measured


def texts_of(example: Example) -> list[tuple[str, str]]:
    """(field, text) of every text of an example; an empty rationale is none."""
    texts = [("query", example.query)] + ([("rationale", example.rationale)] if example.rationale else [])
    texts += [("positive", passage.text) for passage in example.positives]
    return texts + [("negative", passage.text) for passage in example.negatives]
