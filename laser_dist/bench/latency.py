"""`laser-dist bench latency`: what thinking costs at serving time, against one encoder pass and against rewriting.

1. All variants share one set of weights. Before anything is timed their vectors must agree where they should
   (`latency_variants.check_agreement`); else nothing is reported.
2. A round times every variant once, from token ids to vectors on the CPU, the next round in reverse order. Ratios are
   taken within a round, so that a machine that slows down slows both sides.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from laser_dist.errors import UserError, require
from laser_dist.model.embedded import CACHED_BACKBONE

if TYPE_CHECKING:
    import torch

    from laser_dist.bench.latency_variants import Variants

PASS, REWRITE = "one pass", "rewrite"
MEAN_RATIONALE_TOKENS = 985  # of the 81,659 rationales in LaSER-Training

HELP = """Time encoding: one encoder pass, LaSER with K latent steps, and rewriting the query before encoding it.

Rewriting generates a rationale greedily with the same backbone, --rewrite-tokens long, and then encodes query and
rationale in one pass. Latency depends on the sizes of a model and not on its weights: --random-weights needs no
download. On a CPU set OMP_NUM_THREADS to the cores that are free.

Examples:
  laser-dist bench latency --out latency.json --plot latency.png
  laser-dist bench latency --lengths 32 256 --batches 1 --steps 1 3 --rewrite-tokens 0
  laser-dist bench latency --random-weights qwen3-0.6b --dtype bfloat16 --device cuda --repeats 30 --out h100.json
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str | None = None
    """Hub id or folder of a causal LM; unset: the backbone that `laser-dist quickstart` has cached."""
    random_weights: str | None = None
    """Instead of a model: a name (qwen3-0.6b, qwen3-4b, qwen3-8b), or a config.json of any causal LM."""
    layers: int | None = None
    """Keep only the first n decoder layers."""
    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """K: latent states averaged; K = 1 thinks no soft token."""
    batches: tuple[int, ...] = (1, 8)
    """Texts encoded together."""
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Tokens per text, template included."""
    repeats: int = 7
    """Rounds; each times every variant once."""
    rewrite_tokens: int = MEAN_RATIONALE_TOKENS
    """Tokens that rewriting generates (985: the mean rationale of LaSER-Training); 0 leaves rewriting out."""
    rewrite_lengths: tuple[int, ...] = (256,)
    """Which of --lengths rewriting is timed at."""
    rewrite_repeats: int = 1
    """Rounds that rewriting takes part in."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision that is timed; vectors are compared in float64 either way, which takes memory for it."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one."""
    out: Path | None = None
    """Also write the result to this JSON file."""
    plot: Path | None = None
    """Also draw it, as PNG."""

    def validate(self) -> None:
        """Raises UserError for values that nothing could be measured with."""
        for name in ("steps", "batches", "lengths", "rewrite_lengths"):
            values, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if min(values, default=1) < 1 or len(set(values)) < len(values):
                raise UserError(f"{flag} {' '.join(map(str, values))}: must be different numbers, each at least 1")
            if not values and name != "rewrite_lengths":
                raise UserError(f"{flag}: give at least one number")
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats}: must be at least 1")
        if not 0 <= self.rewrite_repeats <= self.repeats:
            raise UserError(f"--rewrite-repeats {self.rewrite_repeats}: must be from 0 to --repeats = {self.repeats}")
        if unknown := set(self.rewrite_lengths) - set(self.lengths) if self.rewrite_tokens else set():
            raise UserError(
                f"--rewrite-lengths {min(unknown)}: is not one of --lengths; --rewrite-tokens 0 rewrites none"
            )
        if self.rewrite_tokens < 0:
            raise UserError(f"--rewrite-tokens {self.rewrite_tokens}: must be 0 or more")
        for flag, path in (("--out", self.out), ("--plot", self.plot)):
            if path is not None and path.is_dir():
                raise UserError(f"{flag} {path}: is a folder: give the name of a file")
        self._validate_model()

    def _validate_model(self) -> None:
        if self.model is not None and self.random_weights is not None:
            raise UserError("--model and --random-weights exclude each other: leave one out")
        if self.model is None and self.random_weights is None and not (CACHED_BACKBONE / "config.json").is_file():
            raise UserError(
                f"no --model given, and {CACHED_BACKBONE} does not exist: give a hub id or a folder, run `laser-dist "
                "quickstart` once, which makes it, or measure sizes alone: --random-weights qwen3-0.6b"
            )

    @property
    def name(self) -> str:
        """The model in words."""
        name = f"{self.random_weights}, random weights" if self.random_weights else self.model or str(CACHED_BACKBONE)
        return f"{name}, first {self.layers} layers" if self.layers else name

    def rewrites(self, length: int) -> bool:
        """Whether rewriting is timed at this length."""
        return bool(self.rewrite_tokens and self.rewrite_repeats) and length in self.rewrite_lengths


@dataclass(frozen=True)
class Timed:
    """One call: seconds on the clock, and seconds of this process's CPU time."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Cell:
    """All rounds at one batch size and length; `rounds[i]` holds the variants that took part in round i."""

    batch: int
    length: int
    rounds: list[dict[str, Timed]]


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit code. UserError: wrong input, or variants that disagree."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench latency", description=HELP)
    settings.validate()

    from laser_dist.bench import latency_report
    from laser_dist.files import write_json

    if settings.plot is not None:
        require("--plot", "matplotlib", extra="plots", instead="leave --plot out")
    result = run(settings)
    if settings.out is not None:
        write_json(settings.out, result)
    if settings.plot is not None:
        latency_report.draw(result, settings.plot)
    latency_report.print_tables(result)
    return 0


