"""What a checkpoint takes on disk, and whether there is room for it."""

import shutil
from pathlib import Path
from typing import Any

from laser_dist.distributed.engine import Engine
from laser_dist.errors import UserError

ADAM = 8
"""Bytes of AdamW's two states per trained parameter."""


def checkpoint_bytes(engine: Engine) -> int:
    """About what a checkpoint takes, on all ranks together; tokenizer and small files come on top.

    model/: weights, or adapters alone. deepspeed/: AdamW's states and, unless ZeRO-0 trains in float32, float32 copies;
    up to ZeRO-2 the weights once more.
    """
    total = 0
    lm: Any = engine.module.lm
    lora = hasattr(lm, "peft_config")
    for parameter in lm.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.requires_grad or not lora:
            total += count * parameter.element_size()
        if parameter.requires_grad:
            copies = 4 if engine.stage or parameter.element_size() < 4 else 0
            total += count * (ADAM + copies + (parameter.element_size() if engine.stage < 3 else 0))
    return total


def require_space(folder: Path, needed: int, what: str) -> None:
    """UserError unless `needed` bytes are free where `folder` is; `what` takes them. A quota is not seen here."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{what} takes about {size(needed)}, and {size(free)} are free in {folder}")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size(count: float) -> str:
    """Bytes for people: 1.50 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
