"""`laser-dist plan`: what fits on which machines, how long a step should take and why, and a recipe for it."""

import dataclasses
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from laser_dist.errors import UserError
from laser_dist.files import replacing, write_json
from laser_dist.planning.job import GPUS, Job
from laser_dist.planning.options import Option, fastest, nearest, options_of
from laser_dist.planning.shapes import find_shape

HELP = """Estimate memory, FLOPs, communication and time of a training step before a GPU is rented, and write a recipe.

Only the model's config is read; known models need no network. Memory, FLOPs and traffic follow formulas that tests
compare with counted bytes of real steps; times rest on data sheets and estimates, and nothing was measured on a GPU.

Examples:
  laser-dist plan --model Qwen/Qwen3-8B --gpus 8
  laser-dist plan --model 4B --gpus 1 --gpu rtx4090 --lora-rank 64 --out plan/
  laser-dist plan --model Llama-3.1-70B --gpus 8 --nodes 8 --gpu a100-80 --every
  laser-dist plan --model models/mine --gpus 4 --gpu-memory 48 --tflops 180 --json
  laser-dist plan --model Qwen/Qwen3-8B --scaling --out scaling/
  laser-dist plan --all --out recipes/
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `laser-dist plan`."""

    model: str = ""
    """Hub id, folder, or a size such as 4B (a shape between the known ones)."""
    gpus: int = 8
    """GPUs of one node."""
    nodes: int = 1
    """Nodes with so many GPUs each."""
    gpu: Literal["a100-40", "a100-80", "h100", "h200", "l4", "rtx4090"] = "h100"
    """Kind of GPU; the next flags replace single figures of it."""
    gpu_memory: float | None = None
    """GiB of one GPU."""
    tflops: float | None = None
    """Dense bfloat16 peak of one GPU, TFLOP/s."""
    intra_bandwidth: float | None = None
    """GB/s of one GPU to the others of its node, one way."""
    inter_bandwidth: float | None = None
    """GB/s of one GPU to other nodes, one way."""
    host_memory: float | None = None
    """GiB of one node."""
    queries_per_rank: int = 8
    """B."""
    passages: int = 2
    """G, passages per query."""
    query: int = 512
    """Longest query, tokens. The plan is for a batch of longest texts; shorter ones take less of everything."""
    rationale: int = 511
    """Longest rationale, tokens."""
    passage: int = 512
    """Longest passage, tokens."""
    steps: int = 3
    """K."""
    lora_rank: int | None = None
    """Rank of the adapters; 0: full fine-tuning; unset: both are planned, with rank 64."""
    every: bool = False
    """Show every combination, not only the best recomputation of each strategy."""
    out: Path | None = None
    """Folder for recipe.toml, ds_config.json and plan.json (of --scaling and --all: tables, plot, recipes)."""
    json: bool = False
    """Print the plan as JSON."""
    scaling: bool = False
    """How a step's cost grows from 1 to 1024 GPUs, in nodes of --gpus."""
    all: bool = False
    """A table of all known models on 1 x 24, 1 x 80, 8 x 80 and 64 x 80 GB, and recipes; with --every one for each."""

    def validate(self) -> None:
        """Raises UserError for values that nothing could be planned with."""
        for name in ("gpus", "nodes", "queries_per_rank", "passages", "steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("query", "passage"):
            _require(getattr(self, name) >= 8, name, getattr(self, name), "must be at least 8")
        _require(self.rationale >= 1, "rationale", self.rationale, "must be at least 1")
        for name in ("gpu_memory", "tflops", "intra_bandwidth", "inter_bandwidth", "host_memory"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "must be positive")
        _require(self.lora_rank is None or self.lora_rank >= 0, "lora_rank", self.lora_rank, "must be 0 or more")
        _require(bool(self.model) or self.all, "model", self.model, "give a hub id, a folder, or a size such as 4B")
        if (self.all or self.scaling) and self.out is None:
            raise UserError(f"--{'all' if self.all else 'scaling'}: give a folder with --out")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out}: is a file: give the name of a folder")

    def job(self, lora_rank: int) -> Job:
        """What is planned; strategy and recomputation are still open."""
        given = {
            "memory": self.gpu_memory,
            "tflops": self.tflops,
            "intra": self.intra_bandwidth,
            "inter": self.inter_bandwidth,
            "host_memory": self.host_memory and self.host_memory / self.gpus,
        }
        hardware = replace(GPUS[self.gpu], **{name: value for name, value in given.items() if value is not None})
        return Job(
            shape=find_shape(self.model),
            hardware=hardware,
            gpus=self.gpus,
            nodes=self.nodes,
            queries=self.queries_per_rank,
            passages=self.passages,
            query_tokens=self.query,
            rationale_tokens=self.rationale,
            passage_tokens=self.passage,
            soft=self.steps - 1,
            lora_rank=lora_rank,
        )

    @property
    def ranks(self) -> list[int]:
        """Adapter ranks to plan for, 0 for full fine-tuning."""
        return [64, 0] if self.lora_rank is None else [self.lora_rank]


