"""The result of `laser-dist bench loader` as plain values, as a table, as a sentence about one GPU, as a chart."""

import math
import os
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laser_dist.bench.synthetic import MeanTokens
from laser_dist.errors import UserError
from laser_dist.files import replacing, write_json

if TYPE_CHECKING:
    from laser_dist.bench.loader import Passed, Settings

_BACKWARD = 3  # forward plus a backward of twice its work; nothing is recomputed
_COLOURS = {"ours": "#4878a8", "webdataset": "#d98b3a", "datasets": "#7a9a4c"}


def summarise(settings: "Settings", lengths: dict[str, list[int]], passes: "list[Passed]") -> dict[str, Any]:
    """Percentiles per loader, number of workers and temperature; what one GPU asks for. Times in seconds.

    `lengths`: query id -> tokens of its row and of its passages.
    """
    groups: dict[tuple[str, int, bool], list[Passed]] = {}
    for done in passes:
        groups.setdefault((done.loader, done.workers, done.cold), []).append(done)
    rows = [_row(loader, workers, cold, group) for (loader, workers, cold), group in sorted(groups.items(), key=_order)]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **_environment(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "examples": len(lengths),
        "tokens_per_example": sum(map(sum, lengths.values())) / len(lengths),
        "loaders": rows,
    }
    return result | {"gpu": gpu_demand(settings, list(lengths.values()), rows)}


def gpu_demand(settings: "Settings", lengths: list[list[int]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What one GPU takes, by the FLOPs of a step that trains every weight, and how many of our workers give that.

    Forward: 2 P T + 2 A L sum(l^2) for P parameters, T tokens, attention width A, L layers, rows of l tokens.
    Each text runs K - 1 soft tokens on. The LM head sees so few rows that it is left out.
    """
    flops = 0.0
    for row in lengths:
        tokens = sum(row) + (settings.steps - 1) * len(row)
        squares = sum(length**2 for length in row)
        flops += 2 * settings.parameters * tokens + 2 * settings.attention_width * settings.layers * squares
    per_example = _BACKWARD * flops / len(lengths)
    examples = settings.gpu_tflops * 1e12 * settings.mfu / per_example
    demand = examples * sum(map(sum, lengths)) / len(lengths)
    ours = [row for row in rows if row["loader"] == "ours"]
    # The least per-worker figure of any number of workers and either temperature.
    slowest = min(row["tokens_per_second_per_worker"]["p50"] for row in ours)
    return {
        "tflop_per_example": per_example / 1e12,
        "examples_per_second": examples,
        "tokens_per_second": demand,
        "worker_tokens_per_second": slowest,
        "workers": math.ceil(demand / slowest),
        "workers_at_peak": math.ceil(demand / settings.mfu / slowest),
    }


def sentence(result: dict[str, Any]) -> str:
    """How many loader processes feed one GPU, with what that rests on."""
    gpu, settings = result["gpu"], result["settings"]
    mean = MeanTokens()
    source = (
        f"synthetic texts, mean tokens query {mean.query:.0f} and rationale {mean.rationale:.0f} (the paper's), "
        f"passage {mean.passage:.0f} (assumed)"
        if settings["paper_lengths"]
        else settings["data"] or "the embedded sample"
    )
    return (
        f"{gpu['workers']} worker(s) feed one GPU: {settings['gpu_tflops']:g} TFLOP/s at {settings['mfu']:.0%} take "
        f"{gpu['tokens_per_second']:,.0f} tokens/s ({gpu['examples_per_second']:.1f} examples/s of "
        f"{gpu['tflop_per_example']:.2f} TFLOP), and one worker gives {gpu['worker_tokens_per_second']:,.0f} tokens/s "
        "here, in the slowest of the conditions measured; a GPU that reached its peak would need "
        f"{gpu['workers_at_peak']}. "
        f"Assumptions: a backbone of {settings['parameters'] / 1e9:g} B parameters without embeddings, "
        f"{settings['layers']} layers, all trained, nothing recomputed, B {settings['queries']}, "
        f"{settings['negatives']} negative(s), K {settings['steps']}; {result['tokens_per_example']:.0f} packed tokens "
        f"per example ({source}); cores as fast as these ({result['device']}). "
        "The GPU's speed is computed, not measured."
    )


def show(result: dict[str, Any]) -> None:
    """Print table and sentence."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Reading, tokenising and packing the same examples", caption_justify="left")
    headings = (
        "loader",
        "workers",
        "pages",
        "examples/s p20",
        "p50",
        "p80",
        "tokens/s p50",
        "per worker",
        "per CPU s",
        "first s",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("loader", "pages") else "right")
    for row in result["loaders"]:
        examples = [f"{row['examples_per_second'][p]:,.1f}" for p in ("p20", "p50", "p80")]
        keys = ("tokens_per_second", "tokens_per_second_per_worker", "tokens_per_cpu_second")
        tokens = [f"{row[key]['p50']:,.0f}" for key in keys]
        first = f"{row['first_batch_seconds']['p50']:.2f}"
        table.add_row(row["loader"], str(row["workers"]), "cold" if row["cold"] else "warm", *examples, *tokens, first)
    versions = " · ".join(f"{name} {result[name]}" for name in ("torch", "tokenizers", "webdataset", "datasets"))
    table.caption = (
        f"{result['date']} · {result['device']} · {versions}\n"
        f"{result['examples']:,} examples of {result['tokens_per_example']:.0f} packed tokens; "
        f"{result['settings']['rounds']} passes each, in alternating order; all yield the same tokens\n"
        "per CPU s: tokens per second of processor time of the loader processes; first s: until the first batch"
    )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    console.print(sentence(result))


def write(path: Path, result: dict[str, Any]) -> None:
    """The result as JSON, and a chart beside it if matplotlib is there. Raises UserError."""
    try:
        write_json(path, result)
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("no chart without matplotlib: pip install 'laser-dist[plots]'", file=sys.stderr)
            return
        figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
        _draw(figure, result)
        with replacing(path.with_suffix(".png")) as temporary:
            figure.savefig(temporary, format="png")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error}") from error


