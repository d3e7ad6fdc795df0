"""Model FLOPs of a step, and the share of the hardware's peak that they make (MFU).

A multiply-add is two FLOPs. With T packed tokens, R texts, S soft tokens per text, N the weights of all matrices in
layers (adapters included), a the width of all heads of all layers, V the vocabulary and D the hidden size, a forward is

    layers      2 N (T + S R)
    attention   2 a (sum over packed rows of length^2), half of each square: it is causal
                4 a (sum over texts of prompt + j) in latent step j = 1 .. S
    LM head     4 V D S R: the logits, and the soft tokens they make of the embedding table

and backward twice that, once where a matrix is frozen (LoRA): it gets no gradient, and passes one on. So full
fine-tuning costs the familiar 6 N a token, and LoRA 4 N.

MFU counts what the mathematics needs: neither activation checkpointing's recomputation, nor GradCache's second forward,
nor attention's second computation of scores, nor padding. Turning checkpointing on therefore lowers it (HFU, which
counts recomputation, would hardly move). Left out: the loss, norms, the update (below 1 % for any real model).
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from laser_dist.batch import PackedBatch
from laser_dist.model.varlen import head_size

# Dense bfloat16 with float32 accumulation, TFLOP/s, from the makers' data sheets; the first that fits a device's name.
PEAK_TFLOPS = (
    (r"B200", 2250.0),
    (r"H200|GH200", 989.0),
    (r"H100.*PCIe", 756.0),
    (r"H100.*NVL", 835.0),
    (r"H100", 989.0),
    (r"A100", 312.0),
    (r"L40S", 362.0),
    (r"A10\b", 125.0),
    (r"L4\b", 121.0),
    (r"RTX 4090", 165.0),
    (r"MI300X", 1307.0),
    (r"MI250X", 383.0),
)


def peak_flops(device: torch.device, tflops: float | None = None) -> float | None:
    """FLOP/s of one rank's device: `tflops` if given, else the data sheet's for bfloat16; None if it is not known.

    A CPU has no such figure: what its matrix product reaches depends on who else is using it.
    """
    if tflops:
        return tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak * 1e12 for pattern, peak in PEAK_TFLOPS if re.search(pattern, name)), None)


class Forward(NamedTuple):
    """FLOPs of one forward, by part."""

    layers: float
    """Matrices of the backbone's layers, over packed and soft tokens."""
    adapters: float
    causal: float
    """Attention inside packed rows, the causal half."""
    latent: float
    """Attention of the soft tokens."""
    head: float


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What of a dense decoder decides its FLOPs."""

    matrices: int
    """Weights of all layers' linear maps, without adapters."""
    adapters: int
    width: int
    """Layers times heads times the width of one head."""
    table: int
    """V D, the LM head's weights."""
    soft: int
    """Soft tokens per text: K - 1 under the official convention, K under the paper's."""
    frozen: bool
    """Only adapters are trained."""

    @classmethod
    def of(cls, retriever: Any) -> "ModelSize":
        """The size of a LaserRetriever, from its modules: under ZeRO-3 its parameters are in parts."""
        config = retriever.base.config
        found = {True: 0, False: 0}
        for name, module in retriever.decoder.named_modules():
            if isinstance(module, nn.Linear):
                found[".lora_" in name] += module.in_features * module.out_features
        return cls(
            matrices=found[False],
            adapters=found[True],
            width=config.num_hidden_layers * config.num_attention_heads * head_size(config),
            table=retriever.base.get_output_embeddings().in_features * config.vocab_size,
            soft=retriever.steps - (retriever.convention == "official"),
            frozen=found[True] > 0,
        )

    def forward(self, *, tokens: float, squares: float, prompts: float, rows: float) -> Forward:
        """FLOPs of one forward over rows packed into `tokens`; `squares` sums length^2, `prompts` the prefixes."""
        every = tokens + self.soft * rows
        return Forward(
            layers=2 * self.matrices * every,
            adapters=2 * self.adapters * every,
            causal=2 * self.width * squares,
            latent=4 * self.width * sum(prompts + j * rows for j in range(1, self.soft + 1)),
            head=4 * self.table * self.soft * rows,
        )

    def step(self, batch: PackedBatch) -> float:
        """Model FLOPs of forward and backward of one micro-batch."""
        lengths = batch.lengths_R.double()
        parts = self.forward(
            tokens=float(lengths.sum()),
            squares=float(lengths.square().sum()),
            prompts=float(batch.prompt_lengths_R.sum()),
            rows=len(lengths),
        )
        backward = 1 if self.frozen else 2
        return (1 + backward) * (parts.layers + parts.head) + 3 * (parts.adapters + parts.causal + parts.latent)
