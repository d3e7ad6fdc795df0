import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

from laser_dist.config import ModelConfig
from laser_dist.errors import UserError
from laser_dist.model.attention import NAME
from laser_dist.model.backbone import load_backbone, load_tokenizer, prepare_for_training
from laser_dist.testing import tiny_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), architecture="qwen3", layers=3)


def config(folder: Path, **options: object) -> ModelConfig:
    return ModelConfig(name=str(folder), **{"dtype": "float32", **options})


def test_loads_every_weight_for_packed_attention(folder):
    lm, saved = load_backbone(config(folder)), load_file(folder / "model.safetensors")
    state = lm.state_dict()
    assert lm.config._attn_implementation == NAME
    assert saved.keys() <= state.keys() and all(torch.equal(state[name], value) for name, value in saved.items())
    assert load_tokenizer(config(folder)).is_fast


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(folder, dtype):
    assert {p.dtype for p in load_backbone(config(folder, dtype=dtype)).parameters()} == {getattr(torch, dtype)}


def test_truncation_keeps_the_first_layers(folder):
    lm, saved = load_backbone(config(folder, layers=2)), load_file(folder / "model.safetensors")
    assert len(lm.model.layers) == lm.config.num_hidden_layers == len(lm.config.layer_types) == 2
    for name, value in lm.model.layers[1].state_dict().items():
        assert torch.equal(value, saved[f"model.layers.1.{name}"])


def test_more_layers_than_there_are(folder):
    with pytest.raises(UserError, match="model.layers = 4: the backbone has only 3"):
        load_backbone(config(folder, layers=4))


def test_missing_folder(tmp_path):
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(UserError, match="does not exist"):
            load(config(tmp_path / "missing"))


def test_folder_without_weights(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="cannot load its weights"):
        load_backbone(config(tmp_path))


def test_encoder_decoder_is_refused(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="t5 is not a causal LM"):
        load_backbone(config(tmp_path))


@pytest.mark.parametrize("name, value", [("final_logit_softcapping", 30.0), ("logits_scaling", 8.0)])
def test_rescaled_logits_are_refused(folder, tmp_path, name, value):
    content = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {name: value}))
    with pytest.raises(UserError, match=name):
        load_backbone(config(tmp_path))


def test_weights_under_other_names_are_refused(folder, tmp_path):
    """The published trainer saves under `encoder.`; such a checkpoint must not load as a random model."""
    weights = load_file(folder / "model.safetensors")
    save_file({f"encoder.{k}": v for k, v in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="were saved under other names"):
        load_backbone(config(tmp_path))


def test_bidirectional_encoder_is_refused(tmp_path):
    from transformers import BertLMHeadModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError):
        load_backbone(config(tmp_path))


def test_lora_trains_the_adapters_only(folder):
    lora = config(folder, lora_rank=2, lora_targets=("q_proj", "down_proj"))
    lm = prepare_for_training(load_backbone(lora), lora)
    trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 2 * 2 and all("lora_" in name for name in trained)


def test_lora_target_that_is_no_linear_layer(folder):
    lora = config(folder, lora_rank=2, lora_targets=("q_proj", "query", "norm"))
    with pytest.raises(UserError, match=r"\['norm', 'query'\] are no linear layers .*'k_proj'.*'v_proj'"):
        prepare_for_training(load_backbone(lora), lora)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_is_not_reentrant(folder, checkpointing, lora_rank):
    """The reentrant kind drops the gradient of K/V that leave a layer, without a word."""
    wanted = config(folder, activation_checkpointing=checkpointing, lora_rank=lora_rank)
    lm = prepare_for_training(load_backbone(wanted), wanted)
    base = lm.get_base_model() if lora_rank else lm
    assert lm.training and base.is_gradient_checkpointing == checkpointing
    for layer in base.model.layers:
        if checkpointing:
            assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False
