"""What `prepare` shows: a bar while it works, on a terminal only, and a table of lengths."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laser_dist.data.preparation.convert import Converted


class Bar:
    """Share of the sources read, rows per second and time left; `share` is also known without a terminal.

    `sizes` are the bytes of each source; if one is unknown (0), there is no share and no time left.
    """

    def __init__(self, verb: str, sizes: Sequence[int]) -> None:
        from rich import progress
        from rich.console import Console

        self.share = 0.0
        self._sizes, self._before = sizes, [0, *accumulate(sizes)]
        self._rows, self._began = 0, time.monotonic()
        columns = (
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[rows]:,} rows, {task.fields[rate]:,.0f}/s"),
            progress.TimeRemainingColumn(),
        )
        # No thread that refreshes: the worker processes are forks.
        self._progress = progress.Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(verb, total=1 if all(sizes) else None, rows=0, rate=0.0)

    def update(self, kept: int, converted: "Converted") -> None:
        source = converted.source
        if all(self._sizes):
            self.share = (self._before[source] + converted.share * self._sizes[source]) / self._before[-1]
        self.advance(converted.rows)

    def advance(self, rows: int) -> None:
        self._rows += rows
        rate = self._rows / max(1e-9, time.monotonic() - self._began)
        self._progress.update(self._task, completed=self.share, rows=self._rows, rate=rate, refresh=True)

    def __enter__(self) -> "Bar":
        self._began = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal what takes so long."""
    from rich.console import Console

    with Console(stderr=True).status(what) if sys.stderr.isatty() else nullcontext():
        yield


def length_table(lengths: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The lengths of a manifest as lines of a table."""
    head = ("text", "unit", "count", "mean", "p50", "p95", "p99", "max")
    rows = [head] + [
        (field, unit, *(f"{values[name]:,.1f}" if name == "mean" else f"{values[name]:,.0f}" for name in head[2:]))
        for field, units in lengths.items()
        for unit, values in units.items()
    ]
    sides = ["<", "<", *">" * (len(head) - 2)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(form.format(*row) for row in rows)
