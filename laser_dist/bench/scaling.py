"""`laser-dist bench scaling`: bytes and FLOPs of real steps on 1, 2 and 4 processes, beside what the plan says of them.

Nothing is timed, so a CPU serves. Each step is that of a small random model, all texts of a kind equally long: on a CPU
attention pads rows to the longest, which the plan, made for packed attention, does not count.
"""

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laser_dist.config import ModelConfig, RunConfig, TrainConfig
from laser_dist.ds_config import resolve
from laser_dist.errors import UserError
from laser_dist.planning.communication import transfers
from laser_dist.planning.flops import step_flops
from laser_dist.planning.job import STRATEGIES, Job
from laser_dist.planning.memory import memory
from laser_dist.planning.shapes import Shape

HELP = """Count what real training steps hold, compute and send on several processes, beside the plan's figures.

Examples:
  laser-dist bench scaling
  laser-dist bench scaling --ranks 1 2 --stages zero2 zero3 --out scaling.csv
"""
SHAPE = Shape(
    name="tiny", layers=4, hidden=64, intermediate=160, heads=4, kv_heads=2, head=16, vocabulary=512, tied=True
)
BUCKET = 50_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `laser-dist bench scaling`."""

    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes."""
    stages: tuple[str, ...] = ("zero0", "zero1", "zero2", "zero3", "zero3-lean")
    """Configurations in ds_configs."""
    lora_rank: int = 0
    """0: full fine-tuning."""
    checkpointing: bool = True
    """Activation checkpointing."""
    out: Path | None = None
    """Also write the table to this CSV file."""

    def validate(self) -> None:
        """Raises UserError for configurations that are not planned."""
        known = [strategy.name for strategy in STRATEGIES if not strategy.offload_optimizer]
        if unknown := [name for name in self.stages if name not in known]:
            raise UserError(f"--stages {unknown[0]}: must be among {', '.join(known)}")
        if not self.ranks or min(self.ranks) < 1:
            raise UserError(f"--ranks {self.ranks}: must be numbers of processes from 1")
        if self.lora_rank < 0:
            raise UserError(f"--lora-rank = {self.lora_rank}: must be 0 or more")


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit code."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench scaling", description=HELP)
    settings.validate()
    rows = []
    for ranks in settings.ranks:
        print(f"{ranks} processes ...", flush=True)
        rows += compare(ranks, [(name, settings.lora_rank, settings.checkpointing) for name in settings.stages])
    _print(rows)
    if settings.out is not None:
        from laser_dist.planning.cli import write_text

        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(settings.out, text.getvalue())
    return 0


def compare(ranks: int, cases: list[tuple[str, int, bool]], dtype: str = "bfloat16") -> list[dict[str, Any]]:
    """(ds_config, LoRA rank, checkpointing) of several steps -> counted and planned values of each, as plain rows.

    Steps of ZeRO 0 to 2 should come first: ZeRO-3 replaces torch's linear layers for the rest of the process.
    """
    from laser_dist.planning.measure import count_steps
    from laser_dist.testing import run_distributed

    jobs = [job_of(name, ranks, lora, checkpointing, dtype) for name, lora, checkpointing in cases]
    counted = run_distributed(count_steps, ranks, [case_of(job) for job in jobs], timeout=900)[0]
    return [_row(job, found) for job, found in zip(jobs, counted, strict=True)]


def job_of(name: str, ranks: int, lora_rank: int, checkpointing: bool, dtype: str = "bfloat16") -> Job:
    """The plan's side: the tiny model's step, with ZeRO-3's limits in proportion to it."""
    strategy = next(s for s in STRATEGIES if s.name == name)
    # A layer and a half stay gathered where a real model's limit is a few layers.
    live = strategy.live if strategy.live >= 1e10 else 60_000
    per_node = ranks // 2 if strategy.hpz and ranks > 3 else ranks
    return Job(
        shape=SHAPE,
        gpus=per_node,
        nodes=ranks // per_node,
        queries=4,
        query_tokens=16,
        rationale_tokens=15,
        passage_tokens=16,
        dtype=dtype,
        lora_rank=lora_rank,
        checkpointing=checkpointing,
        strategy=replace(strategy, bucket=BUCKET if strategy.bucket else 0, live=live, prefetch=0),
    )


def case_of(job: Job) -> Any:
    """The real step of such a job."""
    from laser_dist.planning.measure import Case

    run = RunConfig(model=ModelConfig(dtype=job.dtype), train=TrainConfig(queries_per_rank=job.queries))  # type: ignore[arg-type]
    ds_config = resolve(job.strategy.name, run)
    zero = ds_config["zero_optimization"]
    if job.strategy.bucket:
        zero["reduce_bucket_size"] = BUCKET
    if job.strategy.stage == 3:
        live = int(job.strategy.live)
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
        zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    if job.strategy.hpz:
        zero["zero_hpz_partition_size"] = job.gpus
    return Case(
        shape=job.shape,
        ds_config=ds_config,
        queries=job.queries,
        passages=job.passages,
        query_tokens=job.query_tokens,
        explicit_tokens=job.explicit_tokens,
        passage_tokens=job.passage_tokens,
        steps=job.soft + 1,
        dtype=job.dtype,
        lora_rank=job.lora_rank,
        checkpointing=job.checkpointing,
        chunks=job.chunks,
    )


def _row(job: Job, counted: Any) -> dict[str, Any]:
    flops, planned = step_flops(job), memory(job)
    # The counter takes a causal square for whole, and the chunked loss is counted in neither.
    whole = flops.total - flops.loss + flops.causal * (3.5 + job.checkpointing)
    row: dict[str, Any] = {
        "ranks": job.ranks,
        "strategy": job.strategy.name,
        "lora_rank": job.lora_rank,
        "checkpointing": job.checkpointing,
        "flops": counted.flops,
        "flops_planned": round(whole),
        "state_bytes": counted.parameters + counted.optimizer,
        "state_bytes_planned": round(planned.state - _inside_a_step(job)),
        "peak_bytes": counted.peak,
        "peak_bytes_planned": round(planned.peak),
        "sent_bytes": round(_received(job, counted.collectives)),
        "sent_bytes_planned": round(sum(t.received(job) for t in transfers(job) if t.kind != "host")),
    }
    return row


def _inside_a_step(job: Job) -> float:
    """hpZ's second copy lives from the first gather of a step to its update."""
    return job.element * job.parameters / job.gpus if job.strategy.hpz else 0.0


def _received(job: Job, collectives: dict[str, int]) -> float:
    """Bytes that one rank receives for the counted collectives; a gather of some ranks says so in its name."""
    total = 0.0
    for name, size in collectives.items():
        kind, _, some = name.partition(" of ")
        ranks = int(some) if some else job.ranks
        total += size * (2 if kind == "allreduce_" else 1) * (ranks - 1) / ranks
    return total


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Counted, and planned / counted", caption="the tiny model of laser_dist/bench/scaling.py, bf16")
    for name in ("ranks", "strategy", "MFLOP", "", "state KB", "", "peak KB", "", "received KB", ""):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for row in rows:
        cells = []
        for key, unit in (("flops", 1e6), ("state_bytes", 1e3), ("peak_bytes", 1e3), ("sent_bytes", 1e3)):
            ratio = f"{row[key + '_planned'] / row[key]:.2f}" if row[key] else "-"
            cells += [f"{row[key] / unit:,.1f}", ratio]
        table.add_row(str(row["ranks"]), row["strategy"], *cells)
    Console(width=120).print(table)
