"""Model FLOPs are those that torch counts, and MFU's peaks those of the data sheets."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from laser_dist.batch import TokenSequence, pack
from laser_dist.config import ModelConfig
from laser_dist.model.backbone import load_backbone, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.observability.flops import ModelSize, peak_flops
from laser_dist.testing import tiny_model_folder

ROWS = [TokenSequence([5] * 20, [6] * 40, [9, 19, 39])] * 3 + [TokenSequence([7] * 37)] * 6


@pytest.mark.parametrize("convention", ["official", "paper"])
@pytest.mark.parametrize("lora_rank, layers", [(0, 2), (4, 6)])
def test_flops_are_what_torch_counts(tmp_path, convention, lora_rank, layers):
    """Without padding, recomputation or a flash kernel; the counter sees whole squares where half is needed."""
    config = ModelConfig(
        name=str(tiny_model_folder(tmp_path, layers=layers)),
        dtype="float32",
        lora_rank=lora_rank,
        activation_checkpointing=False,
    )
    retriever = LaserRetriever(prepare_for_training(load_backbone(config), config), steps=3, convention=convention)
    batch = pack(ROWS, eos=0, queries=3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        views = retriever(batch)
        torch.stack([view.sum() for view in views[:5]]).sum().backward()

    size = ModelSize.of(retriever)
    squares = float(batch.lengths_R.double().square().sum())
    causal = 3 * size.forward(tokens=0, squares=squares, prompts=0, rows=0).causal
    assert causal > 0.02 * size.step(batch), "attention must matter, or the test says nothing of it"
    # With LoRA the first layer's frozen matrices pass no gradient on from the packed sweep: 1 layer of 6.
    assert size.step(batch) + causal == pytest.approx(counter.get_total_flops(), rel=0.03 if lora_rank else 0.001)


def test_a_token_costs_six_flops_per_weight_and_four_with_lora():
    sizes = [ModelSize(matrices=1000, adapters=0, width=0, table=0, soft=2, frozen=frozen) for frozen in (False, True)]
    batch = pack([TokenSequence([1] * 50)] * 4)
    assert [size.step(batch) for size in sizes] == [6 * 1000 * 208, 4 * 1000 * 208]  # 200 packed and 8 soft tokens


def test_untied_heads_and_head_widths_are_the_models_own(tmp_path):
    """Qwen3's heads are wider than hidden size / heads; an LM head outside of the decoder is not one of its layers."""
    config = ModelConfig(name=str(tiny_model_folder(tmp_path, architecture="qwen3", tied=False)), dtype="float32")
    size = ModelSize.of(LaserRetriever(load_backbone(config), steps=3))
    hidden, inner, query, kv = 48, 96, 64, 32
    assert size.matrices == 2 * (2 * hidden * query + 2 * hidden * kv + 3 * hidden * inner)
    assert (size.width, size.soft, size.frozen) == (2 * query, 2, False)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA TITAN X", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, tflops):
    """L4 is no L40S, A10 no A100, and an H100 on PCIe not the one on SXM; an unknown device has no MFU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (None if tflops is None else tflops * 1e12)
    assert peak_flops(torch.device("cuda"), 100.0) == 100e12


def test_a_cpu_has_no_peak_unless_told():
    assert peak_flops(torch.device("cpu")) is None
    assert peak_flops(torch.device("cpu"), 0.1) == 1e11


def test_plans_use_the_same_peaks(monkeypatch):
    from laser_dist.planning.job import GPUS

    names = {"a100-40": "A100-SXM4-40GB", "a100-80": "A100-SXM4-80GB", "rtx4090": "GeForce RTX 4090"}
    for key, hardware in GPUS.items():
        name = f"NVIDIA {names.get(key, key.upper())}"
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == hardware.tflops * 1e12, key
