"""The rules of the guard, as pure functions of what all ranks gathered, so that all come to the same decision.

A table has a row per rank: the values of `guard/evidence.py` for one micro-batch. Rules that look back keep `Windows`;
after a resume these are empty, and such a rule is silent until its window is full again.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean, median

from laser_dist.config import RunConfig
from laser_dist.objective.evidence import MODULUS
from laser_dist.objective.terms import TERMS

Table = list[dict[str, float]]

NORMS = 100
"""Steps whose gradient norms make the median of a spike, of which there must be HISTORY."""
HISTORY = 32
RANK_QUERIES = 1024
"""Queries whose mean rank is compared with chance: their mean is off by 2 % of chance by luck (one sigma)."""
RANK_SHARE = 0.95
"""Of chance. Labels of other rows give 0.97 and more, a model that has learned a little 0.8."""
SEGMENT_QUERIES = 256
"""Rationales that must all have fewer segments than steps before it is called the rule and not bad luck."""
BATCHES = 64
"""Micro-batches that a batch is compared with."""


@dataclass(frozen=True)
class Rule:
    """What an alarm says to the user."""

    remedy: str
    stops: bool | None = None
    """Whether a run stops: as guard.alarm says (None), always, or never."""


RULES = {
    "finite": Rule("Look at these examples, lower optimizer.learning_rate, or ramp objective weights in", True),
    "schedule": Rule("Look at [optimizer] and [objective] of the recipe on every host", True),
    "row_norm": Rule("Look at these texts (empty, or one repeated token?); guard.row_norm is the limit"),
    "spread": Rule(
        "The model has collapsed: resume from a checkpoint before it with a lower optimizer.learning_rate or "
        "objective.output_weight, or a longer objective.ramp_steps; guard.spread is the limit"
    ),
    "gradient_spike": Rule(
        "Look at these examples, or lower optimizer.learning_rate; guard.gradient_spike is the limit"
    ),
    "labels": Rule("A batch was put together wrongly: this is an error of the program or of memory, not of the data"),
    "mean_rank": Rule(
        "Nothing was learned: check that positives belong to their queries (laser-dist inspect), raise "
        "optimizer.learning_rate, or objective.ramp_steps; guard.rank_after is when this is asked first"
    ),
    "negatives": Rule("Every passage is a copy of a positive: look for repeated passages with laser-dist inspect"),
    "duplicate": Rule("The order of the data is broken, or ranks read the same part: compare shards and versions"),
    "gather": Rule("A collective gave stale or foreign rows: check network and NCCL; the hosts named come first"),
    "replicas": Rule("Memory or a link is broken: take the host of the rank named out, and resume"),
    "segments": Rule("Steps share segments: lower thinking.steps, or part rationales by blank lines", False),
}


@dataclass(frozen=True)
class Alarm:
    """One broken rule."""

    rule: str
    reason: str
    value: float
    limit: float
    ranks: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    """Of the batch of the first rank named: B queries, then P passages."""
    term: str = ""


@dataclass
class Windows:
    """What rules remember; alike on all ranks."""

    norms: deque[float] = field(default_factory=lambda: deque(maxlen=NORMS))
    ranks: deque[tuple[float, int]] = field(default_factory=deque)
    batches: deque[tuple[int, tuple[float, ...]]] = field(default_factory=lambda: deque(maxlen=BATCHES))
    rationales: int = 0
    all_short: bool = True


@dataclass(frozen=True)
class Moment:
    """What a table says nothing of: the same numbers on all ranks."""

    step: int
    """Optimizer steps before this one."""
    queries: int
    """Of all ranks, in a micro-batch."""
    passages: int
    """N, in a micro-batch."""
    whole_pass: int | None
    """Which pass over the data the micro-batch lies in; None if in two, or if examples may come twice in a pass."""


def finite(table: Table, moment: Moment, windows: Windows, config: RunConfig) -> Alarm | None:
    """Every term on every rank is a number. The lengths of vectors count: a NaN shows there first."""
    names = [*TERMS, "total"]
    bad = [(r, n) for r, row in enumerate(table) for n in names if not math.isfinite(row[f"loss/{n}"])]
    bad = [(r, n) for r, n in bad if n != "total"] or bad
    bad += [(r, "row norms") for r, row in enumerate(table) if not math.isfinite(row.get("typical", 0.0))]
    if not bad:
        return None
    rank, term = bad[0]
    told = ", ".join(f"{name} on rank {r}" for r, name in bad)
    value = table[rank].get(f"loss/{term}", math.nan)
    return Alarm("finite", f"not finite: {told}", value, math.inf, _unique(r for r, _ in bad), term=term)


def schedule(table: Table, moment: Moment, windows: Windows, config: RunConfig) -> Alarm | None:
    """Learning rate and weights of the terms are numbers, and the same ones at the same step, on all ranks."""
    for name in ("step", "learning_rate", "weights"):
        values = [row[name] for row in table]
        bad = tuple(r for r, value in enumerate(values) if not math.isfinite(value))
        other = tuple(r for r, value in enumerate(values) if value != values[0])
        if bad or other:
            said = f"{name} is not finite" if bad else f"ranks do not agree on {name}"
            ranks = bad or other
            return Alarm("schedule", f"{said}: {values[ranks[0]]:g}", values[ranks[0]], values[0], ranks, term=name)
    return None


def labels(table: Table, moment: Moment, windows: Windows, config: RunConfig) -> Alarm | None:
    """The passage that a query is trained towards is one of its positives: exact, from the first step, whatever tau."""
    ranks = tuple(r for r, row in enumerate(table) if row["wrong_labels"])
    if not ranks:
        return None
    count = int(sum(row["wrong_labels"] for row in table))
    reason = f"{count} queries are labelled with a passage that is none of their positives"
    return Alarm("labels", reason, count, 0, ranks, term="labels")


def gather(table: Table, moment: Moment, windows: Windows, config: RunConfig) -> Alarm | None:
    """Every rank compared the passages that the others sent, in their places."""
    if config.objective.passages == "ring":
        return None  # they only pass by
    expected = sum((2 * r + 1) * int(row["sent"]) for r, row in enumerate(table)) % MODULUS
    ranks = tuple(r for r, row in enumerate(table) if int(row["received"]) != expected)
    if not ranks:
        return None
    reason = f"gathered passages are not what ranks sent, on rank{_plural(ranks)} {_list(ranks)}"
    return Alarm("gather", reason, table[ranks[0]]["received"], expected, ranks, term="passages")


def row_norm(table: Table, moment: Moment, windows: Windows, config: RunConfig) -> Alarm | None:
    """No vector is so short that its row's gradient drowns all others."""
    limit = config.guard.row_norm * median(row["typical"] for row in table)
    ranks = sorted((row["shortest"], r) for r, row in enumerate(table) if row["shortest"] <= limit)
    if not config.guard.row_norm or not ranks:
        return None
    value, rank = ranks[0]
    reason = f"a vector of length {value:.3g} before it gets unit length, at most {limit:.3g} allowed, on rank {rank}"
    rows = (int(table[rank]["shortest_row"]),)
    return Alarm("row_norm", reason, value, limit, (rank,), rows, term="row norm")