def run(settings: Settings) -> dict[str, Any]:
    """Check, measure and summarise. UserError where variants disagree."""
    import torch

    from laser_dist.bench import latency_report
    from laser_dist.bench.environment import environment
    from laser_dist.bench.latency_variants import Variants, check_agreement, load_lm, memory_traffic, rounding
    from laser_dist.retrieval.loading import find_device

    device = find_device(settings.device)
    variants = Variants(load_lm(settings).to(device))
    agreement = check_agreement(variants, settings)
    variants.to(getattr(torch, settings.dtype))
    cells = [latency_report.summarise(cell) for cell in _measure(variants, settings, device)]
    return {
        **environment(device),
        "model": settings.name,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "agreement": agreement,
        "rounding": rounding(variants, settings),
        "step_traffic": memory_traffic(variants),
        "clock": latency_report.trusted_clock(cells, device.type),
        "cells": cells,
    }


def _measure(variants: "Variants", settings: Settings, device: "torch.device") -> Iterator[Cell]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    grid = [(batch, length) for batch in settings.batches for length in settings.lengths]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=len(grid) * (settings.repeats + 1))
        for batch, length in grid:
            bar.update(task, description=f"{batch} x {length} tokens")
            if not bar.console.is_terminal:  # which shows no bar
                print(f"{batch} x {length} tokens ...", file=sys.stderr, flush=True)
            calls = _calls(variants, settings, batch, length)
            for name, call in calls.items():
                if name != REWRITE:
                    call()
            if settings.rewrites(length):  # warms up generation as well as 985 tokens do
                variants.rewrite(variants.rows([length] * batch), 2)
            bar.advance(task)
            rounds = []
            for turn in range(settings.repeats):
                names = [name for name in calls if name != REWRITE or turn < settings.rewrite_repeats]
                timed = {name: _timed(calls[name], device) for name in (names[::-1] if turn % 2 else names)}
                rounds.append(timed)
                bar.advance(task)
            yield Cell(batch, length, rounds)


def _calls(variants: "Variants", settings: Settings, batch: int, length: int) -> dict[str, Callable[[], Any]]:
    """Each variant's name and what it does for these texts."""
    rows = variants.rows([length] * batch)
    calls: dict[str, Callable[[], Any]] = {PASS: lambda: variants.one_pass(rows)}
    for steps in settings.steps:
        calls[laser_name(steps)] = lambda steps=steps: variants.laser(rows, steps)  # type: ignore[misc]
    if settings.rewrites(length):
        calls[REWRITE] = lambda: variants.rewrite(rows, settings.rewrite_tokens)
    return calls


def laser_name(steps: int) -> str:
    """How results call LaSER with K = `steps`."""
    return f"K = {steps}"


def _timed(call: Callable[[], Any], device: "torch.device") -> Timed:
    # Every variant ends with its vectors on the CPU, which waits for the GPU.
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
