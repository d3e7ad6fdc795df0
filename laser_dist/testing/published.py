"""The published training step, written anew from the mathematics: what parity tests and the benchmark compare with.

Its results equal this package's; its costs are those of the published code (spec: "Known defects"):
1. Queries, passages and [query ; rationale ; EOS] are three left-padded batches, each run by itself.
2. The LM head runs over every position, and the states of every layer are kept.
3. Latent steps extend transformers' key-value cache. Activation checkpointing drops that cache, so with it each step
   runs the whole prefix again.
4. Every rank gathers everything and computes the loss of all Q rows (`all_rows_loss`).

Positions come from the attention mask, so that padding moves no token and both steps rotate keys alike.
"""

from dataclasses import dataclass
from typing import Any

import torch
from laser_kernels import alignment_loss_reference
from torch import Tensor, nn

from laser_dist.batch import PackedBatch, Views
from laser_dist.distributed.collectives import gather_rows, rank, world_size
from laser_dist.model.retriever import unit
from laser_dist.model.thinking import aligned_segments
from laser_dist.objective.alignment import AlignmentObjective, LossTerms
from laser_dist.objective.terms import TERMS


@dataclass
class _Padded:
    """Rows of one view, padded on the left to the longest; L counts positions, soft tokens included."""

    inputs_RLD: Tensor
    mask_RL: Tensor  # (R, L) int64 - 0 at pads

    @property
    def positions_RL(self) -> Tensor:
        return (self.mask_RL.cumsum(1) - 1).clamp(min=0)

    def extended(self, inputs_RD: Tensor) -> "_Padded":
        one_R1 = torch.ones_like(self.mask_RL[:, :1])
        return _Padded(torch.cat([self.inputs_RLD, inputs_RD[:, None]], 1), torch.cat([self.mask_RL, one_R1], 1))