def spread(table: Table, moment: Moment, windows: Windows, config: RunConfig) -> Alarm | None:
    """Passages differ, on one rank at least."""
    value = max(row["spread"] for row in table)
    if value >= config.guard.spread:
        return None
    reason = f"the vectors of all passages are alike: variance {value:.2g}, limit {config.guard.spread:g}"
    return Alarm("spread", reason, value, config.guard.spread, term="infonce_latent")


def negatives(table: Table, moment: Moment, windows: Windows, config: RunConfig) -> Alarm | None:
    """On no rank are all queries without a negative: their loss would be 0."""
    ranks = tuple(r for r, row in enumerate(table) if row["without_negatives"] >= 1)
    if not ranks:
        return None
    reason = f"all negatives of all queries are masked on rank{_plural(ranks)} {_list(ranks)}"
    return Alarm("negatives", reason, 1, 1, ranks, term="false negatives")


def duplicate(table: Table, moment: Moment, windows: Windows, config: RunConfig) -> Alarm | None:
    """Within a pass over the data no batch comes again, on no other rank either, and none is one query repeated."""
    if moment.whole_pass is None:
        return None
    batch = tuple(row["queries"] for row in table)
    seen, now = list(windows.batches), (moment.whole_pass, batch)
    windows.batches.append(now)
    per_rank = moment.queries // len(table)
    if ranks := tuple(r for r, row in enumerate(table) if row["distinct"] == 1 and per_rank > 1):
        reason = f"all {per_rank} queries are the same one on rank{_plural(ranks)} {_list(ranks)}"
        return Alarm("duplicate", reason, 1, per_rank, ranks, term="queries")
    if ranks := tuple(r for r, value in enumerate(batch) if batch.count(value) > 1):
        return Alarm("duplicate", f"ranks {_list(ranks)} have the same queries", 0, 0, ranks, term="queries")
    if now in seen:
        back = len(seen) - seen.index(now)
        return Alarm("duplicate", f"the batch of {back} micro-batches ago came again", back, 0, term="queries")
    return None


