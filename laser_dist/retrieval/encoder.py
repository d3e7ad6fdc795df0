"""LaserEncoder: texts to unit vectors with the latent view, packed, on CPU or GPU; the trainer's vectors exactly."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from laser_dist.batch import Passage, TokenSequence, pack
from laser_dist.config import ModelConfig, RunConfig
from laser_dist.data.text import TextFormat
from laser_dist.distributed.collectives import merge_rows, rank, world_size
from laser_dist.errors import UserError
from laser_dist.model.backbone import DTYPES, load_backbone, load_tokenizer
from laser_dist.model.retriever import LaserRetriever
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.run_folder import latest_checkpoint


class LaserEncoder:
    """Encodes queries and passages; `from_pretrained` takes a training checkpoint, an export or a published folder.

    Rows are packed without padding, so the tokenizer's padding side is irrelevant and a text alone gives the vector
    it gives in a batch.
    """

    def __init__(
        self,
        retriever: LaserRetriever,
        text: TextFormat,
        card: RetrieverCard,
        *,
        batch_tokens: int = 4096,
        over_ranks: bool = False,
    ):
        """`over_ranks` shares the work among all ranks of the process group; then every rank must make every call."""
        self.retriever = retriever
        self.text = text
        self.card = card
        self.batch_tokens = batch_tokens
        self.over_ranks = over_ranks

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        steps: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        layers: int | None = None,
        batch_tokens: int = 4096,
    ) -> "LaserEncoder":
        """Load a folder (or a hub id). `steps` overrides K; `dtype` is float32 on CPU and bfloat16 on GPU by default.

        Raises UserError for a folder that is no model, and for LoRA adapters whose backbone cannot be found.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
        folder = model_folder(folder)
        card = RetrieverCard.load(Path(folder))
        if steps is not None:
            card = dataclasses.replace(card, thinking=dataclasses.replace(card.thinking, steps=steps))
        lm, tokenizer = load_trained_lm(folder, card, dtype=dtype, layers=layers)
        retriever = LaserRetriever(lm, steps=card.thinking.steps, convention=card.thinking.convention)
        text = TextFormat(tokenizer, card.text)
        return cls(retriever.to(device).eval(), text, card, batch_tokens=batch_tokens)

    @classmethod
    def from_config(cls, config: RunConfig, **options: Any) -> "LaserEncoder":
        """The untrained backbone of a run, with the run's thinking and text settings."""
        card = RetrieverCard.of(config)
        lm, text = load_backbone(config.model), TextFormat(load_tokenizer(config.model), config.text)
        retriever = LaserRetriever(lm, steps=config.thinking.steps, convention=config.thinking.convention)
        return cls(retriever.eval(), text, card, **options)

    @property
    def dim(self) -> int:
        return int(self.retriever.base.config.hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.retriever.parameters()).device

    def description(self) -> dict[str, Any]:
        """What made the vectors, for result files: thinking, text settings, size and precision of the model."""
        parameters = list(self.retriever.lm.parameters())
        return {
            **dataclasses.asdict(self.card),
            "layers": self.retriever.base.config.num_hidden_layers,
            "parameters": sum(p.numel() for p in parameters),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
        }

    def encode_queries(
        self, texts: Sequence[str], *, instructions: Sequence[str | None] | None = None, progress: bool = False
    ) -> np.ndarray:
        """Queries -> float32 [n, D], rows of unit length; an instruction of None is the model's own default."""
        _check_texts(texts)
        instructions = instructions or [None] * len(texts)
        prompts = [self.text.query(text, instruction) for text, instruction in zip(texts, instructions, strict=True)]
        return self.encode_prompts(prompts, "encoding queries" if progress else None)

    def encode_passages(
        self, texts: Sequence[str], *, titles: Sequence[str] | None = None, progress: bool = False
    ) -> np.ndarray:
        """Passages -> float32 [n, D], rows of unit length."""
        _check_texts(texts)
        titles = titles or [""] * len(texts)
        passages = [Passage(id="", text=text, title=title) for text, title in zip(texts, titles, strict=True)]
        prompts = [self.text.passage(passage) for passage in passages]
        return self.encode_prompts(prompts, "encoding passages" if progress else None)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[list[int]], progress: str | None = None) -> np.ndarray:
        """Token ids -> vectors, longest first in batches of at most `batch_tokens` tokens (one longer row alone)."""
        was_training = self.retriever.training
        self.retriever.eval()
        vectors = np.zeros((len(prompts), self.dim), np.float32)
        batches = list(self._batches(prompts))
        if self.over_ranks:
            # ZeRO-3 gathers parameters in every forward, so each rank must run equally many: repeat one at the end.
            batches += batches[:1] * (-len(batches) % world_size())
            batches = batches[rank() :: world_size()]
        for indexes in track(batches, description=progress) if progress else batches:
            batch = pack([TokenSequence(prompts[i]) for i in indexes]).to(self.device)
            vectors[indexes] = self.retriever(batch).passage_PD.float().cpu().numpy()
        self.retriever.train(was_training)
        return merge_rows(vectors) if self.over_ranks else vectors

    def _batches(self, prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        batch: list[int] = []
        tokens = 0
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            if batch and tokens + len(prompts[i]) > self.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += len(prompts[i])
        if batch:
            yield batch


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise UserError("texts: expected a list of strings, got one string; wrap it in a list")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"texts[{i}] = {text!r}: expected a text that is not empty")


