"""The report's charts: quality against latency, learning curves, steps at test time, what a rationale adds."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from laser_dist.files import replacing
from laser_dist.study.cells import BM25
from laser_dist.study.collect import Entry, Results
from laser_dist.study.definition import OWN, Method, Test


def draw_all(results: Results, out: Path) -> dict[str, str]:
    """Draw what there is data for; file name -> caption. Files of charts that are no more are removed."""
    metric = results.study.metric
    among = f"among the judged passages and {results.study.curve_passages} others"
    charts: dict[str, tuple[Callable[[Any, Results, str], bool], str]] = {
        "methods.png": (_methods, f"Test {metric} of every method: mean and standard deviation over seeds."),
        "latency.png": (
            _latency,
            f"Test {metric} against the time to encode one query alone, writing its rationale included (log scale).",
        ),
        "curves.png": (_curves, f"Dev {metric} while training, {among}; mean and standard deviation over seeds."),
        "loss.png": (_losses, "InfoNCE of the latent view while training; mean and standard deviation over seeds."),
        "steps.png": (_steps, f"Test {metric} by latent steps at test time; the ring marks the steps of training."),
        "rewriting.png": (_rewriting, f"What a rationale changes in test {metric}, by how it is read."),
    }
    drawn = {}
    for name, (draw, caption) in charts.items():
        if _draw(out / name, draw, results):
            drawn[name] = caption
        else:
            (out / name).unlink(missing_ok=True)
    return drawn


def _draw(path: Path, draw: Callable[[Any, Results, str], bool], results: Results) -> bool:
    from matplotlib.figure import Figure

    datasets = list(results.study.datasets)
    figure = Figure(figsize=(6.4 * len(datasets), 4.4), layout="constrained")
    shown = False
    for axis, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        axis.set_title(dataset)
        shown |= draw(axis, results, dataset)
    if shown:
        with replacing(path) as temporary:  # without the version of matplotlib: the same data, the same bytes
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return shown


def _colours(results: Results) -> dict[str, str]:
    return {method: f"C{place % 10}" for place, method in enumerate(results.study.methods)}


def _methods(axis: Any, results: Results, dataset: str) -> bool:
    own = [e for (where, _, test), e in results.entries.items() if where == dataset and test == OWN.name]
    metric, colours = results.study.metric, _colours(results)
    own.sort(key=lambda entry: entry.mean(metric))
    for place, entry in enumerate(own):
        colour = colours.get(entry.method, "0.6")
        axis.barh(place, entry.mean(metric), xerr=entry.spread(metric), color=colour, alpha=0.8, capsize=3)
        axis.plot(entry.values(metric), [place] * len(entry.runs), "k.", markersize=4)
    axis.set_yticks(range(len(own)), [entry.label for entry in own])
    axis.set_xlabel(f"test {metric}")
    return bool(own)


def _latency(axis: Any, results: Results, dataset: str) -> bool:
    from matplotlib.ticker import LogFormatter

    metric, colours = results.study.metric, _colours(results)
    found = [results.entry(dataset, *pair) for pair in results.listed() if pair[0] != BM25]
    entries = [entry for entry in found if entry and entry.seconds]
    for entry in entries:
        colour, mark = colours.get(entry.method, "0.4"), "o" if entry.test == OWN.name else "^"
        name, x = results.title(entry.method, entry.test), 1000 * (entry.seconds or 0)
        axis.errorbar(x, entry.mean(metric), entry.spread(metric), fmt=mark, color=colour, capsize=2, label=name)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(LogFormatter())  # 100, not 10²
    axis.xaxis.set_minor_formatter(LogFormatter())
    axis.set(xlabel="ms per query, one at a time", ylabel=f"test {metric}")
    if bm25 := results.entry(dataset, BM25):
        axis.axhline(bm25.mean(metric), color="0.5", linestyle=":", linewidth=1, label="BM25")
    if entries:
        axis.legend(fontsize=7)
    return bool(entries)


def _curves(axis: Any, results: Results, dataset: str) -> bool:
    axis.set_ylabel(f"dev {results.study.metric}")
    return _lines(axis, results, dataset, f"dev/{results.study.metric}", ".-")


def _losses(axis: Any, results: Results, dataset: str) -> bool:
    axis.set_ylabel("InfoNCE of the latent view")
    return _lines(axis, results, dataset, "loss/infonce_latent", "-")


def _lines(axis: Any, results: Results, dataset: str, name: str, style: str) -> bool:
    colours, shown = _colours(results), False
    for method in results.methods(ablation=False):
        if series := _series(results.curves(dataset, method.name), name):
            _band(axis, series, colours[method.name], method.label, style)
            shown = True
    axis.set_xlabel("optimizer step")
    if shown:
        axis.legend(fontsize=7)
    return shown


def _series(runs: list[list[dict]], name: str) -> dict[int, list[float]]:
    """step -> the values of the runs that have one there."""
    found: dict[int, list[float]] = {}
    for rows in runs:
        for row in rows:
            if name in row:
                found.setdefault(row["step"], []).append(row[name])
    return dict(sorted(found.items()))


def _band(axis: Any, series: dict[int, list[float]], colour: str, label: str, style: str) -> None:
    steps, means = list(series), [mean(values) for values in series.values()]
    spreads = [stdev(values) if len(values) > 1 else 0.0 for values in series.values()]
    axis.plot(steps, means, style, color=colour, label=label, linewidth=1.2)
    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axis.fill_between(steps, low, high, color=colour, alpha=0.12)


def _steps(axis: Any, results: Results, dataset: str) -> bool:
    metric, colours, shown = results.study.metric, _colours(results), False
    for method in results.study.methods.values():
        own = _steps_of(results, method)
        points = [(own, results.entry(dataset, method.name))]
        for test in results.study.tests.values():
            if test.steps is not None and test.rationale == "none" and not test.reindex:
                points.append((test.steps, results.entry(dataset, method.name, test.name)))
        found: dict[int, Entry] = {steps: entry for steps, entry in sorted(points, key=lambda p: p[0]) if entry}
        if len(found) < 2:
            continue
        shown = True
        values = [entry.mean(metric) for entry in found.values()]
        spreads = [entry.spread(metric) or 0.0 for entry in found.values()]
        axis.errorbar(list(found), values, yerr=spreads, marker=".", color=colours[method.name], capsize=2,
                      label=f"{method.label}, trained with {own}")  # fmt: skip
        if own in found:
            axis.plot(own, found[own].mean(metric), "o", mfc="none", color=colours[method.name], markersize=10)
    axis.set(xlabel="latent steps of the queries", ylabel=f"test {metric}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if shown:
        axis.legend(fontsize=7)
    return shown


def _steps_of(results: Results, method: Method) -> int:
    return results.study.config(method, results.study.points(method)[0]).thinking.steps


def _rewriting(axis: Any, results: Results, dataset: str) -> bool:
    from matplotlib.patches import Patch

    metric, rows = results.study.metric, []
    tests: list[Test] = [test for test in results.study.tests.values() if test.rationale != "none"]
    names = [BM25, *results.study.methods]
    for test in tests:
        for name in names:
            own, asked = results.entry(dataset, name), results.entry(dataset, name, test.name)
            if own and asked:
                rows.append((f"{own.label}, {test.name}", asked.mean(metric) - own.mean(metric), test.rationale))
    colours = {"oracle": "C0", "generated": "C1"}
    for place, (_, gain, rationale) in enumerate(rows):
        axis.barh(place, gain, color=colours[rationale])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=7)
    axis.set_xlabel(f"change in test {metric}")
    axis.legend(
        handles=[Patch(color=colour, label=f"{name} rationale") for name, colour in colours.items()], fontsize=7
    )
    return bool(rows)