def main(arguments: list[str]) -> int:
    """Run the command; 1 if nothing fits. UserError: wrong input, before anything is written."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist plan", description=HELP)
    settings.validate()
    command = shlex.join(["laser-dist", "plan", *arguments])
    if settings.all:
        from laser_dist.planning.catalogue import write_catalogue

        write_catalogue(settings.out or Path(), settings.every)
        return 0
    if settings.scaling:
        from laser_dist.planning.scaling import write_scaling

        return write_scaling(settings)
    options = {rank: options_of(settings.job(rank)) for rank in settings.ranks}
    everything = [option for found in options.values() for option in found]
    chosen = fastest(everything)
    if settings.json:
        import json

        print(json.dumps(as_json(settings, everything, chosen), indent=2))
    else:
        from laser_dist.planning.show import show

        shown = everything if settings.every else [best for found in options.values() for best in best_each(found)]
        show(shown, chosen, everything)
    if settings.out is not None and chosen is not None:
        from laser_dist.planning.recipe import write_recipe

        written = write_recipe(chosen, settings.out, command)
        write_json(settings.out / "plan.json", as_json(settings, everything, chosen))
        if not settings.json:
            print("\n".join(f"wrote {path}" for path in (*written, settings.out / "plan.json")))
    return 0 if chosen else 1


def best_each(options: list[Option]) -> list[Option]:
    """Of each strategy the fastest that fits, or the one that misses by least."""
    names = list(dict.fromkeys(option.job.strategy.name for option in options))
    return [nearest([option for option in options if option.job.strategy.name == name]) for name in names]


def as_json(settings: Settings, options: list[Option], chosen: Option | None) -> dict[str, Any]:
    """The plan as plain values; bytes, seconds, FLOPs."""
    job = options[0].job
    return {
        "model": job.shape.name,
        "parameters": job.shape.parameters,
        "interpolated": job.shape.interpolated,
        "hardware": dataclasses.asdict(job.hardware) | {"gpus": job.gpus, "nodes": job.nodes},
        "tokens_per_rank": job.tokens,
        "tokens_per_step": job.tokens * job.ranks,
        "passages_in_the_softmax": job.columns,
        "chosen": options.index(chosen) if chosen else None,
        "options": [option_json(option) for option in options],
    }


def option_json(option: Option) -> dict[str, Any]:
    """One option as plain values."""
    from laser_dist.planning.communication import transfers

    job, time = option.job, option.time
    return {
        "mode": option.mode,
        "strategy": job.strategy.name,
        "activation_checkpointing": job.checkpointing,
        "chunk_tokens": job.chunk_tokens if job.chunks > 1 else 0,
        "chunks": job.chunks,
        "fits": option.fits,
        "verdict": option.verdict if option.fits else f"{option.verdict}; {option.remedy}",
        "memory": option.memory.parts() | {"peak": option.memory.peak, "usable": option.usable},
        "host_memory_per_node": option.host,
        "flops": dataclasses.asdict(time.flops),
        "communication": [
            {
                "what": transfer.what,
                "kind": transfer.kind,
                "received": transfer.received(job),
                "from_other_nodes": transfer.between_nodes(job),
            }
            for transfer in transfers(job)
        ],
        "seconds": {
            "best": time.best,
            "worst": time.worst,
            "packed_sweep": time.prefix,
            "latent_steps": time.latent,
            "loss": time.loss,
            "update": time.update,
            "communication": time.transfers,
        },
        "bottleneck": time.bottleneck,
    }


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"--{name.replace('_', '-')} = {value!r}: {remedy}")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
