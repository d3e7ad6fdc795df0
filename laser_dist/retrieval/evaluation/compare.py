"""`laser-dist compare`: result files of `laser-dist evaluate` side by side, with paired tests against the first."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from laser_dist.errors import UserError, require
from laser_dist.files import write_json
from laser_dist.reading import LARGEST_RESULTS, read_object
from laser_dist.retrieval.evaluation.significance import Comparison, compare

HELP = """Compare result files of `laser-dist evaluate` with the first of them, query by query.

Per metric: the change, its 95 % bootstrap interval, p of Fisher's randomisation test and of the paired t-test, and on
how many queries it is better (+), equal (=) and worse (−). Files of different queries or data are refused.

Examples:
  laser-dist compare before.json after.json
  laser-dist compare k3.json k1.json k6.json --out steps.json --plot steps.png
  laser-dist compare results.json --bm25                        # the model against BM25 on the same files
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `laser-dist compare`."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Result files; the first is the baseline."""
    bm25: bool = False
    """BM25 of the first file is the baseline instead."""
    metric: str = "ndcg@10"
    """Metric of the plot's lower half, and the one that is listed first."""
    out: Path | None = None
    """Also write the comparison as JSON."""
    plot: Path | None = None
    """Also draw it as a PNG: the means, and the difference per query."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for files that cannot be compared."""
    args = tyro.cli(Arguments, args=argv, prog="laser-dist compare", description=HELP)
    if len(args.results) + args.bm25 < 2:
        raise UserError("compare: give at least two result files, or one and --bm25")
    for flag, path in (("--out", args.out), ("--plot", args.plot)):
        if path is not None and path.is_dir():
            raise UserError(f"{flag} {path}: is a folder: give the name of a file")
    if args.plot is not None:
        require("--plot", "matplotlib", extra="plots")
    systems = read_systems(args.results, bm25=args.bm25)
    metrics = _metrics(systems, args.metric)
    baseline, *others = systems
    columns = {name: {metric: _column(rows, metric) for metric in metrics} for name, rows in systems.items()}
    found = {
        name: {metric: compare(columns[baseline][metric], columns[name][metric]) for metric in metrics}
        for name in others
    }
    for name, comparisons in found.items():
        _print_table(baseline, name, comparisons)
    queries = len(next(iter(systems.values())))
    several = f"; p-values are not adjusted for {len(others)} comparisons" if len(others) > 1 else ""
    print(f"{queries} queries{several}")
    if args.out is not None:
        write_json(args.out, _report(baseline, queries, found))
    if args.plot is not None:
        from laser_dist.retrieval.evaluation.plot import plot_results

        means = {name: {m: _mean(rows, m) for m in metrics} for name, rows in systems.items()}
        plot_results(args.plot, {name: (means[name], rows) for name, rows in systems.items()}, metric=args.metric)
    return 0


def read_systems(paths: tuple[Path, ...], *, bm25: bool = False) -> dict[str, dict[str, dict[str, float]]]:
    """System name -> query id -> metric -> value, of result files on the same data. Raises UserError."""
    loaded = {path: _load(path) for path in paths}
    if len(loaded) != len(paths):
        raise UserError("compare: a result file is given twice")
    first, *others = loaded
    for path in others:
        _check_same_data(first, loaded[first], path, loaded[path])
    systems = {}
    if bm25:
        if "bm25_per_query" not in loaded[first]:
            raise UserError(f"{first} has no values of BM25 per query: evaluate again without --no-bm25")
        systems["BM25"] = loaded[first]["bm25_per_query"]
    stems = [path.stem for path in paths]
    for path, results in loaded.items():
        # The file's name, with its folder where that tells it from another.
        name = path.stem if stems.count(path.stem) == 1 else str(path.with_suffix(""))
        systems[name] = results["per_query"]
    return systems


def _load(path: Path) -> dict[str, Any]:
    try:
        results = read_object(path, LARGEST_RESULTS)
        per_query = results["per_query"]
        first = next(iter(per_query.values()))
        if len(per_query) < 2 or not all(isinstance(value, int | float) for value in first.values()):
            raise ValueError("per_query: values of at least two queries expected")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a result file of `laser-dist evaluate`: it is not even text") from None
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"{path}: not a result file of `laser-dist evaluate` ({error!r})") from None
    return results


def _check_same_data(first: Path, ours: dict[str, Any], other: Path, theirs: dict[str, Any]) -> None:
    if missing := ours["per_query"].keys() ^ theirs["per_query"].keys():
        listed = ", ".join(map(repr, sorted(missing)[:3]))
        raise UserError(
            f"{first} and {other}: {len(missing)} queries are in one of them only ({listed}): compare results on the "
            "same queries and judgements"
        )
    for name in ("corpus", "queries", "qrels"):
        a, b = (results.get("data", {}).get(name, {}).get("sha256") for results in (ours, theirs))
        if a and b and a != b:
            raise UserError(f"{first} and {other} are results on different {name} files: evaluate both on the same")


def _metrics(systems: Mapping[str, Mapping[str, Mapping[str, float]]], wanted: str) -> list[str]:
    """Metrics that every system has for every query, the wanted one first."""
    rows = [values for per_query in systems.values() for values in per_query.values()]
    common = [metric for metric in rows[0] if all(metric in values for values in rows)]
    if wanted not in common:
        raise UserError(f"--metric {wanted}: the files have {', '.join(common) or 'no metric in common'}")
    return [wanted, *(metric for metric in common if metric != wanted)]


def _column(per_query: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, float]:
    return {query: values[metric] for query, values in per_query.items()}


def _mean(per_query: Mapping[str, Mapping[str, float]], metric: str) -> float:
    return sum(values[metric] for values in per_query.values()) / len(per_query)


def _report(baseline: str, queries: int, found: Mapping[str, Mapping[str, Comparison]]) -> dict[str, Any]:
    systems = {
        name: {metric: dataclasses.asdict(comparison) for metric, comparison in comparisons.items()}
        for name, comparisons in found.items()
    }
    return {"baseline": baseline, "queries": queries, "systems": systems}


def _print_table(baseline: str, name: str, comparisons: Mapping[str, Comparison]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Narrow enough for 80 columns: the systems are named above.
    table = Table(title=f"{name} against {baseline}", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in ("metric", "before", "after", "change", "95 % interval", "p", "p (t-test)", "+ / = / −"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for metric, found in comparisons.items():
        table.add_row(
            metric,
            f"{found.baseline:.4f}",
            f"{found.system:.4f}",
            f"{found.difference:+.4f}",
            f"{found.interval[0]:+.3f} … {found.interval[1]:+.3f}",
            f"{found.p_randomisation:.2g}",
            f"{found.p_t_test:.2g}",
            f"{found.wins} / {found.ties} / {found.losses}",
        )
    Console(file=sys.stdout, highlight=False).print(table)
