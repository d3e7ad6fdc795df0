"""`laser_dist.json`: what a model folder must say about itself so that serving equals training."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laser_dist.config import RunConfig, TextConfig, ThinkingConfig
from laser_dist.errors import UserError
from laser_dist.reading import decode_json, read_json, read_object
from laser_dist.recipe import section_from_table

FILE = "laser_dist.json"
FORMAT_VERSION = 1
_LARGEST_TOKENIZER = 128 * 2**20  # bytes; large vocabularies with their merges take a quarter of it


@dataclass(frozen=True, kw_only=True)
class RetrieverCard:
    """Thinking, templates and the backbone a folder was trained from; saved in every checkpoint and export."""

    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    backbone: str = ""
    """Hub id or folder that training started from."""
    revision: str | None = None
    """Hub revision of the backbone."""
    layers: int | None = None
    """Decoder layers kept of the backbone, where it was truncated."""
    temperature: float | None = None
    """Tau that scores were divided by in training; what serves ranks alike with any."""

    @classmethod
    def of(cls, config: RunConfig) -> "RetrieverCard":
        model = config.model
        return cls(
            thinking=config.thinking,
            text=config.text,
            backbone=model.name,
            revision=model.revision,
            layers=model.layers,
            temperature=config.objective.temperature,
        )

    def save(self, folder: Path) -> None:
        """Write the card; where the folder has a tokenizer already, with the hash that `load` compares."""
        data = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self), "tokenizer": _tokenizer_hash(folder)}
        (folder / FILE).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "RetrieverCard":
        """The folder's card; the published defaults where it has none (released checkpoints).

        Raises UserError for a broken card, and for a tokenizer that is not the one the card was saved with.
        """
        path = folder / FILE
        if not path.is_file():
            return cls()
        try:
            data = read_object(path)
            if data.pop("format_version") != FORMAT_VERSION:
                raise UserError(f"another format version than {FORMAT_VERSION}; update laser_dist")
            if (saved := data.pop("tokenizer", None)) is not None and saved != (found := _tokenizer_hash(folder)):
                raise UserError(
                    "tokenizer.json beside it is not the tokenizer that this model was saved with (its hash is "
                    f"{str(found)[:12]}, not {str(saved)[:12]}): copy the folder's tokenizer files again from where "
                    "the weights came from"
                )
            # A folder may be anybody's: every value has the type and the range that a recipe's would need.
            thinking = section_from_table(ThinkingConfig, data.pop("thinking"), "thinking")
            text = section_from_table(TextConfig, data.pop("text"), "text")
            return section_from_table(cls, data, "", thinking=thinking, text=text)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is broken ({error}); copy it again from the checkpoint or export") from error


def _tokenizer_hash(folder: Path) -> str | None:
    """Of the folder's tokenizer.json, however the file is laid out; None where there is none."""
    path = folder / "tokenizer.json"
    return _hash_of(read_json(path, _LARGEST_TOKENIZER)) if path.is_file() else None


def tokenizer_hash(serialised: str) -> str:
    """SHA-256 of what maps text to ids in a tokenizer, given as the JSON of tokenizer.json."""
    return _hash_of(decode_json(serialised))


def _hash_of(stored: dict[str, Any]) -> str:
    vocabulary = stored["model"].get("vocab", {})
    added = sorted((token["id"], token["content"]) for token in stored.get("added_tokens", []))
    return hashlib.sha256(json.dumps([vocabulary, added], sort_keys=True).encode()).hexdigest()
