"""Rationales that the backbone writes at test time: greedy, kept on disk line by line, continued where they stopped."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from laser_dist.config import ModelConfig
from laser_dist.data.annotation.prompts import RATIONALE, render_prompt
from laser_dist.data.schema import Example
from laser_dist.model.backbone import load_backbone, load_tokenizer
from laser_dist.retrieval.loading import find_device
from laser_dist.study.cells import digest, model_identity

_TIMED = 3


@dataclass(frozen=True)
class Rationales:
    """What was written for each query, and what writing costs."""

    by_query: dict[str, str]
    seconds: float
    """Median to write one rationale for one query alone."""


class Rewriter:
    """A causal LM that reasons about queries in plain text; it loads when something is missing."""

    def __init__(self, model: str, folder: Path, *, tokens: int, batch: int, device: str | None = None):
        """`folder` keeps a file per model, prompt and length; `batch` queries are written for at once."""
        self.model, self.tokens, self.batch, self.device = model, tokens, batch, find_device(device)
        made_of = {"model": model_identity(model), "tokens": tokens, "prompt": RATIONALE}
        self.file = folder / f"{digest(made_of)[:16]}.jsonl"
        self._lm: Any = None

    def __call__(self, queries: Sequence[str]) -> Rationales:
        """A rationale for each query; one that the model left empty is the query once more."""
        known, seconds = self._known()
        missing = [query for query in dict.fromkeys(queries) if query not in known]
        if missing or (queries and len(seconds) < _TIMED):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                if stream.tell() and not self.file.read_bytes().endswith(b"\n"):
                    stream.write("\n")  # a process was killed in the middle of a line
                for query, text in self._written(missing):
                    known[query] = text
                    _append(stream, {"query": query, "rationale": text})
                for query in queries[: max(0, _TIMED - len(seconds))]:
                    began = time.perf_counter()
                    self._generate([query])
                    seconds.append(time.perf_counter() - began)
                    _append(stream, {"seconds": seconds[-1]})
        return Rationales({query: known[query].strip() or query for query in queries}, median(seconds or [0.0]))

    def _known(self) -> tuple[dict[str, str], list[float]]:
        known: dict[str, str] = {}
        seconds: list[float] = []
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # cut off when the process was killed
                continue
            if "query" in row:
                known[row["query"]] = row["rationale"]
            else:
                seconds.append(row["seconds"])
        return known, seconds

    def _written(self, queries: list[str]) -> Iterator[tuple[str, str]]:
        from rich.console import Console
        from rich.progress import track

        # By length, so that little is padded; the longest first, because they decide the memory.
        ordered = sorted(queries, key=lambda query: (-len(query), query))
        parts = [ordered[i : i + self.batch] for i in range(0, len(ordered), self.batch)]
        for part in track(parts, description="writing rationales", console=Console(stderr=True)):
            yield from zip(part, self._generate(part), strict=True)

    @torch.no_grad()
    def _generate(self, queries: Sequence[str]) -> list[str]:
        from transformers import GenerationConfig

        if self._lm is None:
            config = ModelConfig(name=self.model, dtype="bfloat16" if self.device.type == "cuda" else "float32")
            self._lm, self._tokenizer = load_backbone(config).eval().to(self.device), load_tokenizer(config)
            self._lm.set_attn_implementation("sdpa")  # what generates pads; ours packs
            self._tokenizer.padding_side = "left"
            if self._tokenizer.pad_token_id is None:
                self._tokenizer.pad_token_id = self._tokenizer.eos_token_id
        prompts = [self._prompt(query) for query in queries]
        batch = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(self.device)
        tokenizer = self._tokenizer
        greedy = GenerationConfig(
            max_new_tokens=self.tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        found = self._lm.generate(batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=greedy)
        written = found[:, batch["input_ids"].shape[1] :]
        return tokenizer.batch_decode(written, skip_special_tokens=True)

    def _prompt(self, query: str) -> str:
        text = render_prompt(RATIONALE, Example("", query, "", ()))
        if not self._tokenizer.chat_template:
            return f"{text}\n\n"
        turns = [{"role": "user", "content": text}]
        return str(
            self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        )


def _append(stream: Any, row: dict[str, Any]) -> None:
    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    stream.flush()
    os.fsync(stream.fileno())
