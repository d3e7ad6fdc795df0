"""`laser-dist bench chunks`: peak memory of a large batch in chunks (GradCache), beside one chunk and all at once.

1. Each variant runs in a process of its own, through the engine that training uses, so that its peak is its own.
2. First a batch that fits at once must have the same loss and gradient norm in chunks; else nothing is reported.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from laser_dist.bench.step import GRADIENT_TOLERANCE, LOSS_TOLERANCE, _environment, load_batch
from laser_dist.bench.step import Settings as StepSettings
from laser_dist.errors import UserError
from laser_dist.files import write_json

HELP = """Measure what a large batch in chunks by token budget costs in memory and time (train.chunk_tokens).

Examples:
  laser-dist bench chunks --layers 4 --queries 512 --chunk-tokens 4096
  laser-dist bench chunks --queries 4096 --chunk-tokens 32768 --dtype bfloat16 --stage 3 --no-at-once
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str | None = None
    """Hub id or folder of a causal LM; unset: the backbone that `laser-dist quickstart` has cached."""
    layers: int | None = None
    """Keep only the first n decoder layers."""
    queries: int = 512
    """B: queries of the large batch, each with a positive and a hard negative."""
    chunk_tokens: int = 4096
    """Budget of a chunk, in packed tokens."""
    steps: int = 3
    """K, the number of latent steps."""
    stage: int = 2
    """ZeRO stage of the engine."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank; 0 trains every weight."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model; the gate compares in it as well."""
    at_once: bool = True
    """Also run the large batch at once, without chunks."""
    data: Path | None = None
    """Folder written by `laser-dist prepare`; unset: the embedded sample, over and over."""
    out: Path | None = None
    """Also write the result to this JSON file."""

    @property
    def step(self) -> StepSettings:
        return StepSettings(
            model=self.model, layers=self.layers, queries=self.queries, steps=self.steps, data=self.data, out=self.out
        )


@dataclass(frozen=True)
class Outcome:
    """One process: `base_gib` is its memory before the first forward, `peak_gib` its highest."""

    chunks: int
    tokens: int
    loss: float
    gradient_norm: float
    seconds: float
    base_gib: float
    peak_gib: float
    vectors_gib: float
    environment: dict[str, str]


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit code. UserError: wrong input, or chunks that change the numbers."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench chunks", description=HELP)
    settings.step.validate()
    if settings.chunk_tokens < 1 or settings.stage not in range(4):
        raise UserError("--chunk-tokens must be at least 1, and --stage 0, 1, 2 or 3")
    outcomes = run_all(settings)
    _print(settings, outcomes)
    if settings.out is not None:
        rows = {name: asdict(outcome) for name, outcome in outcomes.items()}
        told = {key: None if value is None else str(value) for key, value in asdict(settings).items()}
        write_json(settings.out, {"date": datetime.now(UTC).isoformat(), "settings": told, "variants": rows})
    return 0


def run_all(settings: Settings) -> dict[str, Outcome]:
    """The outcome of each variant, in the order of the table. UserError if the gate is red."""
    # The queries whose rows fill one chunk, so that both run the same sizes.
    lengths = load_batch(settings.step).lengths_R.tolist()
    rows_per_query = len(lengths) // settings.queries
    per_query = sum(lengths) / settings.queries
    fitting = max(1, int(settings.chunk_tokens / per_query))
    if settings.queries <= fitting * 2:
        raise UserError(
            f"--queries {settings.queries} of {per_query:.0f} tokens make no more than two chunks of "
            f"{settings.chunk_tokens}: give more --queries or fewer --chunk-tokens"
        )
    small = min(settings.queries, 4 * fitting)
    jobs = {
        f"{fitting} queries at once (one chunk)": (fitting, 0),
        f"{small} queries at once": (small, 0),
        f"{small} queries in chunks": (small, settings.chunk_tokens),
        f"{settings.queries} queries in chunks": (settings.queries, settings.chunk_tokens),
    }
    if settings.at_once:
        jobs[f"{settings.queries} queries at once"] = (settings.queries, 0)
    outcomes: dict[str, Outcome] = {}
    for name, (queries, budget) in jobs.items():
        print(f"{name}, {queries * rows_per_query} rows ...", file=sys.stderr, flush=True)
        outcomes[name] = _in_a_process(settings, queries, budget)
        if name == f"{small} queries in chunks":
            _check(outcomes[name], outcomes[f"{small} queries at once"])
    return outcomes


