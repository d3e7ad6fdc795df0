"""LaserMteb: a LaserEncoder as mteb's models are, for `mteb.evaluate(model, tasks)` and everything built on it.

    from laser_dist.retrieval.evaluation.mteb_adapter import LaserMteb
    mteb.evaluate(LaserMteb.from_pretrained("model/"), mteb.get_tasks(tasks=["NFCorpus"]))

A query's instruction is ours for the task (instructions.json), else mteb's prompt for it, else the model's own. Titles
go where the model's template puts them, not before the text as mteb has them. Import this module only where mteb is
installed: pip install 'laser-dist[mteb]'.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from laser_dist.retrieval.encode import weights_hash
from laser_dist.retrieval.encoder import LaserEncoder
from laser_dist.retrieval.folders import model_folder

_NO_TEXT = "-"  # stands in for a passage without any text, which some of mteb's corpora have; vectors need a token


@cache
def task_instructions() -> Mapping[str, str]:
    """Task name -> the instruction that its queries are asked with; instructions.json says where they are from."""
    path = Path(__file__).with_name("instructions.json")
    return json.loads(path.read_text(encoding="utf-8"))["instructions"]


class LaserMteb(AbsEncoder):
    """mteb's encoder protocol: queries by prompt_type query, everything else as passages, float32 unit rows."""

    def __init__(self, encoder: LaserEncoder, *, name: str, revision: str):
        """`name` and `revision` tell models apart in mteb's result cache; steps, limits and dimension do so as well."""
        self.model = encoder
        description, text = encoder.description(), encoder.card.text
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": name if "/" in name else f"laser_dist/{name}",
                "revision": revision,
                "n_parameters": description["parameters"],
                "embed_dim": encoder.dim,
                "max_tokens": max(text.max_query_tokens, text.max_passage_tokens),
                "framework": ["PyTorch"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": True,
                "experiment_kwargs": {
                    "steps": encoder.card.thinking.steps,
                    "convention": encoder.card.thinking.convention,
                    "max_query_tokens": text.max_query_tokens,
                    "max_passage_tokens": text.max_passage_tokens,
                    "dtype": description["dtype"],
                    "dim": encoder.dim,
                },
            }
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "LaserMteb":
        """The model of a folder or hub id; `options` are LaserEncoder.from_pretrained's."""
        local = model_folder(folder)
        revision = weights_hash(local) or "unknown"
        return cls(LaserEncoder.from_pretrained(local, **options), name=Path(folder).name, revision=revision)

    def instruction(self, task_metadata: Any) -> str | None:
        """What a task's queries are asked with; None is the model's own instruction."""
        if (ours := task_instructions().get(task_metadata.name)) is not None:
            return ours
        prompt = task_metadata.prompt
        return (prompt.get("query") if isinstance(prompt, dict) else prompt) or None

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """The rows of mteb's data loader -> float32 [n, D]; mteb's batch size is not heeded, rows are packed."""
        batches = list(inputs)
        progress = bool(kwargs.get("show_progress_bar", False))
        if prompt_type == PromptType.query:
            texts = [text for batch in batches for text in batch["text"]]
            return self.model.encode_queries(
                texts, instructions=[self.instruction(task_metadata)] * len(texts), progress=progress
            )
        # "text" has the title in front already; "body" has not. A passage with a title only has it as its text.
        texts = [text for batch in batches for text in batch.get("body", batch["text"])]
        titles = [title for batch in batches for title in batch.get("title", [""] * len(batch["text"]))]
        pairs = [(text, title) if text.strip() else (title, "") for text, title in zip(texts, titles, strict=True)]
        texts, titles = [text if text.strip() else _NO_TEXT for text, _ in pairs], [title for _, title in pairs]
        return self.model.encode_passages(texts, titles=titles if any(titles) else None, progress=progress)
