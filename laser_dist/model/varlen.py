"""Packed attention with latent steps on a GPU: no padding anywhere, and no copy of a prompt's K/V.

The prefix runs through FlashAttention's variable-length function, whichever version is installed, else torch's own. The
latent steps run through `laser_kernels.latent_attention`, over the keys and values that the prefix left packed.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from laser_kernels import latent_attention
from torch import Tensor

from laser_dist.batch import PackedBatch
from laser_dist.errors import UserError
from laser_dist.model.latent_kv import LatentKV

Varlen = Callable[
    ..., Tensor
]  # (query, key, value (T, heads, head), borders (R + 1,) int32, longest, scaling, dropout)

# The newest first; each is a package of its own, so several can be installed.
FLASH = {
    "flash-attn 4": "flash_attn.cute",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 2": "flash_attn",
}
LARGEST_HEAD = 256


class PackedKV(LatentKV):
    """See `LatentKV`; the prefix is K, V (T, kv heads, head)."""

    def __init__(self, batch: PackedBatch, varlen: Varlen):
        super().__init__(batch)
        self.varlen = varlen
        self.borders = F.pad(batch.lengths_R.cumsum(0), (1, 0)).int()
        self.starts_R = batch.lengths_R.cumsum(0) - batch.lengths_R
        self.prompt_lengths_R = batch.prompt_lengths_R

    def attend_prefix(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float
    ) -> Tensor:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        self.prefix.setdefault(layer, (key, value))
        return self.varlen(query, key, value, self.borders, self.longest, scaling, dropout)

    def attend_step(
        self, step: int, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float
    ) -> Tensor:
        if dropout:
            raise UserError('attention_dropout is not supported by packed latent steps: set model.attention = "sdpa"')
        soft_key, soft_value = (x.permute(1, 2, 0, 3) for x in self.soft_so_far(step, layer, key, value))
        query = query.transpose(0, 1)
        prefix_key, prefix_value = self.prefix[layer]
        return latent_attention(
            query, prefix_key, prefix_value, self.starts_R, self.prompt_lengths_R, soft_key, soft_value, scaling
        )


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[str, str]:
    """(name, why) of the attention that runs: "sdpa" (padded), "torch varlen", or one of FLASH.

    `requested` is model.attention, `head_size` that of one head. Raises UserError if what it names cannot run here.
    """
    if requested == "sdpa":
        return "sdpa", "asked for"
    installed = [name for name, module in FLASH.items() if _has(module)]
    if requested == "flash" and not installed:
        raise UserError(
            'model.attention = "flash": flash-attn is not installed: pip install "laser-dist[flash]", or use "varlen"'
        )
    if obstacle := _obstacle(device, dtype, head_size):
        if requested == "auto":
            return "sdpa", obstacle
        raise UserError(f'model.attention = "{requested}" cannot run here: {obstacle}; use "auto" or "sdpa"')
    if requested == "varlen" or not installed:
        if not _has("torch.nn.attention.varlen"):
            if requested == "auto":
                return "sdpa", "neither flash-attn nor torch.nn.attention.varlen (torch 2.10) is installed"
            raise UserError('model.attention = "varlen" needs torch 2.10 or newer; use "flash" or "sdpa"')
        return "torch varlen", "asked for" if requested == "varlen" else "no flash-attn is installed"
    return installed[0], "asked for" if requested == "flash" else "auto"


def head_size(config: Any) -> int:
    """Numbers of one attention head, from a model's config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _obstacle(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why variable-length kernels cannot be used, or nothing."""
    if device.type != "cuda":
        return f"it needs a GPU, and this runs on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f'it takes bfloat16 and float16, not {str(dtype).removeprefix("torch.")}: set model.dtype = "bfloat16"'
    if head_size > LARGEST_HEAD or head_size % 8:
        return f"it takes heads of at most {LARGEST_HEAD} numbers in multiples of 8, not {head_size}"
    if not _has("triton"):
        return "latent steps need triton: pip install 'laser-dist[kernels]'"
    return ""


@functools.cache
def varlen_function(name: str) -> Varlen:
    """The prefix attention of this name (see `choose_attention`), behind one signature."""
    if name == "torch varlen":
        return _torch_varlen
    function = importlib.import_module(FLASH[name]).flash_attn_varlen_func
    known = set(inspect.signature(function).parameters)

    def flash(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scaling: float, dropout: float) -> Tensor:
        options: dict[str, Any] = {"max_seqlen_q": longest, "max_seqlen_k": longest, "dropout_p": dropout}
        if dropout and "dropout_p" not in known:
            raise UserError(f'{name} has no dropout, which this model\'s config asks for: set model.attention = "sdpa"')
        output = function(
            q,
            k,
            v,
            cu_seqlens_q=borders,
            cu_seqlens_k=borders,
            softmax_scale=scaling,
            causal=True,
            **{key: value for key, value in options.items() if key in known},
        )
        return output[0] if isinstance(output, tuple) else output

    return flash


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scaling: float, dropout: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise UserError(
            'torch varlen attention has no dropout, which this model asks for: set model.attention = "sdpa"'
        )
    known = set(inspect.signature(varlen_attn).parameters)
    if "scale" not in known:  # torch 2.10: the scale is fixed to head ** -0.5
        q = q * (scaling * q.shape[-1] ** 0.5)
    options: dict[str, Any] = {"scale": scaling} if "scale" in known else {}
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    output: Any = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
    return output


@functools.cache  # asked at every forward
def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
