"""What the weight files of a model folder say of themselves, before anything is built or read after them.

transformers builds what config.json asks for, makes up weights that no file has, reads the files that an index names
wherever they lie, and falls back to pickles. A folder may be anybody's.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from laser_dist.errors import UserError
from laser_dist.reading import is_file_name, read_object

INDEX = "model.safetensors.index.json"


def check_weights(folder: Path, hf_config: PretrainedConfig) -> None:
    """UserError unless the folder has safetensors, all of its own, that could hold a model of this config.

    No weight of a model is larger than all it has stored together, and each layer has at least one of its own.
    """
    tensors, elements = 0, 0
    for path in _files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    size = 1
                    for length in file.get_slice(name).get_shape():
                        size *= length
                    tensors, elements = tensors + 1, elements + size
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is no safetensors file ({error}); copy it again") from error
    text = hf_config.get_text_config()
    width = _number(folder, text, "hidden_size")
    for name in ("vocab_size", "hidden_size", "intermediate_size"):
        if _number(folder, text, name, 0) * width > elements:
            raise UserError(
                f"{folder / 'config.json'}: {name} = {getattr(text, name)} with hidden_size = {width} asks for more "
                f"than the {elements:,} numbers that the weight files hold: they are another model's"
            )
    if (layers := _number(folder, text, "num_hidden_layers")) > tensors:
        raise UserError(
            f"{folder / 'config.json'}: num_hidden_layers = {layers}, but the weight files hold {tensors} tensors: "
            "they are another model's"
        )


def _files(folder: Path) -> list[Path]:
    """The weight files that transformers will read: one, or those of an index."""
    if (single := folder / "model.safetensors").is_file():
        return [single]
    try:
        named = set(read_object(folder / INDEX, 64 * 2**20)["weight_map"].values())
    except FileNotFoundError:
        raise UserError(
            f"{folder}: cannot load its weights: neither model.safetensors nor {INDEX} is there; weights in other "
            "formats (.bin, .pt) are not read: save them as safetensors"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({error}); copy it again") from None
    if outside := [name for name in named if not is_file_name(name)]:
        raise UserError(f"{folder / INDEX} names {str(outside[0])[:60]!r}, which does not lie in the folder")
    return sorted(folder / name for name in named)


def _number(folder: Path, config: Any, name: str, default: int | None = None) -> int:
    value = getattr(config, name, default)
    if type(value) is not int or value < 0:
        raise UserError(f"{folder / 'config.json'}: {name} = {value!r}: must be a whole number")
    return value
