"""`laser-dist replay DUMP`: run the step that an alarm stopped again, in one process, and show its rows."""

import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from laser_dist.errors import UserError
from laser_dist.files import write_json

if TYPE_CHECKING:
    from laser_dist.guard.again import Again, Row, Weights
    from laser_dist.guard.dump import Report

HELP = """Run the batch of an alarm again, all ranks in one process, and say whether the anomaly comes back.

An anomaly that comes back lies in the examples or the weights; one that does not, in a rank, its memory or the network.

Examples:
  laser-dist replay runs/first/alarms/step-000123
  laser-dist replay runs/first/alarms/step-000123 --dtype float64 --rows 20
  laser-dist replay runs/first/alarms/step-000123 --checkpoint runs/first/checkpoints/step-000100 --out replay.json
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is replayed, and how."""

    dump: Annotated[Path, tyro.conf.Positional]
    """Folder that an alarm wrote: OUTPUT/alarms/step-000123."""
    checkpoint: Path | None = None
    """Checkpoint or model folder; unset: weights in the dump, else the run's newest checkpoint before the step."""
    device: str | None = None
    """cpu, cuda, cuda:1; unset: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """Precision of the model; unset: the run's."""
    rows: int = 10
    """Examples to show, the largest gradient first."""
    out: Path | None = None
    """Also write the result to this JSON file."""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for what is no dump, or weights that do not fit."""
    settings = tyro.cli(Settings, args=arguments, prog="laser-dist replay", description=HELP)
    if settings.rows < 1:
        raise UserError(f"--rows {settings.rows}: must be at least 1")
    if not (settings.dump / "alarm.json").is_file():  # told at once: what reads it imports the model's libraries
        raise UserError(f"{settings.dump} is no dump of an alarm: it has no alarm.json; see OUTPUT/alarms")
    from laser_dist.guard.dump import Report

    report = Report.read(settings.dump)

    from laser_dist.observability.console import quiet_libraries

    quiet_libraries()
    again, weights = replayed(settings, report)
    came_back, why = verdict(report, again)
    difference = largest_difference(report, again)
    _print(settings, report, again, weights, difference)
    answer = {True: "yes", False: "no", None: "it cannot"}[came_back]
    print(f"\nDoes the anomaly come back? {answer}: {why}.", end="")
    print("" if weights.exact else " These are not the weights of the moment.")
    if settings.out is not None:
        rows = [_plain(asdict(row)) for row in worst(again)]
        result = {"reproduced": came_back, "why": why, "weights": weights.told, "exact": weights.exact, "rows": rows,
                  "gradient_norm": _number(again.gradient_norm), "largest_difference": _number(difference),
                  "tables": [[_plain(row) for row in table] for table in again.tables]}  # fmt: skip
        write_json(settings.out, result)
    return 0


def replayed(settings: Settings, report: "Report") -> "tuple[Again, Weights]":
    """The step again, and where its weights come from."""
    from laser_dist.guard.again import find_weights, load_retriever, run_again
    from laser_dist.guard.dump import read_batches, read_config
    from laser_dist.retrieval.loading import find_device

    config, device = read_config(settings.dump), find_device(settings.device)
    config = replace(config, objective=replace(config.objective, passages="gather"))  # a ring of one has no others
    batches = read_batches(settings.dump, report)
    weights = find_weights(settings.dump.resolve(), report, settings.checkpoint)
    retriever = load_retriever(config, weights, settings.dtype or config.model.dtype, device)
    return run_again(retriever, config, report, batches, device), weights


def verdict(report: "Report", again: "Again") -> tuple[bool | None, str]:
    """Whether the broken rule is broken again; None where one process, or one batch, cannot tell."""
    table = again.tables[report.micro_batch]
    limit = math.inf if report.limit is None else report.limit

    def largest(name: str) -> float:
        return max(row[name] for row in table)

    if report.rule == "gradient_spike" or report.term == "gradient":
        norm = again.gradient_norm
        return not (math.isfinite(norm) and norm <= limit), f"the norm of the gradient is {norm:.4g}, limit {limit:.4g}"
    if report.rule == "finite":
        bad = sorted({name for row in table for name, value in row.items() if not math.isfinite(value)})
        return bool(bad), f"not finite: {', '.join(bad)}" if bad else "all terms and lengths are numbers"
    if report.rule == "row_norm":
        shortest = min(row["shortest"] for row in table)
        return shortest <= limit, f"the shortest vector has length {shortest:.3g}, limit {limit:.3g}"
    if report.rule == "spread":
        return largest("spread") < limit, f"the passages' variance is {largest('spread'):.2g}, limit {limit:.2g}"
    if report.rule == "labels":
        wrong = int(largest("wrong_labels"))
        return wrong > 0, f"up to {wrong} queries of a rank are labelled with a passage that is none of their positives"
    if report.rule == "negatives":
        share = largest("without_negatives")
        return share >= 1, f"up to {share:.0%} of the queries of a rank have all negatives masked"
    if report.rule == "mean_rank":
        place = sum(row.place for row in again.rows) / len(again.rows)
        return None, f"the positive's mean rank is {place:.1f}, and one step tells little of a mean over many"
    return None, "this needs the other ranks, or the batches before; the terms above are those of a sound process"


def largest_difference(report: "Report", again: "Again") -> float:
    """Between the terms of the run and of the replay, over the larger of 1 and their size; NaN equals NaN."""
    found = [0.0]
    for table, other in zip(report.tables, again.tables, strict=True):
        for row, new in zip(table, other, strict=True):
            for name in (name for name in row if name.startswith("loss/")):
                before = math.nan if row[name] is None else float(row[name] or 0.0)
                both = math.isnan(before) and not math.isfinite(new[name])
                found.append(0.0 if both else abs(before - new[name]) / max(1.0, abs(before)))
    return max(found, key=lambda value: math.inf if math.isnan(value) else value)


def worst(again: "Again") -> "list[Row]":
    """Rows with what is not a number first, then by gradient."""

    def size(row: "Row") -> float:
        return row.gradient if math.isfinite(row.gradient) and math.isfinite(row.loss) else math.inf

    return sorted(again.rows, key=size, reverse=True)


def _print(settings: Settings, report: "Report", again: "Again", weights: "Weights", difference: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"step {report.step}, {report.rule}: {report.reason}")
    console.print(f"weights: {weights.told}")
    terms = Table(title="Terms of the run and again", caption_justify="left")
    for heading in ("micro-batch", "rank", "term", "run", "again", "gradient"):
        terms.add_column(heading, justify="right")
    for number, (table, other) in enumerate(zip(report.tables, again.tables, strict=True)):
        for r in [*range(report.world_size)][:8]:
            for name in (name for name in other[r] if name.startswith("loss/")):
                term = name.removeprefix("loss/")
                norm = again.term_norms[number][r].get(f"gradient_norm/{term}")
                values = (_shown(table[r].get(name)), _shown(other[r][name]), "" if norm is None else _shown(norm))
                terms.add_row(str(number + 1), str(r), term, *values)
    terms.caption = (
        f"largest difference {difference:.2g} · norm of the gradient of all parameters {again.gradient_norm:.4g}"
    )
    console.print(terms)
    rows = Table(
        title=f"Examples, the largest gradient first, {min(settings.rows, len(again.rows))} of {len(again.rows)}"
    )
    for heading in ("query", "micro-batch", "rank", "length", "loss", "positive's rank", "gradient"):
        rows.add_column(heading, justify="left" if heading == "query" else "right")
    for row in worst(again)[: settings.rows]:
        place = (str(row.micro_batch + 1), str(row.rank))
        rows.add_row(row.query_id, *place, *map(_shown, (row.length, row.loss, row.place, row.gradient)))
    console.print(rows)


def _shown(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.5g}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(row: dict) -> dict:
    return {name: _number(value) if isinstance(value, float) else value for name, value in row.items()}
