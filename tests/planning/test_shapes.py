import json

import pytest
import torch

from laser_dist.errors import UserError
from laser_dist.planning.measure import random_model
from laser_dist.planning.shapes import KNOWN, Shape, find_shape, interpolate
from laser_dist.testing import tiny_model_folder

# Parameters that the hub states for each model's safetensors.
STATED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_known_shapes_have_the_parameters_that_the_hub_states():
    assert {name: shape.parameters for name, shape in KNOWN.items()} == STATED


@pytest.mark.parametrize("name", ["qwen3-0.6b", "llama-3.1-8b", "smollm2-360m"])
def test_transformers_counts_the_same(name):
    with torch.device("meta"):
        model = random_model(KNOWN[name], "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == KNOWN[name].parameters


def test_adapters_are_what_peft_adds():
    from laser_dist.config import ModelConfig
    from laser_dist.model.backbone import prepare_for_training

    shape = Shape(name="x", layers=2, hidden=24, intermediate=40, heads=4, kv_heads=2, head=6, vocabulary=99, tied=True)
    lm = prepare_for_training(random_model(shape, "float32"), ModelConfig(lora_rank=3))
    assert sum(p.numel() for p in lm.parameters() if p.requires_grad) == shape.adapters(3)


@pytest.mark.parametrize("architecture, tied", [("llama", True), ("qwen3", False)])
def test_a_folder_is_read_without_its_weights(tmp_path, architecture, tied):
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(tmp_path, architecture=architecture, tied=tied)
    expected = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    (folder / "model.safetensors").unlink()
    assert find_shape(str(folder)).parameters == expected


def test_names_and_sizes():
    assert find_shape("Qwen/Qwen3-8B") == find_shape("Qwen/qwen3-8b").__class__(**vars(KNOWN["qwen3-8b"]))
    assert find_shape("qwen3-8b").name == "Qwen/Qwen3-8B"
    assert find_shape("mine/Qwen3-8B").name == "mine/Qwen3-8B"  # a copy under another owner keeps its name
    for size in (0.13, 0.9, 2, 4, 30, 120):
        shape = find_shape(f"{size}B")
        assert shape.interpolated and shape.parameters == pytest.approx(size * 1e9, rel=0.03)
        assert shape.heads % shape.kv_heads == 0
    assert find_shape("500M").parameters == pytest.approx(5e8, rel=0.03)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, "mixture of experts"),
        ({"model_type": "nonsense"}, "cannot read its config"),
    ],
)
def test_models_that_are_not_modelled(tmp_path, change, told):
    folder = tiny_model_folder(tmp_path, architecture="qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=told):
        find_shape(str(folder))


def test_unknown_names_and_sizes(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r'cannot read its config.*Did you mean "qwen3-8b".*Llama-3.1-70B'):
        find_shape("qwen3-8")
    with pytest.raises(UserError, match="outside of what is modelled"):
        interpolate(1e12)
