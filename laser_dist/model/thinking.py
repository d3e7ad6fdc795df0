"""Latent thinking: soft tokens, and which rationale segment each latent step is aligned with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_dist.errors import UserError


class SoftToken(nn.Module):
    """t = softmax(logits) E: the embedding a model would feed itself, averaged over the vocabulary.

    A module, and not a matrix product in passing, because ZeRO-3 only has a weight at hand inside a module that owns
    it or names it in `external_parameters`.
    """

    def __init__(self, embedding: nn.Module):
        super().__init__()
        scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
        if float(scale) != 1.0:
            raise UserError(
                f"{type(embedding).__name__} scales its rows by {float(scale):.4g}, which soft tokens do not support: "
                "use a model with plain embeddings (Qwen3, Llama, Mistral, ...)"
            )
        # A reference, not a child: the embedding stays where the backbone has it.
        object.__setattr__(self, "embedding", embedding)

    def external_parameters(self) -> list[nn.Parameter]:
        return [self.embedding.weight]  # type: ignore[list-item]

    def forward(self, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, V) -> soft tokens (R, D) and their mean entropy (nats, detached)."""
        precise = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
        log_p_RV = torch.log_softmax(logits_RV.to(precise), -1)
        p_RV = log_p_RV.exp()
        entropy = -(p_RV.detach() * log_p_RV.detach()).sum(-1).mean()
        weight_VD, rows = self.embedding.weight, len(p_RV)
        # Fewer rows than 4 would go another way through a CPU's BLAS, which sums the vocabulary ten times less exactly:
        # a text alone would then be 1e-4 off its vector in a batch.
        p_RV = F.pad(p_RV, (0, 0, 0, max(0, 4 - rows))).to(weight_VD.dtype)
        return (p_RV @ weight_VD)[:rows], entropy


def aligned_segments(segments_B: Tensor, steps: int, convention: str) -> Tensor:
    """(B,) segment counts M -> (B, K) index from 0 of the segment that each step is aligned with (spec: conventions).

    official: linspace(0, M-1, K) rounded down, or each segment once and then the last again where M < K.
    paper: floor(i M / K), i = 1..K, counted from 1; where M < K the first steps share the first segment.
    """
    if convention == "paper":
        step_K = torch.arange(1, steps + 1, device=segments_B.device)
        return (step_K * segments_B[:, None] // steps - 1).clamp(min=0)
    rows = [_spread(segments, steps) for segments in segments_B.tolist()]
    return torch.stack(rows).to(segments_B.device)


def _spread(segments: int, steps: int) -> Tensor:
    if segments < steps:
        return torch.arange(steps).clamp(max=segments - 1)
    # Not `i (M - 1) // (K - 1)`: the published code rounds linspace's float32 down; 1 less at M 17, K 15.
    return torch.linspace(0, segments - 1, steps, dtype=torch.float32).long()
