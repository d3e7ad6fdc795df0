"""Which implementation of the two sweeps runs: chosen from device and dtype, logged once, and open to override."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

KERNELS = ("auto", "triton", "chunked", "reference")
VARIABLE = "LASER_KERNELS"

_log = logging.getLogger("laser_kernels")


def implementation(requested: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module with `statistics` and `score_gradients`; None is the reference. ValueError: it cannot run here.

    The environment variable LASER_KERNELS, where set, overrides what the code asks for.
    """
    name, reason = choose(requested, device, dtype)
    _announce(name, reason, str(device), str(dtype))
    if name == "reference":
        return None
    return importlib.import_module(f"laser_kernels.pair_{'triton' if name == 'triton' else 'torch'}")


def choose(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(name, why) of the implementation. ValueError: there is none of that name, or it cannot run here."""
    override = os.environ.get(VARIABLE)
    wanted, source = (override, VARIABLE) if override else (requested, "kernel")
    if wanted not in KERNELS:
        raise ValueError(f"{source} = {wanted!r}: must be one of {', '.join(KERNELS)}")
    obstacle = _obstacle(device, dtype)
    if wanted == "auto":
        return ("chunked", obstacle) if obstacle else ("triton", "auto")
    if wanted == "triton" and obstacle:
        raise ValueError(f"{source} = 'triton' cannot run here: {obstacle}. Use auto, chunked or reference")
    return wanted, f"{source} asks for it"


def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why Triton cannot be used, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    if device.type == "cuda":
        return ""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"{device.type} tensors need TRITON_INTERPRET=1"
    return "" if _is_interpreted() else "TRITON_INTERPRET=1 was set after triton had been imported"


def _is_interpreted() -> bool:
    """Triton decides when a function is defined; of its own library that is when it is first imported."""
    from triton.language import sum as library_function
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(library_function, InterpretedFunction)


@functools.cache
def _announce(name: str, reason: str, device: str, dtype: str) -> None:
    _log.info("alignment_loss: %s for %s on %s (%s)", name, dtype, device, reason)
