"""One query through `LaserRetriever.think`, with what it computes on the way: distributions, states, segments.

Nothing is computed again: a hook on the retriever's `SoftToken` sees the logits that its soft tokens are made of.
With a rationale the row is the training row [query ; rationale ; EOS], whose prefix is the latent view's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laser_dist.batch import TokenSequence, pack
from laser_dist.data.inspection.show import safe
from laser_dist.data.schema import Example
from laser_dist.errors import UserError
from laser_dist.model.retriever import LaserRetriever, unit
from laser_dist.model.thinking import aligned_segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from laser_dist.retrieval.encoder import LaserEncoder


@dataclass(frozen=True)
class Segments:
    """A written rationale as the model reads it; states have unit length."""

    texts: list[str]  # M, as their tokens say
    states_MD: Tensor
    explicit_D: Tensor  # the explicit view's vector: the state at EOS
    aligned_K: list[int]  # the segment, from 0, that training aligns each latent state with
    is_cut: bool  # max_explicit_tokens cut some of it off


@dataclass(frozen=True)
class Thoughts:
    """What one query makes the retriever think; all on the CPU."""

    query: str
    convention: str
    prompt_tokens: int
    prompt_is_cut: bool
    token_text: Callable[[int], str]  # of a token's id
    probabilities_SV: Tensor  # float32; the soft tokens' distributions: S = K - 1 (official) or K (paper)
    states_KD: Tensor  # unit length
    vector_D: Tensor  # the encoder's vector: the unit mean of the states before they were brought to unit length
    segments: Segments | None

    @property
    def entropies_S(self) -> Tensor:
        """Entropy of each soft token, nats."""
        return torch.special.entr(self.probabilities_SV).sum(-1)

    def state_after(self, soft_token: int) -> int:
        """The latent state, from 1, that soft token `soft_token`, from 1, leads to."""
        return soft_token + (self.convention == "official")


@torch.no_grad()
def think(encoder: "LaserEncoder", query: str, rationale: str = "", *, instruction: str | None = None) -> Thoughts:
    """The thoughts of one query; with a rationale also its segments. UserError where there is no room for a segment."""
    text, retriever = encoder.text, encoder.retriever
    example = Example("", query, rationale, (), (), instruction)
    (whole,) = text.whole_queries([example], with_rationale=bool(rationale))
    row = text.cut_query(whole)
    if rationale and not row.segment_ends:
        raise UserError(
            f"rationale of {query!r}: the query takes {len(row.prompt)} tokens, and text.max_explicit_tokens = "
            f"{text.config.max_explicit_tokens} leaves none for a rationale: raise it in laser_dist.json"
        )
    batch = pack([row], text.eos if rationale else None, queries=1).to(encoder.device)
    with _heard(retriever) as logits:
        hidden_TD, thoughts_RKD, _ = retriever.think(batch)
    log_p = [torch.log_softmax(_precise(logits_RV), -1) for logits_RV in logits]
    return Thoughts(
        query=query,
        convention=retriever.convention,
        prompt_tokens=len(row.prompt),
        prompt_is_cut=len(row.prompt) < len(whole.prompt),
        token_text=partial(_token_text, text.tokenizer),
        probabilities_SV=torch.cat(log_p).exp().cpu() if log_p else torch.zeros(0, len(text.tokenizer)),
        states_KD=unit(thoughts_RKD[0]).cpu(),
        vector_D=unit(thoughts_RKD.mean(1))[0].cpu(),
        segments=_segments(encoder, whole, row, hidden_TD) if rationale else None,
    )


@contextmanager
def _heard(retriever: LaserRetriever) -> Iterator[list[Tensor]]:
    """The logits (R, V) of each soft token, in order, that `retriever` makes within the block."""
    logits: list[Tensor] = []
    hook = retriever.soft_token.register_forward_pre_hook(lambda _, arguments: logits.append(arguments[0]))
    try:
        yield logits
    finally:
        hook.remove()


def _segments(encoder: "LaserEncoder", whole: TokenSequence, row: TokenSequence, hidden_TD: Tensor) -> Segments:
    assert row.rationale is not None and row.segment_ends and whole.rationale is not None
    starts = [0, *(end + 1 for end in row.segment_ends)]
    parts = [row.rationale[start : end + 1] for start, end in zip(starts, row.segment_ends, strict=False)]
    ends_M = torch.tensor(row.segment_ends, device=hidden_TD.device) + len(row.prompt)
    retriever = encoder.retriever
    aligned_1K = aligned_segments(torch.tensor([len(parts)]), retriever.steps, retriever.convention)
    return Segments(
        texts=[encoder.text.tokenizer.decode(part).strip() for part in parts],
        states_MD=unit(hidden_TD[ends_M]).cpu(),
        explicit_D=unit(hidden_TD[-1]).cpu(),
        aligned_K=aligned_1K[0].tolist(),
        is_cut=len(row.rationale) < len(whole.rationale),
    )


def _token_text(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """A token as it can be printed: blanks and line breaks visible, part of a character by its name."""
    if token >= len(tokenizer):
        return f"[{token}]"  # a row that pads the table
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:
        text = str(tokenizer.convert_ids_to_tokens(token))
    signs = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}
    return safe("".join(signs.get(c, f"\\u{ord(c):04x}" if c.isspace() else c) for c in text))


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
