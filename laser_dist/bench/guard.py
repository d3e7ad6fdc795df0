"""`laser-dist bench guard`: what the guard catches, what it cries for nothing, and what it costs.

1. Anomalies (bench/anomalies.py), each put into a real training on two ranks: caught in time, by which rule, and were
   parameters and optimizer states left to the bit?
2. Clean steps with the default limits: a run that an alarm stops is a failure, and how near the limits were is shown.
3. Rounds of steps with the guard and without it, one after the other in one process. A step's own time varies by more
   than the guard takes, so the CPU time inside the guard's functions is summed up, with it and without it.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError
from laser_dist.files import write_json
from laser_dist.model.embedded import CACHED_BACKBONE

HELP = """Put anomalies into trainings of a tiny model, train it cleanly, and time the guard.

Examples:
  laser-dist bench guard
  laser-dist bench guard --clean 500 --rounds 0
  laser-dist bench guard --no-anomalies --clean 0 --rounds 20 --model .cache/laser_dist/smollm2-135m --layers 4
"""

# Clean runs besides the long one: name, share of its steps, ranks, flags. Adapters on a tiny model with random weights
# diverge at higher rates: losses of 35 after 5 and gradients 1,000 times the median's, which is no clean step.
VARIANTS: tuple[tuple[str, float, int, tuple[str, ...]], ...] = (
    ("float32, ZeRO-0", 1.0, 1, ()),
    ("LoRA with dropout, ZeRO-1", 0.1, 1, ("--model.lora-rank", "4", "--model.lora-dropout", "0.1",
                                           "--train.deepspeed", "zero1", "--optimizer.learning-rate", "5e-4")),
    ("bfloat16, ZeRO-2", 0.1, 1, ("--model.dtype", "bfloat16", "--train.deepspeed", "zero2")),
    ("two ranks, ZeRO-3, two micro-batches", 0.05, 2, ("--train.deepspeed", "zero3-test", "--train.accumulation", "2",
                                                       "--train.queries-per-rank", "2")),
    ("chunks", 0.05, 1, ("--train.chunk-tokens", "300")),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    anomalies: bool = True
    """Put the anomalies in."""
    clean: int = 10_000
    """Clean steps of the longest run; the others take a share of it. 0: none."""
    rounds: int = 6
    """Pairs of rounds with and without the guard; 0: none."""
    steps: int = 3
    """Steps of a round."""
    model: str | None = None
    """Hub id or folder for the rounds; unset: the first 2 layers of the quickstart's backbone, or, where that is not
    cached, the tiny model of the other parts, whose steps take milliseconds."""
    layers: int | None = None
    """Keep only the first n decoder layers of it."""
    queries: int = 8
    """Queries of a step of the rounds."""
    out: Path | None = None
    """Also write the result to this JSON file."""


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns 1 if an anomaly was missed or a clean step was stopped. UserError: wrong input."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench guard", description=HELP)
    for name, least in (("clean", 0), ("rounds", 0), ("steps", 1), ("queries", 2)):
        if getattr(settings, name) < least:
            raise UserError(f"--{name} {getattr(settings, name)}: must be at least {least}")
    if settings.model is None and (CACHED_BACKBONE / "config.json").is_file():
        settings = replace(settings, model=str(CACHED_BACKBONE.absolute()), layers=settings.layers or 2)
    with tempfile.TemporaryDirectory(prefix="laser-dist-guard-") as name:
        root = Path(name)
        recipe = prepare(root)
        result: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        if settings.anomalies:
            result["anomalies"] = anomalies(recipe, root)
        if settings.clean:
            result["clean"] = [clean(recipe, root, settings.clean, *variant) for variant in VARIANTS]
        if settings.rounds:
            result["overhead"] = _apart(overhead_of_rank, 1, recipe, root / "rounds", asdict(settings))[0]
    _print(result)
    if settings.out is not None:
        write_json(settings.out, result)
    good = all(row["caught"] and row["unchanged"] is not False for row in result.get("anomalies", ()))
    return 0 if good and all(not row["alarm"] for row in result.get("clean", ())) else 1


def prepare(root: Path) -> Path:
    """A tiny model, the embedded sample with its texts cut short, and a recipe; returns the recipe."""
    from laser_dist.cli import main as command
    from laser_dist.data import sample_folder
    from laser_dist.testing import tiny_model_folder

    tiny_model_folder(root / "model")
    rows = [json.loads(line) for line in (sample_folder() / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["query"] = row["query"][:60]
        row["rationale"] = "\n\n".join(part[:30] for part in row["rationale"].split("\n\n")[:4])
        for passage in row["positives"] + row["negatives"]:
            passage["text"] = passage["text"][:60]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with contextlib.redirect_stdout(sys.stderr):
        if command(["prepare", "--source", str(root / "train.jsonl"), "--out", str(root / "shards")]):
            raise UserError("the sample set could not be prepared")
    recipe = root / "recipe.toml"
    recipe.write_text(
        f"""
