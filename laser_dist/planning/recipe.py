"""A plan as a recipe and a DeepSpeed config that `laser-dist train` takes as they are."""

import json
from pathlib import Path
from typing import Any

from laser_dist.config import ModelConfig, OptimizerConfig, RunConfig, TextConfig, TrainConfig
from laser_dist.ds_config import find_ds_config, resolve
from laser_dist.errors import UserError
from laser_dist.files import replacing, write_json
from laser_dist.planning.job import GIB, Job
from laser_dist.planning.options import Option, seconds
from laser_dist.recipe import read_recipe

# The paper trains adapters at 1e-4. Full fine-tuning is not in it: a common rate, which nobody has tuned here.
LORA_RATE, FULL_RATE = "1e-4", "2e-5"


def ds_config_of(job: Job) -> dict[str, Any]:
    """The ready-made config of the job's strategy, with what depends on the machines filled in."""
    table = json.loads(find_ds_config(job.strategy.name).read_text(encoding="utf-8"))
    zero = table["zero_optimization"]
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = job.gpus
    return table


def recipe_text(option: Option, deepspeed: str, command: str) -> str:
    """The recipe as TOML; `deepspeed` names the config, `command` is what wrote it."""
    job, memory, time = option.job, option.memory, option.time
    config = run_config(option, deepspeed)
    model, train = config.model, config.train
    nodes = f"{job.nodes} x {job.gpus}" if job.nodes > 1 else f"{job.gpus}"
    lines = [
        f"# {job.shape.name}, {option.mode}, on {nodes} GPUs of {job.hardware.memory:g} GiB. Estimated, not measured:",
        f"# {memory.peak / GIB:.1f} of {option.usable / GIB:.1f} usable GiB, {seconds(option)} s a step "
        f"of {job.queries * job.ranks} queries, bound by {time.bottleneck}.",
        f"# Written by: {command}",
        "# data.train and output are given on the command line.",
        "seed = 0",
        "",
        "[model]",
        f'name = "{model.name}"',
        f'dtype = "{model.dtype}"',
        *([f"lora_rank = {model.lora_rank}", f"lora_alpha = {model.lora_alpha}"] if job.lora else []),
        f"activation_checkpointing = {str(model.activation_checkpointing).lower()}",
        "",
        "[thinking]",
        f"steps = {job.soft + 1}",
        'convention = "official"',
        "",
        "[text]",
        f"max_query_tokens = {job.query_tokens}",
        f"max_passage_tokens = {job.passage_tokens}",
        f"max_explicit_tokens = {job.explicit_tokens}",
        "",
        "[data]",
        f"negatives = {job.passages - 1}",
        "",
        "[optimizer]",
        f"learning_rate = {LORA_RATE if job.lora else FULL_RATE}",
        "",
        "[train]",
        f"queries_per_rank = {job.queries}",
        *([f"chunk_tokens = {train.chunk_tokens}"] if train.chunk_tokens else []),
        f'deepspeed = "{deepspeed}"',
    ]
    return "\n".join(lines) + "\n"


def run_config(option: Option, deepspeed: str) -> RunConfig:
    """What the recipe says, as the trainer reads it."""
    job = option.job
    return RunConfig(
        model=ModelConfig(
            name=job.shape.name, lora_rank=job.lora_rank, activation_checkpointing=job.checkpointing, dtype="bfloat16"
        ),
        text=TextConfig(
            max_query_tokens=job.query_tokens,
            max_passage_tokens=job.passage_tokens,
            max_explicit_tokens=job.explicit_tokens,
        ),
        optimizer=OptimizerConfig(learning_rate=float(LORA_RATE if job.lora else FULL_RATE)),
        train=TrainConfig(
            queries_per_rank=job.queries,
            chunk_tokens=job.chunk_tokens if job.chunks > 1 else 0,
            deepspeed=deepspeed,
        ),
    )


def write_recipe(option: Option, folder: Path, command: str) -> tuple[Path, Path]:
    """FOLDER/recipe.toml and FOLDER/ds_config.json, read back the way training reads them. UserError if it cannot."""
    recipe, table = folder / "recipe.toml", folder / "ds_config.json"
    write_json(table, ds_config_of(option.job))
    with replacing(recipe) as temporary:
        temporary.write_text(recipe_text(option, table.as_posix(), command), encoding="utf-8")
    check_recipe(recipe)
    return recipe, table


def check_recipe(path: Path) -> RunConfig:
    """The recipe as training reads it, its DeepSpeed config resolved. Raises UserError where training would."""
    config = read_recipe(path)
    try:
        resolve(config.train.deepspeed, config)
    except UserError as error:
        if "nvme_path" not in str(error):  # the disk is on the machine that trains
            raise
    return config
