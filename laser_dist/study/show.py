"""What a person sees of a study on the terminal."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from laser_dist.retrieval.metrics import METRICS
from laser_dist.study.cells import FINISHED, Workspace
from laser_dist.study.collect import Results
from laser_dist.study.report import value_of

COLOURS = {"finished": "green", "failed": "red", "started": "yellow", "waiting": "dim"}


class Progress:
    """A bar of finished cells on a terminal; a line for everything that begins or fails anywhere."""

    def __init__(self, workspace: Workspace, console: Console):
        self.workspace = workspace
        columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("cells", total=None)

    def say(self, line: str) -> None:
        self.bar.console.print(line, markup=False)
        if not self.bar.disable:
            states = [row.state for row in Results(self.workspace).rows]
            self.bar.update(self.task, total=len(states), completed=states.count(FINISHED))

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()


def show_cells(results: Results, console: Console) -> None:
    """All cells with their states."""
    table = Table("cell", "state", f"dev {results.study.metric}", f"test {results.study.metric}", "")
    for row in results.rows:
        dev, test = (_metric(row.measured.get(f"{split}/own"), results.study.metric) for split in ("dev", "test"))
        note = row.failure.get("line", "") if row.state == "failed" else "" if row.chosen else "to choose"
        table.add_row(row.name, f"[{COLOURS[row.state]}]{row.state}[/]", dev, test, note)
    console.print(table)
    counts = results.counts()
    console.print(f"{len(results.rows)} cells: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n))


def show_estimate(results: Results, console: Console) -> None:
    """How many cells are left, and their hours if they take as long as those that ran."""
    left = [row for row in results.rows if row.state != FINISHED and row.cell.trains]
    said = f"{len(results.rows)} cells, {len(left)} runs left to train"
    seconds = [s for row in results.rows if row.cell.trains and (s := row.cell.seconds_per_step()) is not None]
    if not seconds:
        console.print(f"{said}; how long they take is known when the first one has begun: run it, and ask again")
        return
    each = sum(seconds) / len(seconds)
    steps = sum(row.cell.config.train.max_steps or 0 for row in left)
    hours = each * steps / 3600
    console.print(
        f"{said}: {steps} steps at {each:.2f} s (mean of {len(seconds)} runs) are {hours:.1f} hours of training one "
        "after the other; loading, measuring and rewriting come on top"
    )


def show_results(results: Results, console: Console) -> None:
    """The main table of every dataset."""
    for dataset in results.study.datasets:
        table = Table("method", title=dataset)
        for metric in METRICS:
            table.add_column(metric, justify="right")
        for name in ("bm25", "untrained", *results.study.methods):
            if entry := results.entry(dataset, name):
                table.add_row(entry.label, *(value_of(entry.mean(m), entry.spread(m)) for m in METRICS))
        console.print(table)


def _metric(run: dict[str, Any] | None, metric: str) -> str:
    return f"{run['metrics'][metric]:.3f}" if run else ""