def _check(chunked: Outcome, whole: Outcome) -> None:
    pairs = [("loss", LOSS_TOLERANCE), ("gradient_norm", GRADIENT_TOLERANCE)]
    for name, tolerance in pairs:
        found, wanted = getattr(chunked, name), getattr(whole, name)
        if not abs(found - wanted) <= tolerance * abs(wanted):
            raise UserError(
                f"in chunks the {name} is {found:.7g}, at once {wanted:.7g}: more than {tolerance:g} apart, so nothing "
                "is reported"
            )


def _in_a_process(settings: Settings, queries: int, budget: int) -> Outcome:
    job = json.dumps({"settings": asdict(settings), "queries": queries, "budget": budget}, default=str)
    code = "from laser_dist.bench.chunks import _child; _child()"
    # The C library keeps what was freed, in pieces of all sizes: the peak would tell of that, too.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    child = subprocess.run([sys.executable, "-c", code], input=job, capture_output=True, text=True, env=environment)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        reason = "it was killed, probably for memory" if child.returncode < 0 else last.removeprefix("error: ")
        raise UserError(f"{queries} queries, {'in chunks' if budget else 'at once'}: {reason}")
    return Outcome(**json.loads(child.stdout.splitlines()[-1]))


def _child() -> None:
    job = json.load(sys.stdin)
    fields = job["settings"] | {"queries": job["queries"], "out": None}
    fields["data"] = fields["data"] and Path(fields["data"])
    try:
        print(json.dumps(asdict(measure(Settings(**fields), job["budget"]))))
    except UserError as error:
        sys.exit(f"error: {error}")


def measure(settings: Settings, budget: int) -> Outcome:
    """Forward and backward of one micro-batch in this process, in chunks of `budget` tokens (0: at once)."""
    import torch

    from laser_dist.chunks import chunks_needed
    from laser_dist.config import ModelConfig, ObjectiveConfig
    from laser_dist.distributed.engine import Engine, init_distributed
    from laser_dist.distributed.grad_cache import GradCache
    from laser_dist.model.backbone import load_backbone, prepare_for_training
    from laser_dist.model.retriever import LaserRetriever
    from laser_dist.objective.alignment import AlignmentObjective
    from laser_dist.observability.clock import StepClock, peak_memory_gib

    device = init_distributed()
    config = ModelConfig(
        name=settings.step.backbone, layers=settings.layers, dtype=settings.dtype, lora_rank=settings.lora_rank,
        activation_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LaserRetriever(prepare_for_training(load_backbone(config), config), steps=settings.steps)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        # A bucket is allocated whole at each backward, which costs a CPU a second per GB.
        "zero_optimization": {"stage": settings.stage, "reduce_bucket_size": int(2e7)},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = Engine(model, torch.optim.SGD(trained, lr=0.0), ds_config, reduce_once=settings.lora_rank > 0)
    batch = load_batch(settings.step).to(device)
    chunks = chunks_needed(batch.lengths_R.tolist(), budget) if budget else 1
    cache, objective, clock = GradCache(engine), AlignmentObjective(ObjectiveConfig(), 0.05), StepClock(device)
    base = peak_memory_gib(device)
    with clock.phase("step"), engine.reduction():
        views = cache.forward(batch, chunks)
        loss = objective(views, batch, 0).total
        cache.backward(loss)
    return Outcome(
        chunks=chunks,
        tokens=len(batch.tokens_T),
        loss=float(loss.detach()),
        gradient_norm=engine.step(),
        seconds=clock.reset()["step"],
        base_gib=base,
        peak_gib=peak_memory_gib(device),
        vectors_gib=2 * sum(x.numel() * x.element_size() for x in views if x is not None) / 2**30,  # and gradients
        environment=_environment(device),
    )


def _print(settings: Settings, outcomes: dict[str, Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(outcomes.values()))
    table = Table(title="One micro-batch, forward and backward", caption_justify="left")
    for heading in (
        "batch",
        "chunks",
        "tokens",
        "seconds",
        "peak GiB",
        "above the model",
        "vectors and gradients, GiB",
    ):
        table.add_column(heading, justify="left" if heading == "batch" else "right")
    for name, row in outcomes.items():
        memory = (f"{row.peak_gib:.2f}", f"{row.peak_gib - row.base_gib:.2f}", f"{row.vectors_gib:.3f}")
        table.add_row(name, str(row.chunks), f"{row.tokens:,}", f"{row.seconds:.1f}", *memory)
    table.caption = (
        f"{first.environment['device']} · torch {first.environment['torch']} · {settings.step.backbone}, layers "
        f"{settings.layers or 'all'} · {settings.dtype} · ZeRO-{settings.stage} · K {settings.steps} · chunks of at "
        f"most {settings.chunk_tokens:,} tokens\nloss and gradient norm in chunks agree with those at once to "
        f"{LOSS_TOLERANCE:g} and {GRADIENT_TOLERANCE:g}; above the model: beyond what weights and libraries take"
    )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
