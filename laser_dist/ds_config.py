"""DeepSpeed's JSON for a run: ZeRO's mechanics from ds_configs/, everything else from the recipe.

DeepSpeed ignores misspelt top-level keys and replaces a leftover "auto" by a default, both silently. Here each is an
error, before a process group starts.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laser_dist.config import RunConfig
from laser_dist.errors import UserError, suggest
from laser_dist.reading import read_json

# A link to the top-level folder in a checkout, a plain folder in a wheel.
FOLDER = Path(__file__).parent / "ds_configs"

# What the recipe owns: key in DeepSpeed's JSON -> key in the recipe.
OWNED = {
    "train_micro_batch_size_per_gpu": "train.queries_per_rank",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optimizer.gradient_clipping",
}

_PRECISION = 'precision is model.dtype in the recipe ("float32" or "bfloat16"); remove this section'
_SCALE = "the objective's gradients are exact averages over ranks, and this would rescale them; remove it"
_REMOVED = "current DeepSpeed has dropped it; remove it"
REFUSED = {
    "optimizer": "the optimizer is built from [optimizer] in the recipe; remove this section",
    "scheduler": "the schedule is optimizer.schedule and optimizer.warmup in the recipe; remove this section",
    "fp16": _PRECISION,
    "bfloat16": _PRECISION,
    "torch_autocast": _PRECISION,
    "amp": _PRECISION,
    "activation_checkpointing": "set model.activation_checkpointing in the recipe; remove this section",
    "prescale_gradients": _SCALE,
    "gradient_predivide_factor": _SCALE,
    "gradient_allreduce_op": _SCALE,
    "managed_gradient_accumulation": "the trainer relies on DeepSpeed's own count of micro-batches; remove it",
    **dict.fromkeys(
        ("compression_training", "curriculum_learning", "elasticity", "nebula", "sparse_gradients"), _REMOVED
    ),
}

# Every other top-level key that DeepSpeed 0.19 reads; a test compares this list with the installed version.
KNOWN = {
    *OWNED,
    *("train_batch_size", "bf16", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("communication_data_type", "seq_parallel_communication_data_type", "data_types", "disable_allgather"),
    *("checkpoint", "datastates_ckpt", "aio", "compile", "dataloader_drop_last", "data_efficiency", "vocabulary_size"),
    *("comet", "csv_monitor", "tensorboard", "wandb", "comms_logger", "flops_profiler", "timers", "log_level"),
    *("dump_state", "memory_breakdown", "steps_per_print", "wall_clock_breakdown", "disable_python_gc"),
    *("autotuning", "hybrid_engine", "pipeline", "tensor_parallel", "expert_parallel", "weight_quantization"),
    "use_data_before_expert_parallelism",
}

_STAGE3 = (
    *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
    *("max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold"),
    *("use_all_reduce_for_fetch_params", "allgather_sequential"),
)
# The same for the sections that runs have; DeepSpeed finds these typing errors after all ranks have loaded the model,
# and those in aio not at all.
KNOWN_WITHIN = {
    "bf16": {"enabled", "immediate_grad_update", "check_grad_overflow"}
    | {"bf16_master_weights_and_grads", "bf16_optimizer_states"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
    "zero_optimization": {
        *(f"stage3_{name}" for name in _STAGE3),
        *_STAGE3,
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
        *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "sub_group_size"),
        *("load_from_fp32_weights", "elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow"),
        *("cpu_offload_param", "cpu_offload_use_pin_memory", "cpu_offload", "ignore_unused_parameters"),
        *("stage3_gather_fp16_weights_on_model_save", "legacy_stage1", "round_robin_gradients", "parameter_alignment"),
        *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"),
        *("zero_quantized_gradients", "memory_efficient_linear", "pipeline_loading_checkpoint", "leaf_module"),
        *("log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory"),
        "override_module_apply",
    },
    "zero_optimization.offload_param": {"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu"}
    | {"pin_memory"},
    "zero_optimization.offload_optimizer": {"device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read"}
    | {"pipeline_write", "fast_init", "ratio", "super_offload", "cpuadam_cores_perc"},
}

# DeepSpeed gives "auto" a meaning of its own here.
_AUTO_ALLOWED = "data_types.keep_in_fp32_modules"


def find_ds_config(name: str) -> Path:
    """The file at this path, or the ready-made one of this name (`zero3.json`, or just `zero3`)."""
    ready = FOLDER / name
    for path in (Path(name), ready, ready.with_name(ready.name + ".json")):
        if path.is_file():
            return path
    names = sorted(path.name for path in FOLDER.glob("*.json"))
    raise UserError(
        f"train.deepspeed = {name!r}: no such file, and none of the ready-made ones ({', '.join(names)})."
        + suggest(name, names)
    )


def resolve(name: str, config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed config of this name with every "auto" filled from the run; UserError for what has no one owner."""
    path = find_ds_config(name)
    table = _read(path)
    for key in table:
        if key in REFUSED:
            raise UserError(f'{path}: "{key}" does not belong here: {REFUSED[key]}')
        if key not in KNOWN:
            raise UserError(f'{path}: unknown key "{key}".{suggest(key, KNOWN)}')
    _check_within(path, table)

    for key, ours in OWNED.items():
        section, field = ours.split(".")
        table[key] = _owned(path, key, table.get(key, "auto"), ours, getattr(getattr(config, section), field))
    # DeepSpeed multiplies this itself, from the two above and the number of ranks.
    ranks = "train.queries_per_rank times train.accumulation times ranks"
    _owned(path, "train_batch_size", table.pop("train_batch_size", "auto"), ranks, None)

    precision = table.setdefault("bf16", {})
    if not isinstance(precision, dict):
        raise UserError(f'{path}: "bf16" = {json.dumps(precision)}: write {{"enabled": "auto"}}')
    enabled = config.model.dtype == "bfloat16"
    precision["enabled"] = _owned(path, "bf16.enabled", precision.get("enabled", "auto"), "model.dtype", enabled)
    if precision.get("check_grad_overflow", "auto") == "auto":
        precision["check_grad_overflow"] = enabled

    _check_machine(path, table.get("zero_optimization"))
    for key in _autos(table):
        raise UserError(f'{path}: "{key}" = "auto": nothing fills it, so DeepSpeed would take a default; write a value')
    return table


