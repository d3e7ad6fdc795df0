"""LaserModule: an exported folder inside sentence-transformers, with LaserEncoder's vectors.

modules.json of an export names this class. sentence-transformers from version 6 on imports a class outside its own
package only with `SentenceTransformer(DIR, trust_remote_code=True)`, also where it comes from an installed package.
`load_sentence_transformer(DIR)` does without, because whoever calls it has imported this code already.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from laser_dist.batch import PackedBatch
from laser_dist.data.schema import Passage
from laser_dist.data.text import TextFormat
from laser_dist.retrieval.encoder import LaserEncoder
from laser_dist.retrieval.exporting.formats import query_prompt, save_folder, split_template


class LaserModule(InputModule):
    """The only module of the pipeline: texts to unit vectors."""

    def __init__(self, encoder: LaserEncoder):
        super().__init__()
        self.retriever = encoder.retriever
        self.card = encoder.card
        self.text = encoder.text
        self.tokenizer = encoder.text.tokenizer

    def preprocess(  # type: ignore[override]  # texts only
        self, inputs: Sequence[str], prompt: str | None = None, task: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Texts -> input_ids and attention_mask, padded on the right.

        sentence-transformers puts a prompt before the text. That alone cannot make our queries, whose template may
        have something behind the text too, and whose length limit leaves the chat template whole. So the prompt that
        an export saves for queries is read as a sign, "this is a query", and the text itself goes through TextFormat,
        as in LaserEncoder. `encode_query` gives the same sign by its task. Without prompt and task it is a passage.
        """
        text, is_query = self._format(prompt, task)
        rows = [text.query(x) if is_query else text.passage(Passage(id="", text=x)) for x in inputs]
        return {
            "input_ids": pad_sequence([torch.tensor(row) for row in rows], batch_first=True),
            "attention_mask": pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True),
        }

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        mask = features["attention_mask"].bool()
        lengths_R = mask.sum(1)
        batch = PackedBatch(
            tokens_T=features["input_ids"][mask],
            positions_T=(mask.cumsum(1) - 1)[mask],
            lengths_R=lengths_R,
            prompt_lengths_R=lengths_R,
            queries=0,
        )
        features["sentence_embedding"] = self.retriever(batch).passage_PD
        return features

    def get_embedding_dimension(self) -> int:
        return int(self.retriever.base.config.hidden_size)

    def get_config_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.card.thinking)

    @property
    def max_seq_length(self) -> int:
        return max(self.text.config.max_query_tokens, self.text.config.max_passage_tokens)

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        limits = dataclasses.replace(self.text.config, max_query_tokens=value, max_passage_tokens=value)
        self.text = TextFormat(self.tokenizer, limits)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        card = dataclasses.replace(self.card, text=self.text.config)
        save_folder(self.retriever.lm, self.tokenizer, card, Path(output_path))

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> "LaserModule":
        """The module of a folder or hub id; heeds `config_kwargs={"steps": 6}` and `model_kwargs={"dtype": ...}`."""
        folder = cls.load_dir_path(model_name_or_path, subfolder, token, cache_folder, revision, local_files_only)
        dtype = (model_kwargs or {}).get("dtype") or (model_kwargs or {}).get("torch_dtype")
        return cls(
            LaserEncoder.from_pretrained(
                folder,
                steps=(config_kwargs or {}).get("steps"),
                dtype=None if dtype in (None, "auto") else str(dtype).removeprefix("torch."),
            )
        )

    def _format(self, prompt: str | None, task: str | None) -> tuple[TextFormat, bool]:
        config = self.text.config
        is_query = task == "query" or (task != "document" and bool(prompt))
        if prompt is None or prompt == (query_prompt(config) if is_query else ""):
            return self.text, is_query
        # A prompt of the caller's own: for a query it stands in for what the template puts before the text.
        if is_query:
            _, after = split_template(config.query_template, "query", instruction="")
            config = dataclasses.replace(config, query_template=_escaped(prompt) + "{query}" + _escaped(after))
        else:
            before, after = split_template(config.passage_template, "text", title="")
            template = _escaped(prompt + before.lstrip()) + "{text}" + _escaped(after)
            config = dataclasses.replace(config, passage_template=template)
        return TextFormat(self.tokenizer, config), is_query


def load_sentence_transformer(folder: str | Path, *, steps: int | None = None, **kwargs: Any) -> SentenceTransformer:
    """`SentenceTransformer(folder)` without trust_remote_code; `kwargs` are SentenceTransformer's, e.g. device."""
    module = LaserModule.load(str(folder), config_kwargs={"steps": steps})
    prompts = {"query": query_prompt(module.card.text), "document": ""}
    return SentenceTransformer(modules=[module], prompts=prompts, similarity_fn_name="cosine", **kwargs)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
