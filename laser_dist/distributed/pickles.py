"""What may be unpickled from a checkpoint: tensors, plain containers and a few types of DeepSpeed's."""

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from laser_dist.errors import UserError

# What DeepSpeed stores beside tensors (stages 3, and 1 and 2).
SAFE_GLOBALS = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
_LARGEST_PICKLE = 256 * 2**20  # bytes of what is no tensor: names, shapes and places, for each parameter


def safe_load(path: str, map_location: Any = None) -> Any:
    """torch.load that runs no code from the file. UserError for a file that holds anything else than data."""
    check_archive(Path(path))
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location=map_location, weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        AttributeError,
        TypeError,
        MemoryError,
    ) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path} is refused: it holds more than data, or is damaged ({reason[:200]})") from error


def check_archive(path: Path) -> None:
    """UserError unless the file is laid out as torch.save does: a zip whose files are stored and not compressed.

    A few compressed bytes could unpack to any amount of memory, and the formats of old have no bounds at all.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path} is refused: it is not what torch.save writes ({error})") from None
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size]
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{path} is refused: its parts are compressed or overlap, as torch.save never writes them")
    if max((e.file_size for e in entries if e.filename.endswith("data.pkl")), default=0) > _LARGEST_PICKLE:
        raise UserError(f"{path} is refused: its description alone takes more than {_LARGEST_PICKLE >> 20} MiB")


@contextmanager
def safe_pickles() -> Iterator[None]:
    """Inside, every torch.load of this process is as `safe_load`, also where a library passes weights_only=False."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # torch refuses both at once
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            yield
    finally:
        os.environ.pop(names[0])
        os.environ.update({name: value for name, value in before.items() if value is not None})
