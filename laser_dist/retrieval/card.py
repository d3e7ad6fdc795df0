"""`laser_dist.json`: what a model folder must say about itself so that serving equals training."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from laser_dist.config import RunConfig, TextConfig, ThinkingConfig
from laser_dist.errors import UserError

FILE = "laser_dist.json"
FORMAT_VERSION = 1


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

    @classmethod
    def of(cls, config: RunConfig) -> "RetrieverCard":
        model = config.model
        return cls(
            thinking=config.thinking,
            text=config.text,
            backbone=model.name,
            revision=model.revision,
            layers=model.layers,
        )

    def save(self, folder: Path) -> None:
        data = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        (folder / FILE).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "RetrieverCard":
        """The folder's card; the published defaults where it has none (released checkpoints). UserError if broken."""
        path = folder / FILE
        if not path.is_file():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format_version") != FORMAT_VERSION:
                raise UserError(f"another format version than {FORMAT_VERSION}; update laser_dist")
            return cls(thinking=ThinkingConfig(**data.pop("thinking")), text=TextConfig(**data.pop("text")), **data)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is broken ({error}); copy it again from the checkpoint or export") from error