[model]
name = "{root}/model"
dtype = "float32"
activation_checkpointing = false
[data]
train = "{root}/shards"
workers = 0
[objective]
ramp_steps = 100
[optimizer]
learning_rate = 2e-3
[train]
queries_per_rank = 8
max_steps = 10
deepspeed = "zero0"
[checkpoint]
every = 0
[launch]
preflight = false
""",
        encoding="utf-8",
    )
    return recipe


def anomalies(recipe: Path, root: Path) -> list[dict[str, Any]]:
    from laser_dist.bench.anomalies import ANOMALIES, caught

    print(f"{len(ANOMALIES)} anomalies on two ranks ...", file=sys.stderr, flush=True)
    return _apart(caught, 2, recipe, root / "anomalies", list(range(len(ANOMALIES))))[0]


def clean(
    recipe: Path, root: Path, steps: int, name: str, share: float, ranks: int, flags: tuple[str, ...]
) -> dict[str, Any]:
    """One clean run: the alarm that stopped it or was said, if any, and how near the limits it came."""
    number = max(1, round(steps * share))
    print(f"{number} clean steps, {name} ...", file=sys.stderr, flush=True)
    output = root / "clean"
    arguments = ["--output", str(output), "--train.max-steps", str(number), *flags]
    alarm = _apart(train_of_rank, ranks, recipe, arguments)[0]
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "guard/shortest_row" in row]
    for path in sorted(output.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    extremes = {
        "gradient": max(row["guard/gradient_share"] for row in rows),
        "shortest_row": min(row["guard/shortest_row"] for row in rows),
        "spread": min(row["guard/passage_spread"] for row in rows),
        "mean_rank": rows[-1]["train/positive_mean_rank"],
    }
    return {"name": name, "ranks": ranks, "steps": len(rows), "alarm": alarm, **extremes}


def train_of_rank(rank: int, world_size: int, recipe: Path, arguments: list[str]) -> str:
    """For `run_distributed`: what the guard said, or an empty text."""
    from laser_dist.ds_config import resolve
    from laser_dist.recipe import load_config
    from laser_dist.trainer import Trainer

    config = load_config([str(recipe), *arguments])
    trainer = Trainer(config, resolve(config.train.deepspeed, config))
    try:
        trainer.fit()
    except UserError as error:
        return str(error)
    return "" if trainer.guard.last is None else trainer.guard.last.reason


def overhead_of_rank(
    rank: int, world_size: int, recipe: Path, output: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """For `run_distributed`: seconds of each round with the guard and without."""
    from statistics import median

    from laser_dist.data.streaming.loader import training_batches
    from laser_dist.ds_config import resolve
    from laser_dist.recipe import load_config
    from laser_dist.run_inputs import open_quarantine
    from laser_dist.trainer import Trainer

    rounds, steps, queries = settings["rounds"], settings["steps"], settings["queries"]
    total = 2 * (rounds + 1) * steps
    flags = ["--output", str(output), "--train.max-steps", str(total), "--train.queries-per-rank", str(queries)]
    flags += ["--model.name", settings["model"]] if settings["model"] else []
    flags += ["--model.layers", str(settings["layers"])] if settings["layers"] else []
    config = load_config([str(recipe), *flags])
    trainer = Trainer(config, resolve(config.train.deepspeed, config))
    trainer.position, trainer.quarantine = 0, open_quarantine(config, trainer.data, output / "quarantine.jsonl")
    stream = training_batches(
        config, trainer.data, trainer.text, rank=rank, world_size=world_size, start=0, total=total
    )
    inside = _timed(trainer)
    seconds: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for number in range(2 * (rounds + 1)):
        on = number % 2 == (number // 2) % 2  # neither always goes first
        trainer.guard.on = trainer.objective.evidence = on
        began = time.perf_counter(), time.process_time(), inside[0]
        for step in range(number * steps, (number + 1) * steps):
            trainer.step(step, stream)
        seconds[on].append((time.perf_counter() - began[0], time.process_time() - began[1], inside[0] - began[2]))
    pairs = list(zip(seconds[True], seconds[False], strict=True))[1:]  # the first round warms up
    return {
        "model": Path(config.model.name).name if settings["model"] else "tiny",
        "layers": settings["layers"],
        "rounds": rounds,
        "steps": steps,
        "queries": queries,
        "step_seconds": median(off[0] for _, off in pairs) / steps,
        "wall": median(on[0] / off[0] for on, off in pairs) - 1,
        "cpu": median((on[2] - off[2]) / off[1] for on, off in pairs),
        "extra_milliseconds": median(on[2] - off[2] for on, off in pairs) / steps * 1000,
    }


def _timed(trainer: Any) -> list[float]:
    """One number that grows by the CPU seconds that the process spends in the guard, and in its part of the loss."""
    from laser_dist.guard import evidence

    spent = [0.0]

    def timing(function: Callable) -> Callable:
        def timed(*arguments: Any) -> Any:
            began = time.process_time()
            try:
                return function(*arguments)
            finally:
                spent[0] += time.process_time() - began

        return timed

    parts = [(trainer.guard, name) for name in ("begin", "note", "check", "check_replicas", "_judge")]
    for owner, name in (*parts, (trainer.objective, "_evidence"), (evidence, "_note")):
        setattr(owner, name, timing(getattr(owner, name)))
    return spent


def _apart(function: Any, ranks: int, *args: Any) -> list[Any]:
    """In processes of their own: a process group cannot be joined twice."""
    from laser_dist.testing import run_distributed

    with contextlib.redirect_stdout(sys.stderr):
        return run_distributed(function, ranks, *args, timeout=7200)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    if rows := result.get("anomalies"):
        good = sum(row["caught"] and row["unchanged"] is not False for row in rows)
        table = Table(title=f"{good} of {len(rows)} anomalies caught in time, nothing updated")
        for heading in ("anomaly", "ZeRO", "rule", "caught", "parameters"):
            table.add_column(heading)
        for row in rows:
            left = {True: "unchanged", False: "CHANGED", None: "a warning only"}[row["unchanged"]]
            table.add_row(row["name"], str(row["stage"]), row["rule"] or "-", "yes" if row["caught"] else "NO", left)
        console.print(table)
    if rows := result.get("clean"):
        alarms, steps = sum(bool(row["alarm"]) for row in rows), sum(row["steps"] for row in rows)
        table = Table(title=f"{alarms} false alarms in {steps:,} clean steps")
        headings = (
            "run",
            "ranks",
            "steps",
            "alarm",
            "largest gradient / limit",
            "shortest row / median",
            "least spread",
        )
        for heading in (*headings, "mean rank at the end"):
            table.add_column(heading, justify="left" if heading in ("run", "alarm") else "right")
        for row in rows:
            values = (row[name] for name in ("gradient", "shortest_row", "spread", "mean_rank"))
            told = row["alarm"] or "none"
            table.add_row(row["name"], str(row["ranks"]), f"{row['steps']:,}", told, *(f"{x:.3g}" for x in values))
        console.print(table)
    if row := result.get("overhead"):
        layers = f", first {row['layers']} layers" if row["layers"] else ""
        console.print(
            f"the guard takes {row['cpu']:.2%} of a step's CPU time ({row['extra_milliseconds']:.2f} ms; wall time of "
            f"neighbouring rounds differs by {row['wall']:+.1%}): median of {row['rounds']} pairs of {row['steps']} "
            f"steps of {row['step_seconds'] * 1000:.0f} ms, {row['queries']} queries, {row['model']}{layers}, "
            "CPU, one thread"
        )
