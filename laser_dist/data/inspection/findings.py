"""What `inspect` prints: examples and tables for people, or one JSON value for programs."""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from laser_dist.data.inspection.show import ShownRow, legend, render, safe
from laser_dist.data.schema import Example

_WIDTH = 120  # where there is no terminal


class Printer:
    """Prints to stdout as it goes; in colour on a terminal, with brackets elsewhere."""

    def __init__(self) -> None:
        self.console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
        self.colour = self.console.is_terminal and not self.console.no_color
        self._told = False

    def show(self, example: Example, rows: Sequence[ShownRow]) -> None:
        if not self._told:
            self.console.print(legend(colour=self.colour), "")
        self._told = True
        self.console.print(render(example, rows, colour=self.colour))

    def finish(self, report: dict[str, Any] | None = None) -> None:
        if report is not None:
            self.console.print(tables(report))


class JsonPrinter:
    """Prints everything as one JSON value at the end: the report, with the examples under "shown"."""

    def __init__(self) -> None:
        self.shown: list[dict[str, Any]] = []

    def show(self, example: Example, rows: Sequence[ShownRow]) -> None:
        self.shown.append(
            {"query_id": example.query_id, "rows": [asdict(row) | {"tokens": row.tokens} for row in rows]}
        )

    def finish(self, report: dict[str, Any] | None = None) -> None:
        print(json.dumps((report or {}) | {"shown": self.shown}, indent=2, ensure_ascii=False))


def plain(example: Example, rows: Sequence[ShownRow]) -> str:
    """An example without colour, as it looks where there is no terminal."""
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    console.print(legend(colour=False), "", render(example, rows, colour=False))
    return console.file.getvalue()  # type: ignore[attr-defined]


def tables(report: dict[str, Any]) -> RenderableType:
    """The report for people."""
    read, total = report["read"], report["examples"]
    head = f"{report['shards']}: {read:,} examples" + ("" if read == total else f", a random sample of {total:,}")
    sampled = Text("Repetitions are those within the sample: the whole set has more.", style="dim")
    return Group(
        Text(head, style="bold"),
        Text(f"tokenizer {report['tokenizer']}\n", style="dim"),
        _lengths(report["lengths"]),
        Text(_segments(report) + "\n"),
        _found("Repetitions", report["repetitions"], "count"),
        *([] if read == total else [sampled]),
        _found("Suspicious rows: signs, not verdicts", report["suspicious"]["rules"], "rows"),
        Text(f"{report['suspicious']['rows']:,} rows ({report['suspicious']['share']:.2%}) show at least one sign"),
    )


def _lengths(lengths: dict[str, dict[str, Any]]) -> Table:
    table = _table("Tokens before truncation, template included", "text")
    for heading in ("texts", "mean", "p5", "p50", "p95", "p99", "max", "limit", "cut"):
        table.add_column(heading, justify="right")
    for name, row in lengths.items():
        percentiles = [f"{row[key]:,}" for key in ("p5", "p50", "p95", "p99", "max")]
        limit = "" if row["limit"] is None else f"{row['limit']:,}"
        cut = f"{row['cut']:,} ({row['cut_share']:.1%})" if row["texts"] else ""
        table.add_row(name, f"{row['texts']:,}", f"{row['mean']:.1f}", *percentiles, limit, cut)
    return table


def _segments(report: dict[str, Any]) -> str:
    segments, steps = report["segments"], report["thinking"]["steps"]
    if not segments["rationales"]:
        return "No rationale was measured."
    counts = {int(m): n for m, n in segments["counts"].items()}
    few = ", ".join(f"{m}: {n / segments['rationales']:.1%}" for m, n in list(counts.items())[:8])
    more = f", up to {max(counts)}" if len(counts) > 8 else ""
    return (
        f"Segments per rationale (M), after truncation: {few}{more}\n"
        f"M < K = {steps}: {segments['fewer_than_steps']:,} rationales ({segments['fewer_than_steps_share']:.1%}); "
        "their steps share segments"
    )


def _found(title: str, findings: list[dict[str, Any]], unit: str) -> RenderableType:
    present = [finding for finding in findings if finding[unit]]
    absent = ", ".join(finding["name"] for finding in findings if not finding[unit])
    table = _table(title, "sign")
    table.add_column("what it means")
    table.add_column(unit, justify="right")
    table.add_column("for example", overflow="fold")
    for finding in present:
        ids = ", ".join(map(safe, finding["examples"][:3]))
        table.add_row(finding["name"], finding["statement"], f"{finding[unit]:,}", Text(ids))
    none = Text(f"none: {absent}\n", style="dim")
    if not present:
        return Group(Text(title, style="italic"), none)
    return Group(table, none) if absent else table


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    return table