class PublishedStep(nn.Module):
    """A causal LM, loaded with attn_implementation "sdpa", behind the published forward; for plain and for LoRA models.

    `checkpointing` says that the LM recomputes activations, and hence has no cache to extend.
    """

    def __init__(self, lm: nn.Module, *, steps: int = 3, convention: str = "official", checkpointing: bool = False):
        super().__init__()
        self.lm = lm
        self.steps = steps
        self.convention = convention
        self.checkpointing = checkpointing

    def external_parameters(self) -> list[nn.Parameter]:
        """What ZeRO-3 must have at hand here; the published code does not tell it, and cannot run under ZeRO-3."""
        return [self.lm.get_input_embeddings().weight]  # type: ignore[operator]

    def forward(self, batch: PackedBatch) -> Views:
        return self.views(batch)

    def views(self, batch: PackedBatch) -> Views:
        """Both views of the very examples that `batch` packs (at least one query and one passage); see `Views`."""
        tokens = batch.tokens_T.split(batch.lengths_R.tolist())
        prompts = [row[:n] for row, n in zip(tokens, batch.prompt_lengths_R.tolist(), strict=True)]
        b = batch.queries
        query_steps_BKD, query_entropy_BS = self._think(self._padded(prompts[:b]))
        passage_steps_PKD, passage_entropy_PS = self._think(self._padded(prompts[b:]))
        teacher_BD = segments_BKD = None
        if batch.has_rationale:
            teacher_BD, segments_BKD = self._read_rationale(batch, list(tokens[:b]))
        entropy_RS = torch.cat([query_entropy_BS, passage_entropy_PS])
        return Views(
            query_BD=unit(query_steps_BKD.mean(1)),
            passage_PD=unit(passage_steps_PKD.mean(1)),
            query_steps_BKD=query_steps_BKD,
            teacher_BD=teacher_BD,
            segments_BKD=segments_BKD,
            soft_token_entropy=entropy_RS.mean() if entropy_RS.numel() else entropy_RS.new_zeros(()),
        )

    def _padded(self, rows: list[Tensor]) -> _Padded:
        longest = max(map(len, rows))
        tokens_RL = torch.stack([nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
        mask_RL = torch.stack([nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
        return _Padded(self.lm.get_input_embeddings()(tokens_RL), mask_RL)  # type: ignore[operator]

    def _think(self, view: _Padded) -> tuple[Tensor, Tensor]:
        """Latent states (R, K, D) and the entropy of each soft token (R, soft tokens)."""
        embedding_VD = self.lm.get_input_embeddings().weight  # type: ignore[operator]
        state_RD, logits_RV, cache = self._run(view, None)
        thoughts = [state_RD] if self.convention == "official" else []
        entropies = [state_RD.new_zeros(len(state_RD), 0)]
        while len(thoughts) < self.steps:
            p_RV = torch.softmax(logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float(), -1)
            view = view.extended(p_RV.to(embedding_VD.dtype) @ embedding_VD)
            entropies.append(torch.special.entr(p_RV.detach()).sum(-1, keepdim=True))
            state_RD, logits_RV, cache = self._run(view, cache)
            thoughts.append(state_RD)
        return torch.stack(thoughts, 1), torch.cat(entropies, 1)

    def _run(self, view: _Padded, cache: Any) -> tuple[Tensor, Tensor, Any]:
        """Last position's state (R, D) and logits (R, V), and the cache (None where there can be none)."""
        new = 1 if cache is not None else view.mask_RL.shape[1]
        output = self._lm(
            inputs_embeds=view.inputs_RLD[:, -new:],
            attention_mask=view.mask_RL,
            position_ids=view.positions_RL[:, -new:],
            past_key_values=cache,
            use_cache=not self.checkpointing,
        )
        return output.hidden_states[-1][:, -1], output.logits[:, -1], output.past_key_values

    def _read_rationale(self, batch: PackedBatch, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Explicit vectors (B, D) and the segment state of each step (B, K, D)."""
        view = self._padded(rows)
        assert batch.segments_B is not None and batch.segment_ends_BM is not None
        output = self._lm(
            inputs_embeds=view.inputs_RLD, attention_mask=view.mask_RL, position_ids=view.positions_RL, use_cache=False
        )
        hidden_BLD = output.hidden_states[-1]
        lengths_B = batch.lengths_R[: batch.queries]
        # From an index into the packed tokens to one into the row, which begins after its pads.
        shift_B = hidden_BLD.shape[1] - lengths_B.cumsum(0)
        segment_BK = aligned_segments(batch.segments_B, self.steps, self.convention)
        end_BK = batch.segment_ends_BM.gather(1, segment_BK) + shift_B[:, None]
        row_B1 = torch.arange(len(rows), device=end_BK.device)[:, None]
        return unit(hidden_BLD[:, -1]), hidden_BLD[row_B1, end_BK]

    def _lm(self, **inputs: object) -> Any:
        return self.lm(output_hidden_states=True, **inputs)


def all_rows_loss(objective: AlignmentObjective, views: Views, batch: PackedBatch, step: int) -> LossTerms:
    """The four terms over all Q rows on every rank, times W, with gradient to this rank's own rows and passages only.

    Averaged over ranks, its gradient is the global batch's, as that of `AlignmentObjective` is; work and memory are
    W times as much. The published code never masks, so the objective must not either (ValueError).
    """
    if objective.config.mask_false_negatives:
        raise ValueError("the published objective masks no false negatives: set mask_false_negatives=False")
    assert batch.labels_B is not None
    first_row_Q = torch.arange(world_size()).repeat_interleave(batch.queries) * len(views.passage_PD)
    values = alignment_loss_reference(
        _gather_own_gradient(views.query_BD),
        _gather_own_gradient(views.teacher_BD),
        _gather_own_gradient(unit(views.query_steps_BKD)),
        _gather_own_gradient(None if views.segments_BKD is None else unit(views.segments_BKD)),
        _gather_own_gradient(views.passage_PD),
        gather_rows(batch.labels_B) + first_row_Q.to(batch.labels_B.device),
        temperature=objective.config.temperature,
        distill_temperature=objective.config.distill_temperature,
        trajectory_temperature=objective.trajectory_temperature,
    )
    terms = dict(zip(TERMS, values, strict=True))
    weighted = [weight * terms[name] for name, weight in objective.weights(step).items()]
    return LossTerms(terms, torch.stack(weighted).sum() * world_size(), diagnostics={})


def _gather_own_gradient(rows: Tensor | None) -> Any:
    """All ranks' rows, of which only this rank's carry a gradient."""
    if rows is None or world_size() == 1:
        return rows
    parts = list(gather_rows(rows).split(len(rows)))
    parts[rank()] = rows
    return torch.cat(parts)
