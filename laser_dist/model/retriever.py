"""LaserRetriever: one packed batch in, both views out, in K parameter sweeps.

1. One prefix sweep over all rows, [query ; rationale ; EOS] and [passage], packed. Attention is causal, so the query's
   states and K/V inside its row are the latent view's prefix, untouched by the rationale behind them.
2. K - 1 one-token sweeps (K under the paper's convention) for all rows together, each over its own prompt's K/V.
3. Vectors: the latent view's is the mean of its K states; the explicit view's is the state at EOS.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_dist.batch import PackedBatch, Views
from laser_dist.errors import UserError
from laser_dist.model.latent_kv import LatentKV
from laser_dist.model.padded import PaddedKV
from laser_dist.model.thinking import SoftToken, aligned_segments
from laser_dist.model.varlen import PackedKV, choose_attention, head_size, varlen_function
from laser_dist.observability.spans import span


class LaserRetriever(nn.Module):
    """A causal LM, plain or with LoRA, as a retriever that thinks K latent steps; ZeRO's root forward."""

    def __init__(
        self,
        lm: nn.Module,
        *,
        steps: int = 3,
        convention: str = "official",
        attention: str = "auto",
        passage_steps: bool = False,
    ):
        """`attention`: auto, flash, varlen or sdpa; see `choose_attention`. `passage_steps`: keep passages' states."""
        super().__init__()
        self.passage_steps = passage_steps
        self.attention = attention
        self.lm = lm
        self.steps = steps
        self.convention = convention
        base = lm.get_base_model() if hasattr(lm, "peft_config") else lm
        object.__setattr__(self, "base", base)  # inside lm already
        object.__setattr__(self, "decoder", base.get_decoder())
        self.soft_token = SoftToken(base.get_input_embeddings())

    def forward(self, batch: PackedBatch) -> Views:
        """Both views of B queries and the vectors of P passages; see `Views` for the shapes."""
        hidden_TD, thoughts_RKD, entropy = self.think(batch)
        means_RD = thoughts_RKD.mean(1)
        vectors_RD = unit(means_RD)
        row_norms_R = _norms(means_RD)
        b = batch.queries
        teacher_BD = segments_BKD = None
        if batch.has_rationale:
            eos_B = batch.lengths_R.cumsum(0)[:b] - 1
            eos_BD = hidden_TD[eos_B]
            teacher_BD = unit(eos_BD)
            shortest_B = torch.minimum(_norms(eos_BD), _norms(thoughts_RKD[:b]).amin(1))
            row_norms_R = torch.cat([row_norms_R[:b].minimum(shortest_B), row_norms_R[b:]])
            segment_BK = aligned_segments(batch.segments_B, self.steps, self.convention)
            segments_BKD = hidden_TD[batch.segment_ends_BM.gather(1, segment_BK)]
        return Views(
            query_BD=vectors_RD[:b],
            passage_PD=vectors_RD[b:],
            query_steps_BKD=thoughts_RKD[:b],
            teacher_BD=teacher_BD,
            segments_BKD=segments_BKD,
            soft_token_entropy=entropy,
            row_norms_R=row_norms_R,
            passage_steps_PKD=thoughts_RKD[b:] if self.passage_steps else None,
        )

    def think(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix states (T, D), latent states (R, K, D), mean soft-token entropy (nats)."""
        store = self._store(batch)
        embed = self.base.get_input_embeddings()
        hidden_TD = self._sweep(embed(batch.tokens_T), batch.positions_T, store, 0)
        prompt_end_R = batch.lengths_R.cumsum(0) - batch.lengths_R + batch.prompt_lengths_R - 1
        state_RD = hidden_TD[prompt_end_R]
        # The two conventions differ in whether the last prompt token's state is the first latent state.
        thoughts = [state_RD] if self.convention == "official" else []
        entropies = []
        for step in range(1, self.steps + 1 - len(thoughts)):
            with span("soft token"):
                soft_RD, entropy = self.soft_token(self.base.get_output_embeddings()(state_RD))
            state_RD = self._sweep(soft_RD, batch.positions_T[prompt_end_R] + step, store, step)
            thoughts.append(state_RD)
            entropies.append(entropy)
        entropy = torch.stack(entropies).mean() if entropies else hidden_TD.new_zeros(())
        return hidden_TD, torch.stack(thoughts, 1), entropy

    def attention_on(self, device: torch.device) -> tuple[str, str]:
        """(name, why) of the attention that runs there. UserError if what was asked for cannot."""
        dtype = self.base.get_input_embeddings().weight.dtype
        return choose_attention(self.attention, device, dtype, head_size(self.base.config))

    def _store(self, batch: PackedBatch) -> LatentKV:
        name, _ = self.attention_on(batch.tokens_T.device)
        return PaddedKV(batch) if name == "sdpa" else PackedKV(batch, varlen_function(name))

    def _sweep(self, inputs_XD: Tensor, positions_X: Tensor, store: LatentKV, step: int) -> Tensor:
        """One pass through all layers; X is T for the prefix and R for a step."""
        with span(f"latent step {step}" if step else "prefix sweep"):
            output = self.decoder(
                inputs_embeds=inputs_XD[None], position_ids=positions_X[None], latent=(store, step), use_cache=False
            )
        if store.layers != self.base.config.num_hidden_layers:
            raise UserError(
                f"{type(self.base).__name__}: {store.layers} of {self.base.config.num_hidden_layers} layers go "
                "through transformers' attention registry, which latent thinking needs of all: use a decoder that "
                "honours attn_implementation (Qwen3, Llama, Mistral, ...)"
            )
        return output.last_hidden_state[0]


def _norms(x: Tensor) -> Tensor:
    """Lengths of rows, without gradient, in float32 (float64 stays)."""
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=precise)


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 (float64 stays): bf16 cosines at temperature 0.02 cost 6-47 % of the gradient."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
