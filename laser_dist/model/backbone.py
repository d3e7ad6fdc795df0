"""Backbones: a transformers causal LM, loaded for packed latent thinking, with LoRA and activation checkpointing."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from laser_dist.config import ModelConfig
from laser_dist.errors import UserError
from laser_dist.model.attention import NAME as PACKED_ATTENTION
from laser_dist.model.varlen import choose_attention, head_size
from laser_dist.model.weight_files import check_weights

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the backbone. Raises UserError where the folder or hub id cannot be read."""
    return _load(AutoTokenizer, config, "tokenizer")


def check_attention(config: ModelConfig, device: torch.device) -> str:
    """Name of the attention that the backbone will run on `device`, from its config alone, so before weights load.

    Raises UserError if `config.attention` cannot run there.
    """
    hf_config = _load(AutoConfig, config, "config")
    _check_config(hf_config, config)
    return choose_attention(config.attention, device, DTYPES[config.dtype], head_size(hf_config))[0]


def load_backbone(config: ModelConfig, ds_config: dict[str, Any] | None = None) -> nn.Module:
    """The causal LM in its dtype on the CPU, truncated to `layers`, not yet prepared for training.

    With a `ds_config` of ZeRO-3 every rank has only its part of each weight, on its device, from the beginning: rank 0
    reads the files, a module at a time, and hands out. All ranks must call it, in a process group.
    """
    hf_config = _load(AutoConfig, config, "config")
    _check_config(hf_config, config)
    if (folder := Path(config.name).expanduser()).is_dir():
        check_weights(folder, hf_config)
    if config.layers is not None:
        _truncate(hf_config, config.layers)
    _import_modelling_code(hf_config)
    # Truncation leaves the weights of the layers above unused; transformers lists each of them as a warning.
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with _partitioned(ds_config):
            lm, loading = _load(
                AutoModelForCausalLM,
                config,
                "weights",
                config=hf_config,
                dtype=DTYPES[config.dtype],
                attn_implementation=PACKED_ATTENTION,
                output_loading_info=True,
            )
    finally:
        logging.getLogger("transformers").setLevel(level)
    # transformers makes up weights that it does not find, and says so only in a log.
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"model.name = {config.name!r}: its weights lack {missing[0]} and {len(missing) - 1} other tensors: "
            "they are another model's, or were saved under other names"
        )
    if any(getattr(module, "is_causal", True) is False for module in lm.modules()):
        raise UserError(f"{config.name}: its attention looks both ways; use a causal LM (Qwen3, Llama, ...)")
    if lm.get_output_embeddings() is None:
        raise UserError(f"{config.name}: has no LM head, which soft tokens need; use a causal LM checkpoint")
    return lm


def prepare_for_training(lm: nn.Module, config: ModelConfig) -> nn.Module:
    """Add LoRA adapters and activation checkpointing as configured; returns the module to train."""
    if config.lora_rank:
        lm = _with_lora(lm, config)
    if config.activation_checkpointing:
        # Non-reentrant only: the reentrant kind silently drops the gradient of K/V that leave a layer.
        if hasattr(lm, "activation_checkpointing_enable"):  # its name from transformers 5.2x on
            lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return lm.train()


def _with_lora(lm: nn.Module, config: ModelConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    linear = {name.rsplit(".", 1)[-1] for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
    if missing := sorted(set(config.lora_targets) - linear):
        raise UserError(f"model.lora_targets: {missing} are no linear layers of {config.name}; it has {sorted(linear)}")
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(lm, adapters)


def _load(factory: Any, model: ModelConfig, what: str, **arguments: object) -> Any:
    if model.name.startswith((".", "/", "~")) and not Path(model.name).expanduser().is_dir():
        raise UserError(f"model.name = {model.name!r}: this folder does not exist")
    try:
        return factory.from_pretrained(
            str(Path(model.name).expanduser()) if Path(model.name).expanduser().is_dir() else model.name,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **arguments,
        )
    except UserError:
        raise
    except Exception as error:  # damaged, foreign and hostile files raise many kinds
        if PACKED_ATTENTION in str(error):
            raise UserError(
                f"model.name = {model.name!r}: ignores transformers' attention registry, which latent thinking needs; "
                "use a decoder that honours attn_implementation (Qwen3, Llama, Mistral, ...)"
            ) from error
        reason = [line[:300] for line in str(error).strip().splitlines()]
        raise UserError(
            f"model.name = {model.name!r}: cannot load its {what}: {reason[0] if reason else error!r} "
            "(a hub id needs network access or a cached copy; a folder needs config.json, tokenizer and safetensors)"
        ) from error


@contextmanager
def _partitioned(ds_config: dict[str, Any] | None) -> Iterator[None]:
    """Inside, transformers builds models in ZeRO-3's parts, if that is what `ds_config` says."""
    if (ds_config or {}).get("zero_optimization", {}).get("stage") != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(ds_config)  # transformers keeps a weak reference
    try:
        yield
    finally:
        del alive


def _check_config(hf_config: PretrainedConfig, config: ModelConfig) -> None:
    if hf_config.is_encoder_decoder or hf_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"model.name = {config.name!r}: {hf_config.model_type} is not a causal LM; use Qwen3, Llama, ..."
        )
    # State-space and convolution layers would carry tokens from one packed row into the next.
    recurrent = [name for name in hf_config.to_dict() if name.startswith(("mamba_", "ssm_", "conv_L_"))]
    if recurrent:
        raise UserError(
            f"model.name = {config.name!r}: {hf_config.model_type} has layers that are no attention ({recurrent[0]}); "
            "use Qwen3, Llama, ..."
        )
    # Models that rescale embeddings or logits outside those modules would get soft tokens of the wrong scale.
    for name in ("embedding_multiplier", "logits_scaling", "final_logit_softcapping", "scale_emb"):
        if getattr(hf_config, name, None) not in (None, 1, 1.0):
            raise UserError(
                f"model.name = {config.name!r}: its {name} is not supported by soft tokens; use Qwen3, Llama, ..."
            )


def _truncate(hf_config: PretrainedConfig, layers: int) -> None:
    if layers > hf_config.num_hidden_layers:
        raise UserError(f"model.layers = {layers}: the backbone has only {hf_config.num_hidden_layers}")
    hf_config.num_hidden_layers = layers
    if getattr(hf_config, "layer_types", None):
        hf_config.layer_types = hf_config.layer_types[:layers]


def _import_modelling_code(hf_config: PretrainedConfig) -> None:
    # Under DeepSpeed's partitioned construction a first import of the modelling module crashes; import it before.
    import torch._dynamo  # noqa: F401

    module = hf_config.model_type.replace("-", "_")
    try:
        importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    except ModuleNotFoundError:
        logger.debug("no modelling module for %s to import ahead", hf_config.model_type)
