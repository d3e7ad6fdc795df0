"""Text to tokens, for training and serving alike: templates, truncation, segmentation, batches.

1. A prompt is head + content + tail: what the chat template puts before and after the content (an empty think block
   included), or nothing. The three are tokenised apart, so that truncation shortens the content and never the tail.
2. A rationale is tokenised by itself and appended to the query's ids. Its segments are split at blank lines in the
   text, and each ends with the token that holds the segment's last character, whatever the tokenizer merges there.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from laser_dist.batch import Example, PackedBatch, Passage, TokenSequence, pack
from laser_dist.config import TextConfig
from laser_dist.data.schema import passage_key
from laser_dist.errors import UserError

BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
_MARK = "\u241fcontent\u241f"


@dataclass
class TextCounts:
    """What truncation did since the start; logged, so that nothing is cut in silence."""

    rows: int = 0
    prompts_cut: int = 0
    rationales: int = 0
    rationales_cut: int = 0
    fewer_segments_than_steps: int = 0


class TextFormat:
    """The one object that turns queries, passages and rationales into tokens (saved with every checkpoint)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TextConfig, *, steps: int = 1):
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.name_or_path}: a fast tokenizer is needed: segments are found by offsets")
        self.tokenizer = tokenizer
        self.config = config
        self.steps = steps
        self.head, self.tail = self._frame()
        self.counts = TextCounts()
        frame = len(self.head) + len(self.tail)
        for name in ("max_query_tokens", "max_passage_tokens"):
            if frame >= getattr(config, name):
                raise UserError(f"text.{name} = {getattr(config, name)}: the chat template alone takes {frame} tokens")

    @property
    def eos(self) -> int:
        """End token of the explicit view. Raises UserError if the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no EOS token, which the explicit view ends with; "
                "set eos_token in its tokenizer_config.json"
            )
        return self.tokenizer.eos_token_id

    def require_eos(self) -> None:
        """UserError unless the tokenizer has an EOS token."""
        _ = self.eos

    def query(self, text: str, instruction: str | None = None) -> list[int]:
        """Prompt ids of a query, at most max_query_tokens."""
        content = self.config.query_template.format(instruction=instruction or self.config.instruction, query=text)
        return self._prompt(content, self.config.max_query_tokens)

    def passage(self, passage: Passage) -> list[int]:
        """Prompt ids of a passage, at most max_passage_tokens; passages carry no instruction."""
        content = self.config.passage_template.format(title=passage.title, text=passage.text).strip()
        return self._prompt(content, self.config.max_passage_tokens)

    def rationale(self, text: str, budget: int) -> tuple[list[int], list[int]]:
        """At most `budget` ids of a rationale, and the index of each segment's last token among them (at least one)."""
        encoded = self.tokenizer(text.strip(), add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        self.counts.rationales += 1
        self.counts.rationales_cut += len(ids) > budget
        ids, offsets = ids[:budget], offsets[:budget]
        ends = []
        for last_character in segment_last_characters(text.strip()):
            covering = [i for i, (start, _) in enumerate(offsets) if start <= last_character]
            # A token that reaches into the next segment may end two: count it once.
            if covering and covering[-1] not in ends:
                ends.append(covering[-1])
        self.counts.fewer_segments_than_steps += len(ends) < self.steps
        return ids, ends

    def training_query(self, example: Example, *, with_rationale: bool) -> TokenSequence:
        """The query's row: prompt alone, or followed by the rationale within max_explicit_tokens."""
        prompt = self.query(example.query, example.instruction)
        if not with_rationale:
            return TokenSequence(prompt)
        rationale, ends = self.rationale(example.rationale, self.config.max_explicit_tokens - len(prompt) - 1)
        if not ends:
            raise UserError(f"query {example.query_id!r} has no rationale, which the explicit view needs")
        return TokenSequence(prompt, rationale, ends)

    def batch(
        self, examples: Sequence[Example], passages: Sequence[Sequence[Passage]], *, with_rationale: bool
    ) -> PackedBatch:
        """B examples and their G passages each (the first is the positive) as one packed batch."""
        rows = [self.training_query(example, with_rationale=with_rationale) for example in examples]
        rows += [self.passage(passage) for group in passages for passage in group]  # type: ignore[misc]
        rows = [row if isinstance(row, TokenSequence) else TokenSequence(row) for row in rows]
        keys = [[passage_key(p.id) for p in example.positives] for example in examples]
        most = max(map(len, keys))
        group_size = len(passages[0])
        return pack(
            rows,
            self.eos if with_rationale else None,
            queries=len(examples),
            labels_B=torch.arange(len(examples)) * group_size,
            positive_keys_BX=torch.tensor([row + row[:1] * (most - len(row)) for row in keys]),
            passage_keys_P=torch.tensor([passage_key(p.id) for group in passages for p in group]),
            query_ids=tuple(example.query_id for example in examples),
        )

    def _prompt(self, content: str, longest: int) -> list[int]:
        ids = self._ids(content)
        room = longest - len(self.head) - len(self.tail)
        self.counts.rows += 1
        self.counts.prompts_cut += len(ids) > room
        prompt = self.head + ids[:room] + self.tail
        if not prompt:
            raise UserError("an empty text makes no tokens; give it a template with text of its own, or drop it")
        return prompt

    def _frame(self) -> tuple[list[int], list[int]]:
        """Token ids before and after the content."""
        if self.config.chat_template == "never" or not self.tokenizer.chat_template:
            bos = self.tokenizer.bos_token_id
            adds_bos = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
            return ([bos] if adds_bos else []), []
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        if rendered.count(_MARK) != 1:
            raise UserError("the chat template does not hold the content exactly once; use --text.chat-template never")
        head, tail = rendered.split(_MARK)
        return self._ids(head), self._ids(tail)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def segment_last_characters(text: str) -> list[int]:
    """Index of the last character of each segment; segments are separated by blank lines."""
    lasts, start = [], 0
    for gap in [*BLANK_LINE.finditer(text), None]:
        end = gap.start() if gap else len(text)
        segment = text[start:end].rstrip()
        if segment:
            lasts.append(start + len(segment) - 1)
        start = gap.end() if gap else end
    return lasts