def model_folder(path: str | Path) -> str:
    """The model folder in `path`: itself, or a checkpoint's model/, or a run's newest checkpoint's; else a hub id."""
    folder = Path(path).expanduser()
    if (folder / "checkpoints" / "latest").is_file():
        folder = latest_checkpoint(folder)
    if (folder / "model").is_dir():
        folder = folder / "model"
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{folder} holds no model: expected config.json or adapter_config.json in it")
        return str(folder)
    if str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise UserError(f"{path}: this folder does not exist")
    return _download(str(path))


def _download(hub_id: str) -> str:
    """The hub repository as a local folder, so that its card and its adapters are found as in any other folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{hub_id} is neither a folder nor a hub model that can be downloaded: {reason}") from error


def load_trained_lm(folder: str, card: RetrieverCard, *, dtype: str, layers: int | None = None) -> tuple[Any, Any]:
    """The causal LM and tokenizer of a model folder; LoRA adapters are loaded onto their backbone and merged."""
    if not (Path(folder) / "adapter_config.json").is_file():
        config = ModelConfig(name=folder, dtype=dtype, layers=layers)  # type: ignore[arg-type]
        return load_backbone(config), load_tokenizer(config)
    from peft import PeftModel

    if not card.backbone:
        raise UserError(f"{folder}: holds adapters, and no laser_dist.json that names their backbone; copy it here")
    config = ModelConfig(name=card.backbone, revision=card.revision, layers=card.layers, dtype=dtype)  # type: ignore[arg-type]
    backbone = load_backbone(config)
    try:
        adapted = PeftModel.from_pretrained(backbone, folder)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: these adapters do not fit the backbone {card.backbone!r}: {error}") from error
    _check_adapters(adapted, folder, card.backbone)
    return adapted.merge_and_unload(), load_tokenizer(ModelConfig(name=folder))


def _check_adapters(adapted: Any, folder: str, backbone: str) -> None:
    # PEFT skips adapters that it has no layer for, and lets layers be that it has no adapters for.
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder}: adapter_model.safetensors is missing")
    with safe_open(path, "pt") as file:
        stored = {key for key in file.keys() if "lora_" in key}
    expected = {key for key in get_peft_model_state_dict(adapted, save_embedding_layers=False) if "lora_" in key}
    if stored != expected:
        raise UserError(
            f"{folder}: these adapters do not fit the backbone {backbone!r}: {len(stored - expected)} have no layer "
            f"there, and {len(expected - stored)} layers have none"
        )