def _draw(figure: Any, result: dict[str, Any]) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    workers = sorted({row["workers"] for row in result["loaders"]})
    width = 0.8 / len(_COLOURS)
    for axes, cold in zip(panels, (True, False), strict=True):
        for number, (loader, colour) in enumerate(_COLOURS.items()):
            rows = {r["workers"]: r for r in result["loaders"] if r["loader"] == loader and r["cold"] == cold}
            rates = [rows[w]["tokens_per_second"] for w in workers]
            heights = np.array([rate["p50"] for rate in rates])
            spread = np.abs([[rate["p20"] for rate in rates] - heights, [rate["p80"] for rate in rates] - heights])
            places = np.arange(len(workers)) + (number - 1) * width
            bars = axes.bar(places, heights / 1e3, width, color=colour, label=loader)
            axes.errorbar(places, heights / 1e3, spread / 1e3, fmt="none", color="#222222", capsize=3)
            axes.bar_label(bars, [f"{height / 1e3:,.0f}" for height in heights], label_type="center", color="white")
        axes.axhline(
            result["gpu"]["tokens_per_second"] / 1e3, color="#c0392b", linestyle="--", label="one GPU (computed)"
        )
        axes.set_xticks(range(len(workers)), list(map(str, workers)))
        axes.set(xlabel="loader processes", title="cold: not in the page cache" if cold else "warm: in the page cache")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("thousand packed tokens/s (p50; p20 to p80)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Loader throughput, {result['tokens_per_example']:.0f} tokens per example · {result['device']}")


def _row(loader: str, workers: int, cold: bool, group: "list[Passed]") -> dict[str, Any]:
    def percentiles(values: list[float]) -> dict[str, float]:
        return dict(zip(("p20", "p50", "p80"), np.percentile(values, [20, 50, 80]).tolist(), strict=True))

    cached = [done.cached for done in group if done.cached is not None]
    return {
        "loader": loader,
        "workers": workers,
        "cold": cold,
        "examples_per_second": percentiles([done.examples / done.seconds for done in group]),
        "tokens_per_second": percentiles([done.tokens / done.seconds for done in group]),
        "tokens_per_second_per_worker": percentiles([done.tokens / done.seconds / workers for done in group]),
        "tokens_per_cpu_second": percentiles([done.tokens / done.cpu_seconds for done in group]),
        "first_batch_seconds": percentiles([done.first_batch for done in group]),
        "cached_share_before": float(np.mean(cached)) if cached else None,
    }


def _order(item: tuple[tuple[str, int, bool], Any]) -> tuple[bool, int, int]:
    (loader, workers, cold), _ = item
    return not cold, workers, list(_COLOURS).index(loader)


def _environment() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ("torch", "transformers", "tokenizers", "webdataset", "datasets")
    device = f"{names[0] if names else platform.machine()}, {cores} cores"
    return {"device": device, "python": platform.python_version(), **{name: version(name) for name in packages}}


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
