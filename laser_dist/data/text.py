"""Text to tokens, for training and serving alike: templates, truncation, segmentation, batches.

1. A prompt is head + content + tail: what the chat template puts before and after the content (an empty think block
   included), or nothing. The three are tokenised apart, so that truncation shortens the content and never the tail.
2. A rationale is tokenised by itself and appended to the query's ids. Its segments are split at blank lines in the
   text, and each ends with the token that holds the segment's last character, whatever the tokenizer merges there.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from laser_dist.batch import PackedBatch, TokenSequence, pack
from laser_dist.config import TextConfig
from laser_dist.data.bounded import bounded
from laser_dist.data.schema import Example, Passage, content_key
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
        return self._cut_prompt(self._prompts([self._query(text, instruction)])[0], self.config.max_query_tokens)

    def passage(self, passage: Passage) -> list[int]:
        """Prompt ids of a passage, at most max_passage_tokens; passages carry no instruction."""
        return self.cut_passage(self.whole_passages([passage])[0])

    def rationale(self, text: str, budget: int) -> tuple[list[int], list[int]]:
        """At most `budget` ids of a rationale, and the index of each segment's last token among them (at least one)."""
        return self._cut_rationale(*self._rationales([text])[0], budget)

    def whole_queries(self, examples: Sequence[Example], *, with_rationale: bool) -> list[TokenSequence]:
        """The rows of queries before truncation; without a rationale a row has no segment. One call tokenises all."""
        prompts = self._prompts([self._query(example.query, example.instruction) for example in examples])
        if not with_rationale:
            return [TokenSequence(prompt) for prompt in prompts]
        rationales = self._rationales([example.rationale for example in examples])
        return [TokenSequence(prompt, *rationale) for prompt, rationale in zip(prompts, rationales, strict=True)]

    def whole_passages(self, passages: Sequence[Passage]) -> list[list[int]]:
        """The prompts of passages before truncation. One call tokenises all."""
        fill = self.config.passage_template.format
        return self._prompts([fill(title=passage.title, text=passage.text).strip() for passage in passages])

    def cut_query(self, whole: TokenSequence) -> TokenSequence:
        """A query's row within max_query_tokens and, with its rationale and EOS, max_explicit_tokens."""
        prompt = self._cut_prompt(whole.prompt, self.config.max_query_tokens)
        if whole.rationale is None or whole.segment_ends is None:
            return TokenSequence(prompt)
        budget = self.config.max_explicit_tokens - len(prompt) - 1
        return TokenSequence(prompt, *self._cut_rationale(whole.rationale, whole.segment_ends, budget))

    def cut_passage(self, whole: list[int]) -> list[int]:
        """A passage's prompt within max_passage_tokens."""
        return self._cut_prompt(whole, self.config.max_passage_tokens)

    def training_query(self, example: Example, *, with_rationale: bool) -> TokenSequence:
        """The query's row: prompt alone, or followed by the rationale within max_explicit_tokens."""
        return self._training_queries([example], with_rationale)[0]

    def batch(
        self, examples: Sequence[Example], passages: Sequence[Sequence[Passage]], *, with_rationale: bool
    ) -> PackedBatch:
        """B examples and their G passages each (the first is the positive) as one packed batch."""
        rows = self._training_queries(examples, with_rationale)
        flat = [passage for group in passages for passage in group]
        rows += [TokenSequence(self.cut_passage(prompt)) for prompt in self.whole_passages(flat)]
        keys = [[content_key(p) for p in example.positives] for example in examples]
        most = max(map(len, keys))
        group_size = len(passages[0])
        return pack(
            rows,
            self.eos if with_rationale else None,
            queries=len(examples),
            labels_B=torch.arange(len(examples)) * group_size,
            positive_keys_BX=torch.tensor([row + row[:1] * (most - len(row)) for row in keys]),
            passage_keys_P=torch.tensor([content_key(p) for p in flat]),
            query_ids=tuple(example.query_id for example in examples),
        )

    def _training_queries(self, examples: Sequence[Example], with_rationale: bool) -> list[TokenSequence]:
        rows = [self.cut_query(whole) for whole in self.whole_queries(examples, with_rationale=with_rationale)]
        for example, row in zip(examples, rows, strict=True):
            if with_rationale and not row.segment_ends:
                raise UserError(f"query {example.query_id!r} has no rationale, which the explicit view needs")
        return rows

    def _query(self, text: str, instruction: str | None) -> str:
        return self.config.query_template.format(instruction=instruction or self.config.instruction, query=text)

    def _prompts(self, contents: list[str]) -> list[list[int]]:
        prompts = [self.head + ids + self.tail for ids in self._encode(contents)["input_ids"]]
        if not all(prompts):
            raise UserError("an empty text makes no tokens; give it a template with text of its own, or drop it")
        return prompts

    def _rationales(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """For each text its ids and the index of each segment's last token among them."""
        texts = [text.strip() for text in texts]
        encoded = self._encode(texts, return_offsets_mapping=True)
        rows = []
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ends = [bisect_right(offsets, last, key=itemgetter(0)) - 1 for last in segment_last_characters(text)]
            # A token that reaches into the next segment may end two: count it once.
            rows.append((ids, list(dict.fromkeys(end for end in ends if end >= 0))))
        return rows

    def _cut_prompt(self, prompt: list[int], longest: int) -> list[int]:
        self.counts.rows += 1
        self.counts.prompts_cut += len(prompt) > longest
        return prompt if len(prompt) <= longest else prompt[: longest - len(self.tail)] + self.tail

    def _cut_rationale(self, ids: list[int], ends: list[int], budget: int) -> tuple[list[int], list[int]]:
        self.counts.rationales += 1
        self.counts.rationales_cut += len(ids) > budget
        # Segments that end behind the cut are one, which ends at the cut.
        ends = list(dict.fromkeys(min(end, budget - 1) for end in ends if budget > 0))
        self.counts.fewer_segments_than_steps += len(ends) < self.steps
        return ids[:budget], ends

    def _frame(self) -> tuple[list[int], list[int]]:
        """Token ids before and after the content."""
        if self.config.chat_template == "never" or not self.tokenizer.chat_template:
            bos = self.tokenizer.bos_token_id
            adds_bos = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
            return ([bos] if adds_bos else []), []
        rendered = bounded(
            lambda: str(
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": _MARK}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,
                )
            )
        )
        if rendered is None:
            raise UserError(
                "the chat template fails, or takes more time or memory than a template does; "
                "use --text.chat-template never"
            )
        if rendered.count(_MARK) != 1:
            raise UserError("the chat template does not hold the content exactly once; use --text.chat-template never")
        head, tail = rendered.split(_MARK)
        return tuple(self._encode([head, tail])["input_ids"])

    def _encode(self, texts: list[str], **options: bool) -> BatchEncoding:
        # verbose=False: no warning about texts longer than the model's limit, which are cut here and counted.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


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
