"""What mining did, in numbers and in one picture."""

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from laser_dist.data.mining.negatives import REASONS, Rules

_NAMED = 20  # ids of queries that got too few negatives
_BINS = 20


class Report:
    """Gathers the records of all rows."""

    def __init__(self, rules: Rules, *, drops: bool = False):
        self.rules, self.drops = rules, drops  # rows without negatives do not get into the file
        self.rows = 0
        self.ranks: list[int] = []
        self.scores: list[float] = []
        self.positives: list[float] = []
        self.excluded: Counter[str] = Counter()
        self.short: list[str] = []
        self.without = 0

    def add(self, record: dict[str, Any]) -> None:
        self.rows += 1
        self.ranks += [rank for rank, _ in record["picked"]]
        self.scores += [score for _, score in record["picked"]]
        self.positives += record["positives"]
        self.excluded.update(record["excluded"])
        if len(record["picked"]) < self.rules.negatives:
            self.short.append(record["row"]["query_id"])
            self.without += not record["row"]["negatives"]

    def statistics(self) -> dict[str, Any]:
        """Scores are BM25's, or inner products of unit vectors; `excluded` counts candidates in the rank window."""
        return {
            "queries": self.rows,
            "negatives": len(self.ranks),
            "mean_rank": _mean(self.ranks),
            "mean_score": _mean(self.scores),
            "mean_positive_score": _mean(self.positives),
            "excluded": {reason: self.excluded[reason] for reason in REASONS if self.excluded[reason]},
            "queries_with_fewer": len(self.short),
            "queries_with_fewer_ids": self.short[:_NAMED],
            "queries_without": self.without,
            "rank_histogram": _histogram(self.ranks, self._rank_edges()),
            "score_histogram": _histogram(self.scores, _BINS),
        }

    def summary(self, out: Path, plotted: bool) -> str:
        """The same for reading."""
        found = self.statistics()
        rows = self.rows - self.without * self.drops
        lines = [f"{out}: {rows:,} rows, {len(self.ranks):,} negatives"]
        if self.ranks:
            lines.append(
                f"mean rank {found['mean_rank']:.1f}, mean score {found['mean_score']:.4g}; "
                f"positives score {found['mean_positive_score']:.4g} on average"
            )
        lines += [f"left out: {count:,} ({reason})" for reason, count in found["excluded"].items()]
        if self.short:
            named = ", ".join(self.short[:3]) + (", ..." if len(self.short) > 3 else "")
            lines.append(
                f"{len(self.short):,} queries got fewer than {self.rules.negatives} ({named}), {self.without:,} of "
                f"them have none{' and were dropped' * self.drops}: widen --ranks, or relax what leaves most out"
            )
        if not plotted:
            lines.append("no plot: pip install 'laser-dist[plots]'")
        return "\n".join(lines)

    def _rank_edges(self) -> np.ndarray:
        """Between whole ranks, equally many in each bin."""
        first, last = self.rules.ranks
        width = -(-(last - first + 1) // _BINS)
        return np.arange(first, last + 1 + width, width) - 0.5

    def plot(self, path: Path) -> bool:
        """Histograms of ranks and scores as PNG; False without matplotlib."""
        if find_spec("matplotlib") is None:
            return False
        from matplotlib.figure import Figure

        from laser_dist.files import replacing

        figure = Figure(figsize=(9, 3), layout="constrained")
        ranks, scores = figure.subplots(1, 2)
        ranks.hist(self.ranks, bins=self._rank_edges())
        ranks.set(xlabel="rank of the negatives", ylabel="negatives")
        edges = np.histogram_bin_edges([*self.scores, *self.positives], bins=2 * _BINS)
        for values, name in ((self.scores, "negatives"), (self.positives, "positives")):
            if values:
                scores.hist(values, bins=edges, density=True, label=name, histtype="stepfilled", alpha=0.6)
        scores.set(xlabel="score", ylabel="density")
        scores.legend()
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        return True


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _histogram(values: Sequence[float], bins: Any) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=bins) if values else (np.zeros(0), np.zeros(0))
    return {"counts": counts.tolist(), "edges": edges.tolist()}
