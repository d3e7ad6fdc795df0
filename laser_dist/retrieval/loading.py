"""The causal LM and tokenizer of a model folder, LoRA merged."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from laser_dist.config import ModelConfig
from laser_dist.errors import UserError
from laser_dist.model.backbone import load_backbone, load_tokenizer
from laser_dist.reading import read_object
from laser_dist.retrieval.card import RetrieverCard


def load_trained_lm(folder: str, card: RetrieverCard, *, dtype: str, layers: int | None = None) -> tuple[Any, Any]:
    """The causal LM and tokenizer of a model folder; LoRA adapters are loaded onto their backbone and merged.

    Raises UserError for a folder that cannot be read, adapters that do not fit, and another model's tokenizer.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        lm, tokenizer = _load_adapted(folder, card, dtype, layers), load_tokenizer(ModelConfig(name=folder))
    else:
        config = ModelConfig(name=folder, dtype=dtype, layers=layers)  # type: ignore[arg-type]
        lm, tokenizer = load_backbone(config), load_tokenizer(config)
    _check_vocabulary(folder, lm, tokenizer)
    return lm, tokenizer


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; None: a GPU if there is one. Raises UserError where it does not exist."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device {name!r}: there is no such kind; give cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: torch sees {torch.cuda.device_count()} GPUs; give cpu or another number")
    return device


def _load_adapted(folder: str, card: RetrieverCard, dtype: str, layers: int | None) -> Any:
    from peft import PeftModel

    if not card.backbone:
        raise UserError(f"{folder}: holds adapters, and no laser_dist.json that names their backbone; copy it here")
    _check_adapter_files(folder)
    kept = card.layers if layers is None else layers
    config = ModelConfig(name=card.backbone, revision=card.revision, layers=kept, dtype=dtype)  # type: ignore[arg-type]
    backbone = load_backbone(config)
    try:
        adapted = PeftModel.from_pretrained(backbone, folder)
    except Exception as error:  # PEFT raises many kinds
        raise UserError(f"{folder}: these adapters do not fit the backbone {card.backbone!r}: {error}") from error
    _check_adapters(adapted, folder, card.backbone)
    return adapted.merge_and_unload()


def _check_adapter_files(folder: str) -> None:
    """UserError for what PEFT would take on trust: pickles, patterns that never end, ranks that fill the memory."""
    settings, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder}: adapter_model.safetensors is missing")
    try:
        table = read_object(settings)
        with safe_open(weights, "pt") as file:
            ranks = [file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key]
    except (OSError, ValueError, SafetensorError, IndexError) as error:
        raise UserError(f"{folder}: its adapters cannot be read ({error}); copy them again") from error
    patterns = [table.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    if table.get("peft_type") != "LORA" or any(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{settings}: only LoRA with lists of layers is read, no other adapters and no patterns")
    if table.get("rank_pattern") or table.get("alpha_pattern"):
        raise UserError(f"{settings}: adapters of several ranks are not read")
    if set(ranks) != {table.get("r")}:
        raise UserError(f"{settings}: r = {table.get('r')!r}, but the weights have the ranks {sorted(set(ranks))[:3]}")


def _check_adapters(adapted: Any, folder: str, backbone: str) -> None:
    # PEFT skips adapters that it has no layer for, and lets layers be that it has no adapters for.
    from peft import get_peft_model_state_dict

    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        stored = {key for key in file.keys() if "lora_" in key}
    expected = {key for key in get_peft_model_state_dict(adapted, save_embedding_layers=False) if "lora_" in key}
    if stored != expected:
        raise UserError(
            f"{folder}: these adapters do not fit the backbone {backbone!r}: {len(stored - expected)} have no layer "
            f"there, and {len(expected - stored)} layers have none"
        )


def _check_vocabulary(folder: str, lm: Any, tokenizer: Any) -> None:
    # Ids beyond the table end in an index error on a CPU, at the first text that has one, and in worse on a GPU.
    rows = lm.get_input_embeddings().num_embeddings
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(
            f"{folder}: its tokenizer has ids up to {largest}, and its embedding {rows} rows: this is another model's "
            "tokenizer; copy the tokenizer files again from where the weights came from"
        )
