"""Results as one picture: the means of every system, and what changed query by query."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laser_dist.files import replacing

Systems = Mapping[str, tuple[Mapping[str, float], Mapping[str, Mapping[str, float]]]]
"""System name -> (metric -> mean, query id -> metric -> value); the first is what the others are compared with."""


def plot_results(path: str | Path, systems: Systems, *, metric: str = "ndcg@10") -> None:
    """A PNG with bars of all metrics and, where there are two systems or more, `metric`'s difference per query."""
    from matplotlib.figure import Figure

    several = len(systems) > 1
    figure = Figure(figsize=(9, 6.4 if several else 3.2), layout="constrained")
    axes = figure.subplots(1 + several, 1, squeeze=False)[:, 0]
    _bars(axes[0], systems)
    if several:
        _differences(axes[1], systems, metric)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _bars(axis: Any, systems: Systems) -> None:
    metrics = list(next(iter(systems.values()))[0])
    width = 0.8 / len(systems)
    for place, (name, (means, _)) in enumerate(systems.items()):
        left = [column - 0.4 + (place + 0.5) * width for column in range(len(metrics))]
        bars = axis.bar(left, [means[metric] for metric in metrics], width, label=name, color=f"C{place}")
        axis.bar_label(bars, fmt="%.3f", fontsize=8, padding=1)
    axis.set_xticks(range(len(metrics)), metrics)
    axis.set(ylim=(0, 1.08), ylabel="mean over the queries")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(systems), frameon=False)


def _differences(axis: Any, systems: Systems, metric: str) -> None:
    """Each other system's differences sorted: the area above the line is won, the area below it lost."""
    (baseline, (_, base)), *others = systems.items()
    for place, (name, (_, per_query)) in enumerate(others, start=1):
        values = sorted((per_query[query][metric] - base[query][metric] for query in base), reverse=True)
        better, worse = (sum(value * sign > 0 for value in values) for sign in (1, -1))
        label = f"{name}: {better} better, {worse} worse, {len(values) - better - worse} equal"
        ranks = range(1, len(values) + 1)
        axis.step(ranks, values, where="mid", color=f"C{place}", label=label)
        axis.fill_between(ranks, values, step="mid", color=f"C{place}", alpha=0.15)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="queries, sorted by the difference", ylabel=f"{metric} minus {baseline}'s", ylim=(-1.05, 1.05))
    axis.legend()
