"""Exact search: every query against every passage, block by block, in bounded memory."""

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

_INDEX_BITS = 32
_LAST_INDEX = (1 << _INDEX_BITS) - 1
_SCORES_AT_ONCE = 1 << 24


def search(
    query_vectors: np.ndarray,
    passage_vectors: np.ndarray,
    k: int,
    block: int = 65536,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best passages of each query by inner product: (scores float32, indices int64), both [n, min(k, P)].

    query_vectors [n, D] and passage_vectors [P, D] are float arrays; the latter may be a memory map, of which `block`
    rows are in memory at a time. Products are float32. Equal scores rank by index, the lower first, also at the cut
    and across blocks. Raises ValueError for shapes that do not fit, and for scores that are not finite.
    """
    if query_vectors.ndim != 2 or passage_vectors.ndim != 2 or query_vectors.shape[1] != passage_vectors.shape[1]:
        raise ValueError(f"vectors [n, D] and [P, D] expected, got {query_vectors.shape} and {passage_vectors.shape}")
    if k < 1 or block < 1 or len(passage_vectors) > _LAST_INDEX:
        raise ValueError(f"k = {k} and block = {block} must be positive, and passages fewer than 2^{_INDEX_BITS}")
    queries_ND = _float32(query_vectors, device)
    best_NK = torch.empty(len(queries_ND), 0, dtype=torch.int64, device=device)
    rows = max(1, _SCORES_AT_ONCE // min(block, max(1, len(passage_vectors))))
    blocks = range(0, len(passage_vectors), block)
    shown = track(blocks, "searching", console=Console(stderr=True), disable=not progress, transient=True)
    for first in shown:
        passages_PD = _float32(passage_vectors[first : first + block], device)
        merged = [
            _best(torch.cat([best, _keys(queries @ passages_PD.T, first)], dim=1), k)
            for queries, best in zip(queries_ND.split(rows), best_NK.split(rows), strict=True)
        ]
        best_NK = torch.cat(merged)
    scores, indices = _unpack(best_NK)
    return scores.cpu().numpy(), indices.cpu().numpy()


def top_k(scores_NP: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row: (scores, indices), both [N, min(k, P)]; equal scores rank by index, lower first.

    Raises ValueError for scores that are not finite.
    """
    return _unpack(_best(_keys(scores_NP, 0), k))


def _float32(vectors: np.ndarray, device: torch.device | str) -> Tensor:
    # A copy, as torch takes no read-only memory map.
    return torch.from_numpy(np.array(vectors, dtype=np.float32)).to(device)


def _keys(scores_NP: Tensor, first_index: int) -> Tensor:
    """Scores and indices as one int64 each, ordered by score and then by descending index.

    torch.topk leaves open which of several equal values it takes; keys are all different, so nothing is left open.
    """
    if not torch.isfinite(scores_NP).all():
        raise ValueError("scores are not finite: the vectors of queries or passages hold NaN or infinity")
    scores_NP = scores_NP.float() + 0.0  # turns -0.0 into 0.0, which equals it but has other bits
    indices_P = torch.arange(first_index, first_index + scores_NP.shape[1], device=scores_NP.device)
    ordered_NP = _order_bits(scores_NP.view(torch.int32)).long()
    return ordered_NP.bitwise_left_shift_(_INDEX_BITS).bitwise_or_(_LAST_INDEX - indices_P)


def _order_bits(bits: Tensor) -> Tensor:
    """A float32's bits as an int32 of the same order, and back: negative floats grow with falling magnitude."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _best(keys_NP: Tensor, k: int) -> Tensor:
    return keys_NP.topk(min(k, keys_NP.shape[1]), dim=1).values


def _unpack(keys_NK: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys_NK >> _INDEX_BITS).int()
    return _order_bits(ordered).view(torch.float32), _LAST_INDEX - (keys_NK & _LAST_INDEX)
