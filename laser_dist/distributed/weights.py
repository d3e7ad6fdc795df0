"""The whole model as a Hugging Face folder, written shard by shard: rank 0 never holds more than one of them."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from laser_dist.distributed.collectives import rank
from laser_dist.distributed.engine import Engine
from laser_dist.distributed.together import Together
from laser_dist.files import write_json


def save_model(engine: Engine, folder: Path, max_shard_gb: float, writes: Together) -> None:
    """Write config and weights, or, for LoRA, the adapters alone, to the new `folder`. All ranks call it.

    A shard holds at most `max_shard_gb` GB (10^9 bytes), and at least one parameter; tied weights are written once.
    `writes` notes what cannot be written: the gathers go on with all ranks.
    """
    lm: Any = engine.module.lm
    if rank() == 0:
        writes.run(folder.mkdir)
    if hasattr(lm, "peft_config"):
        adapters = engine.whole([name for name, p in lm.named_parameters() if p.requires_grad])
        if rank() == 0:
            writes.run(lm.save_pretrained, folder, state_dict=adapters)
        return
    if rank() == 0:
        writes.run(lm.save_pretrained, folder, state_dict={})  # the config; of weights it would want all at once
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in lm.named_parameters()}
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=lm.get_parameter(name).dtype, device="meta") for name, shape in shapes.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(max_shard_gb * 1e9),
    )
    places: dict[str, str] = {}
    for file, names in plan.filename_to_tensors.items():
        shard = engine.whole(names)
        if rank() == 0:
            names = writes.run(_write_shard, lm, shard, folder / file) or []
            places |= dict.fromkeys(names, file)
        del shard  # before the next one is gathered
    if rank() == 0 and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(places.items()))}
        writes.run(write_json, folder / "model.safetensors.index.json", index)


def _write_shard(lm: Any, shard: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Returns the names in the file, which others know: transformers stacks experts and the like when it loads."""
    shard = revert_weight_conversion(lm, shard)
    save_file({name: x.contiguous() for name, x in shard.items()}, path, metadata={"format": "pt"})
    return list(shard)