def mean_rank(table: Table, moment: Moment, windows: Windows, config: RunConfig) -> Alarm | None:
    """The positive's mean rank leaves chance: the one sign of wrong pairs that does not depend on tau."""
    rank = fmean(row["train/positive_mean_rank"] for row in table)
    masked = fmean(row.get("train/false_negatives_masked", 0.0) for row in table)
    rivals = moment.passages * (1 - masked) - 1
    if rivals <= 0:
        return None
    window = windows.ranks
    window.append((2 * (rank - 1) / rivals, moment.queries))
    while sum(n for _, n in window) - window[0][1] >= RANK_QUERIES:
        window.popleft()
    queries = sum(n for _, n in window)
    value = sum(share * n for share, n in window) / queries
    if moment.step < config.guard.rank_after or queries < RANK_QUERIES or value < RANK_SHARE:
        return None
    reason = f"the positive's mean rank is {value:.2f} of chance over {queries} queries, limit {RANK_SHARE}"
    return Alarm("mean_rank", reason, value, RANK_SHARE, term="infonce_latent")


def segments(table: Table, moment: Moment, windows: Windows, config: RunConfig) -> Alarm | None:
    """Some rationale has as many segments as there are latent steps to align with them."""
    count = int(sum(row["rationales"] for row in table))
    if not count or not config.objective.trajectory_weight:
        return None
    before = windows.rationales
    windows.rationales += count
    windows.all_short &= sum(row["short_rationales"] for row in table) == count
    if before >= SEGMENT_QUERIES or windows.rationales < SEGMENT_QUERIES or not windows.all_short:
        return None  # asked once
    steps = config.thinking.steps
    reason = f"each of {windows.rationales} rationales has fewer segments than the {steps} steps to align with them"
    return Alarm("segments", reason, 1, 1, term="kl_trajectory")


CHECKS: tuple[Callable[[Table, Moment, Windows, RunConfig], Alarm | None], ...] = (
    finite, schedule, labels, gather, row_norm, spread, negatives, duplicate, mean_rank, segments,
)  # fmt: skip
"""The first that is broken speaks: causes before what follows from them."""


def gradient_limit(windows: Windows, config: RunConfig) -> float:
    """Largest gradient norm that is no spike; infinite until there is a history.

    A norm below what clipping keeps takes nothing from other steps, however much it is above a median near 0.
    """
    if len(windows.norms) < HISTORY:
        return math.inf
    return config.guard.gradient_spike * max(median(windows.norms), config.optimizer.gradient_clipping)


def _unique(ranks: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ranks))


def _list(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _plural(ranks: tuple[int, ...]) -> str:
    return "s" if len(ranks) > 1 else ""
