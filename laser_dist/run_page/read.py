"""What a run left in its folder, as plain values. Damaged lines are counted and left out: dead runs have pages, too."""

import json
import math
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError
from laser_dist.observability.ledger import FILE as LEDGER
from laser_dist.run_page.account import Account, account

METRICS = "metrics.jsonl"
_TEXT = 600  # characters shown of one alarm


@dataclass
class Run:
    """One run."""

    folder: Path
    series: dict[str, list[tuple[int, float]]]
    """Scalar -> (step, value), steps ascending; the last of those with the same step."""
    account: Account | None
    config: dict[str, Any]
    """Dotted key -> value of config.toml."""
    alarms: list[tuple[str, str]] = field(default_factory=list)
    """(where it stands, what it says)."""
    damaged_lines: int = 0

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def last_step(self) -> int:
        return max((points[-1][0] for points in self.series.values() if points), default=0)


def read_run(folder: Path) -> Run:
    """UserError unless there is a run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give the output folder of a run")
    if not (folder / METRICS).is_file() and not (folder / LEDGER).is_file():
        # A checkpoint or a folder of runs is what people give instead.
        near = [path.parent for path in sorted(folder.glob(f"*/{METRICS}"))] + [
            parent for parent in folder.absolute().parents if (parent / METRICS).is_file()
        ]
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{folder}: holds neither {METRICS} nor {LEDGER}: give the output folder of a run.{hint}")
    damaged: list[Path] = []
    values: dict[str, dict[int, float]] = {}
    for row in _lines(folder / METRICS, damaged):
        if isinstance(step := row.get("step"), int):
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    values.setdefault(name, {})[step] = float(value)
    return Run(
        folder,
        {name: sorted(points.items()) for name, points in values.items()},
        account(_lines(folder / LEDGER, damaged)),
        _flat(_config(folder / "config.toml")),
        list(_alarms(folder, damaged)),
        len(damaged),
    )


def _lines(path: Path, damaged: list[Path]) -> Iterator[dict[str, Any]]:
    with suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            elif line.strip():
                damaged.append(path)


def _config(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):  # damaged TOML is a ValueError, too
        return tomllib.loads(path.read_text(encoding="utf-8"))
    return {}


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        is_section = isinstance(value, dict) and not prefix
        flat |= _flat(value, f"{key}.") if is_section else {prefix + key: value}
    return flat


def _alarms(folder: Path, damaged: list[Path]) -> Iterator[tuple[str, str]]:
    """What stopped or troubled the run: attempts that failed, ranks' last words, alarms, skipped examples."""
    for path in [*sorted(folder.glob("launch/*.json")), *sorted(folder.glob("launch/attempt-*/*.json"))]:
        record = next(_lines_of_json(path), {})
        if record.get("code", 1) not in (0, 75) and (said := _said(record)):  # a verdict has none
            yield str(path.relative_to(folder)), said
    for path in sorted(folder.glob("alarms/*")):
        said = next(
            (said for file in sorted(path.glob("*.json")) for r in _lines_of_json(file) if (said := _said(r))), ""
        )
        yield str(path.relative_to(folder)), said or "see this folder"
    skipped = list(_lines(folder / "quarantine.jsonl", damaged))
    if skipped:
        yield (
            "quarantine.jsonl",
            f"{len(skipped)} damaged shards or rows were passed over; the first: {_short(json.dumps(skipped[0]))}",
        )


def _lines_of_json(path: Path) -> Iterator[dict[str, Any]]:
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            yield record


def _said(record: dict[str, Any]) -> str:
    """The sentence of an alarm, a verdict or a rank's outcome, and where it belongs."""
    text = next((record[key] for key in ("message", "reason", "cause") if isinstance(record.get(key), str)), "")
    where = [f"{key} {record[key]}" for key in ("rank", "step") if isinstance(record.get(key), int)]
    where += [str(record[key]) for key in ("host", "phase", "rule", "kind") if isinstance(record.get(key), str)]
    return _short(f"{', '.join(where)}: {text or 'failed'}" if where else text)


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else text[:_TEXT] + " ..."


def finite(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in points if math.isfinite(value)]
