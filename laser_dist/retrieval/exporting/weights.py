"""The weights of an export: read from a checkpoint, rounded, written, and compared with what was read.

Weights that stay as they are lie in pages mapped from their file, which the system can drop and read again. Merging
adapters and rounding work in float32, one matrix at a time, and hold up to 6 bytes per parameter. Measured with
SmolLM2-135M beyond the imports: 2 bytes per parameter as it is, 6 to bfloat16, 5 merging. The export is loaded again
only when the source is gone, and safetensors writes from where the weights lie.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from laser_dist.errors import UserError
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.exporting.formats import save_folder, save_text

if TYPE_CHECKING:
    import numpy as np

    from laser_dist.retrieval.encoder import LaserEncoder

Dtype = Literal["float32", "bfloat16", "float16", "keep"]
TOLERANCE = 1e-5
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PROBE = "Why is the sky blue? Air scatters short waves of light more than long ones."
_ADAPTERS = "adapter_model.safetensors"


def has_adapters(source: Path) -> bool:
    return (source / "adapter_config.json").is_file()


def target_dtype(source: Path, dtype: str) -> tuple[str, str]:
    """Precision to write (for keep that of the full weights: the folder's own, or the backbone's) and to compute in."""
    from transformers import AutoConfig

    card = RetrieverCard.load(source)
    place, revision = (card.backbone, card.revision) if has_adapters(source) else (str(source), None)
    try:
        stored = AutoConfig.from_pretrained(place, revision=revision).dtype if place else None
    except (OSError, ValueError, KeyError):  # loading the weights will say it better
        stored = None
    name = str(stored or "float32").removeprefix("torch.")
    target = name if dtype == "keep" else dtype
    if target not in BYTES:
        raise UserError(f"{source}: is stored in {name}, which an export cannot keep: choose --dtype float32")
    # float32 else: adapters merged in bfloat16 lose what training has learnt in small steps, and what rounding changes
    # shows only against the weights as they were.
    alike = name == target == "bfloat16" and not has_adapters(source)
    return target, "bfloat16" if alike else "float32"


def load(source: Path, dtype: str) -> tuple["LaserEncoder", "np.ndarray"]:
    """The source's encoder, adapters merged, and its probe's vectors.

    UserError for weights that are damaged, diverged or do not fit together.
    """
    from safetensors import SafetensorError

    from laser_dist.retrieval.encoder import LaserEncoder

    try:
        encoder = LaserEncoder.from_pretrained(source, device="cpu", dtype=dtype)
        return encoder, probe(encoder)
    except UserError as error:
        raise UserError(f"{source} cannot be exported: {error}") from error
    except SafetensorError as error:
        raise UserError(f"{source}: its weights are damaged ({error}); export another checkpoint") from error


def size(encoder: "LaserEncoder", dtype: str) -> int:
    """Bytes of all weights in `dtype`."""
    return sum(parameter.numel() for parameter in encoder.retriever.parameters()) * BYTES[dtype]


def write_model(encoder: "LaserEncoder", folder: Path, dtype: str, max_shard_size: str) -> "np.ndarray":
    """Full weights in `dtype`, config, tokenizer and card; returns the probe's vectors after rounding."""
    computed = str(next(encoder.retriever.parameters()).dtype).removeprefix("torch.")
    _cast(encoder, dtype)
    save_folder(encoder.retriever.lm, encoder.text.tokenizer, encoder.card, folder, max_shard_size=max_shard_size)
    _cast(encoder, computed)
    return probe(encoder)


def write_adapters(encoder: "LaserEncoder", source: Path, folder: Path) -> None:
    """The adapters as they are stored, naming the backbone, with tokenizer and card; loads with PeftModel."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(source))
    config.base_model_name_or_path, config.revision = encoder.card.backbone, encoder.card.revision
    config.inference_mode = True
    config.save_pretrained(str(folder))
    shutil.copyfile(source / _ADAPTERS, folder / _ADAPTERS)
    save_text(encoder.text.tokenizer, encoder.card, folder)


def verify(folder: Path, written: "np.ndarray", dtype: str) -> None:
    """Load the export and compare. UserError if the vectors differ."""
    import numpy as np

    from laser_dist.retrieval.encoder import LaserEncoder

    found = probe(LaserEncoder.from_pretrained(folder, device="cpu", dtype=dtype))
    difference = float(np.abs(found - written).max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"the export gives other vectors than the checkpoint (largest difference {difference:.1e}), so it was "
            "removed: its architecture cannot be saved as a plain folder by the installed transformers"
        )


def probe(encoder: "LaserEncoder") -> "np.ndarray":
    """Vectors of one text, as a query and as a passage."""
    import numpy as np

    return np.concatenate([encoder.encode_queries([_PROBE]), encoder.encode_passages([_PROBE])])


def _cast(encoder: "LaserEncoder", dtype: str) -> None:
    from laser_dist.model.backbone import DTYPES

    # Parameters only: the buffers of rotary embeddings are made anew at loading, and must not be rounded here either.
    for name, parameter in encoder.retriever.lm.named_parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
        if not parameter.isfinite().all():
            raise UserError(f"--dtype {dtype}: {name} overflows it; choose float32 or bfloat16")