def _check_within(path: Path, table: dict[str, Any]) -> None:
    """UserError for what stands under a wrong name in a section."""
    for section, known in KNOWN_WITHIN.items():
        found: Any = table
        for name in section.split("."):
            found = found.get(name, {}) if isinstance(found, dict) else {}
        for key in found if isinstance(found, dict) else ():
            if key not in known:
                near = suggest(key, known).replace('"', f'"{section}.', 1)
                raise UserError(f'{path}: unknown key "{section}.{key}".{near}')


def _check_machine(path: Path, zero: Any) -> None:
    """What a ready-made file cannot know: the local disk, and how many GPUs a node has."""
    if not isinstance(zero, dict):
        return
    for key in ("offload_optimizer", "offload_param"):
        part = zero.get(key)
        disk = part.get("nvme_path") if isinstance(part, dict) and part.get("device") == "nvme" else None
        if disk is not None and not Path(disk).is_dir():
            raise UserError(
                f'{path}: "zero_optimization.{key}.nvme_path" = {json.dumps(disk)}: this folder does not exist here; '
                "copy the file, write a folder on a local disk, and name the copy in train.deepspeed"
            )
    group, ranks = zero.get("zero_hpz_partition_size", 1), int(os.environ.get("WORLD_SIZE", "1"))
    if isinstance(group, int) and group > 1 and ranks > group and ranks % group:
        raise UserError(
            f'{path}: "zero_optimization.zero_hpz_partition_size" = {group}: does not divide {ranks} ranks; copy '
            "the file, write the number of GPUs of one node, and name the copy in train.deepspeed"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        table = read_json(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(table).__name__}")
    return table


def _owned(path: Path, key: str, theirs: object, ours: str, value: object) -> object:
    if theirs == "auto":
        return value
    said = f"{ours} (here {json.dumps(value)})" if value is not None else ours
    raise UserError(f'{path}: "{key}" = {json.dumps(theirs)}, but the run takes it from {said}: write "auto" here')


def _autos(value: object, prefix: str = "") -> Iterator[str]:
    """Dotted paths of the values that still say "auto"."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    elif value == "auto" and prefix != _AUTO_ALLOWED:
        yield prefix
    for key, child in children:
        yield from _autos(child, f"{prefix}.{key}" if prefix else str(key))
