"""What a study's cells have measured so far, put together: means over seeds, and tests against the baseline."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any, TypeVar

from laser_dist.retrieval.evaluation.significance import Comparison, compare
from laser_dist.retrieval.metrics import METRICS
from laser_dist.study.cells import BM25, FAILED, FINISHED, UNTRAINED, Cell, Table, Workspace, read
from laser_dist.study.definition import OWN, Method, Study

Key = TypeVar("Key")
TITLES = {BM25: "BM25", UNTRAINED: "untrained"}


@dataclass(frozen=True)
class Entry:
    """One method asked one way on the test queries of one dataset, over its seeds."""

    dataset: str
    method: str
    label: str
    test: str
    by_seed: dict[int | None, Table]
    """What each seed's cell measured; of None for a baseline."""

    @property
    def runs(self) -> list[Table]:
        return list(self.by_seed.values())

    def values(self, metric: str) -> list[float]:
        return [run["metrics"][metric] for run in self.runs]

    def mean(self, metric: str) -> float:
        return mean(self.values(metric))

    def spread(self, metric: str) -> float | None:
        """Standard deviation over seeds (n - 1); None with one seed."""
        return spread_of(self.values(metric))

    @property
    def unshared(self) -> list[float]:
        """Per seed, recall@100 of the relevant passages that share no word with their query."""
        known: list[Any] = [run.get("recall_unshared") for run in self.runs]  # runs of before it was measured have none
        return known if None not in known else []

    def per_query(self, metric: str, other: "Entry") -> dict[str, float]:
        """Query id -> mean over the seeds that `other` has, too; over all where they share none."""
        shared = self.by_seed.keys() & other.by_seed.keys()
        runs = [run for seed, run in self.by_seed.items() if seed in shared or not shared]
        return {query: mean(run["per_query"][query][metric] for run in runs) for query in runs[0]["per_query"]}

    @property
    def seconds(self) -> float | None:
        """To encode one query alone, writing its rationale included; the median over seeds' medians."""
        known = sorted(run["seconds_per_query"] for run in self.runs if "seconds_per_query" in run)
        return known[len(known) // 2] if known else None


@dataclass(frozen=True)
class Row:
    """A cell and how far it is."""

    cell: Cell
    chosen: bool
    """Trained for the report, not only to choose."""
    state: str
    failure: Table
    measured: dict[str, Table]
    """Task name -> what was measured."""

    @property
    def name(self) -> str:
        return self.cell.name


class Results:
    """Everything that the report is made of."""

    def __init__(self, workspace: Workspace):
        self.workspace, self.study = workspace, workspace.study
        self.rows = list(_rows(workspace))
        self.entries = {(e.dataset, e.method, e.test): e for e in self._entries()}

    @property
    def baseline(self) -> str:
        return baseline_of(self.study)

    def entry(self, dataset: str, method: str, test: str = OWN.name) -> Entry | None:
        return self.entries.get((dataset, method, test))

    def methods(self, *, ablation: bool) -> list[Method]:
        return [method for method in self.study.methods.values() if method.ablation == ablation]

    def label(self, method: str) -> str:
        return TITLES.get(method) or self.study.methods[method].label

    def curves(self, dataset: str, method: str) -> list[list[Table]]:
        """metrics.jsonl of each chosen cell that has one."""
        cells = [r.cell for r in self.rows if r.chosen and (r.cell.dataset, r.cell.method) == (dataset, method)]
        return [rows for cell in cells if (rows := cell.curve())]

    def seconds_per_step(self, dataset: str, method: str) -> float | None:
        """Mean over a method's runs; None where none has trained."""
        cells = [row.cell for row in self.rows if (row.cell.dataset, row.cell.method) == (dataset, method)]
        known = [seconds for cell in cells if (seconds := cell.seconds_per_step()) is not None]
        return mean(known) if known else None

    def choice(self, dataset: str, method: str) -> Table:
        return read(self.workspace.out / "cells" / dataset / method / "choice.json")

    @cached_property
    def against_baseline(self) -> dict[tuple[str, str, str], tuple[Comparison, float]]:
        """(dataset, method, test) -> comparison with the baseline, and its p after Holm's correction in the dataset."""
        found: dict[tuple[str, str, str], tuple[Comparison, float]] = {}
        for dataset in self.study.datasets:
            known = {
                (name, test): self.compare((dataset, self.baseline), (dataset, name), (OWN.name, test))
                for name, test in self.listed()
                if (name, test) != (self.baseline, OWN.name)
            }
            found |= {(dataset, *pair): both for pair, both in _corrected(known).items()}
        return found

    def of_reference(self, dataset: str) -> dict[tuple[str, str], tuple[Comparison, float]]:
        """(method, test) -> the study's reference compared with it, and its p after Holm's correction."""
        reference = self.study.reference
        if not reference or reference == self.baseline:
            return {}
        known = {
            (name, test): self.compare((dataset, name), (dataset, reference), (test, OWN.name))
            for name, test in self.listed()
            if (name, test) != (reference, OWN.name)
        }
        return _corrected(known)

    def listed(self) -> list[tuple[str, str]]:
        """(method, test) of each row of the table of methods: baselines, methods, tests that have a title."""
        methods = [method.name for method in self.methods(ablation=False)]
        titled = [test for test in self.study.tests.values() if test.title]
        asked = [(name, test.name) for test in titled for name in test.methods or methods]
        return [(name, OWN.name) for name in (BM25, UNTRAINED, *methods)] + asked

    def title(self, method: str, test: str) -> str:
        """What a row of the table of methods is called."""
        if test == OWN.name:
            return self.label(method)
        asked = self.study.tests[test]
        if asked.title and asked.methods == [method]:
            return asked.title
        return f"{self.label(method)}, {test}"

    def compare(
        self, first: tuple[str, str], second: tuple[str, str], tests: tuple[str, str] = (OWN.name, OWN.name)
    ) -> Comparison | None:
        """Paired over the test queries, each with its mean over the seeds that both have; None where one of the two is
        not there.
        """
        one, other = (self.entry(*side, test) for side, test in zip((first, second), tests, strict=True))
        if one is None or other is None:
            return None
        return compare(one.per_query(self.study.metric, other), other.per_query(self.study.metric, one))

    def counts(self) -> dict[str, int]:
        states = [row.state for row in self.rows]
        return {state: states.count(state) for state in (FINISHED, FAILED, "started", "waiting")}

    def _entries(self) -> Iterator[Entry]:
        found: dict[tuple[str, str, str], dict[int | None, Table]] = {}
        for row in self.rows:
            for name, run in row.measured.items() if row.chosen else ():
                split, _, test = name.partition("/")
                if split == "test":
                    found.setdefault((row.cell.dataset, row.cell.method, test), {})[row.cell.seed] = run
        for (dataset, method, test), by_seed in found.items():
            yield Entry(dataset, method, self.label(method), test, by_seed)

    def table(self) -> list[Table]:
        """One row per cell and measurement, for results.csv."""
        rows = []
        for row in self.rows:
            about = {"dataset": row.cell.dataset, "method": row.cell.method, "seed": row.cell.seed, "cell": row.name}
            for name, run in (row.measured or {"": {}}).items():
                split, _, test = name.partition("/")
                metrics = {metric: run.get("metrics", {}).get(metric) for metric in METRICS}
                others = {value: run.get(value) for value in ("recall_unshared", "seconds_per_query")}
                rows.append({**about, "state": row.state, "split": split, "test": test, **metrics, **others})
        return rows


def spread_of(values: list[float]) -> float | None:
    """Standard deviation (n - 1); None of one value."""
    return stdev(values) if len(values) > 1 else None


def baseline_of(study: Study) -> str:
    return study.baseline or next(iter(study.methods))


def holm(p_values: dict[Key, float]) -> dict[Key, float]:
    """Holm's correction for several comparisons: name -> adjusted p."""
    adjusted: dict[Key, float] = {}
    highest = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        highest = max(highest, min(1.0, p * (len(p_values) - place)))
        adjusted[name] = highest
    return adjusted


def _corrected(known: dict[Key, Comparison | None]) -> dict[Key, tuple[Comparison, float]]:
    """The comparisons that there are, each with its p after Holm's correction for all of them."""
    found = {name: comparison for name, comparison in known.items() if comparison}
    corrected = holm({name: comparison.p_randomisation for name, comparison in found.items()})
    return {name: (comparison, corrected[name]) for name, comparison in found.items()}


def _rows(workspace: Workspace) -> Iterator[Row]:
    """All cells that the study comes to; those of a choice that is not made yet stand at the first point."""
    study = workspace.study
    for dataset in study.datasets:
        for name in (BM25, UNTRAINED):
            yield _row(workspace, workspace.baseline(dataset, name), chosen=True)
        for method in study.methods.values():
            choice = workspace.choice(dataset, method)
            points = [choice or {}] if method.point_of else study.points(method)
            tuned = [(point, study.seeds[0]) for point in points if len(points) > 1]
            final = [(points[0] if choice is None else choice, seed) for seed in study.seeds_of(method)]
            if choice is None and len(points) > 1:
                final = final[1:]  # seed 0 of the chosen point is one of those it is chosen from
            for point, seed in tuned + [pair for pair in final if pair not in tuned]:
                chosen = (point, seed) in final and choice is not None
                yield _row(workspace, workspace.cell(dataset, method, point, seed), chosen=chosen)


def _row(workspace: Workspace, cell: Cell, *, chosen: bool) -> Row:
    tasks = workspace.tasks(cell, chosen=chosen)
    return Row(cell, chosen, cell.state(tasks), cell.failure(), cell.measured(tasks))
