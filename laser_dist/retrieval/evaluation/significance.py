"""Whether two systems differ by more than the choice of queries: paired tests, all from scipy.

The randomisation test (Fisher's) swaps the two systems' values per query; Smucker, Allan and Carterette (CIKM 2007)
recommend it for retrieval, with Student's t-test close behind. The bootstrap gives the interval.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True)
class Comparison:
    """One metric of a system against the baseline, on the same queries; differences are system minus baseline."""

    baseline: float
    system: float
    difference: float
    interval: tuple[float, float]
    """95 % bootstrap interval of the mean difference (percentiles)."""
    p_randomisation: float
    """Two-sided p of the randomisation test: exact where queries are few, else from 10,000 random swaps."""
    p_t_test: float
    """Two-sided p of the paired t-test."""
    wins: int
    losses: int
    ties: int


def compare(baseline: Mapping[str, float], system: Mapping[str, float]) -> Comparison:
    """Compare two systems' values of one metric, {query id: value}. Raises ValueError unless the queries are the same.

    Deterministic: the random swaps and samples come from a fixed seed.
    """
    if baseline.keys() != system.keys() or len(baseline) < 2:
        raise ValueError("a paired test needs the same queries on both sides, at least two")
    ours_Q, theirs_Q = (np.array([values[query] for query in baseline]) for values in (system, baseline))
    difference_Q = ours_Q - theirs_Q
    interval, p_randomisation, p_t_test = _tests(difference_Q)
    return Comparison(
        baseline=float(theirs_Q.mean()),
        system=float(ours_Q.mean()),
        difference=float(difference_Q.mean()),
        interval=interval,
        p_randomisation=p_randomisation,
        p_t_test=p_t_test,
        wins=int((difference_Q > 0).sum()),
        losses=int((difference_Q < 0).sum()),
        ties=int((difference_Q == 0).sum()),
    )


def _tests(difference_Q: np.ndarray) -> tuple[tuple[float, float], float, float]:
    from scipy.stats import bootstrap, permutation_test, ttest_1samp

    # No spread: the tests divide by it. Nothing differs, or every query by the same; the swaps then say all there is.
    same = bool(np.ptp(difference_Q) == 0)
    if same and difference_Q[0] == 0:
        return (0.0, 0.0), 1.0, 1.0
    # With one sample, "samples" flips signs: the swap of both systems' values on a query.
    swaps = permutation_test(
        (difference_Q,),
        lambda values, axis: np.mean(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(_SEED),
    )
    if same:
        return (float(difference_Q[0]), float(difference_Q[0])), float(swaps.pvalue), 0.0
    interval = bootstrap(
        (difference_Q,),
        np.mean,
        method="percentile",
        n_resamples=_RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    p_t_test = ttest_1samp(difference_Q, 0.0).pvalue
    return (float(interval.low), float(interval.high)), float(swaps.pvalue), float(p_t_test)
