"""What the objective sees of errors that its terms hide: labels, masks and gathered rows that are not what they say.

All of it are scalars on the device, computed beside the terms and read together with them (guard/evidence.py).
"""

import torch
from torch import Tensor

from laser_dist.batch import PackedBatch

COLUMNS = 8
"""Values of each passage that a checksum reads: enough to tell passages apart, and next to nothing of N x D."""
MODULUS = 2**40
"""Checksums stay below it, so that a float64 holds them and their sums over ranks are exact in int64."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(rows_XD: Tensor, parts: int) -> Tensor:
    """(parts,) int64 - a number below MODULUS for each of so many equal parts of the rows, by their bits and order."""
    first = rows_XD.detach()[:, :COLUMNS].contiguous()
    bits = first.view(_INTEGERS[first.element_size()]).to(torch.int64).view(parts, -1)
    weights = 2 * torch.arange(bits.shape[1], device=bits.device) + 1  # odd: no value can vanish
    return (bits * weights).sum(1) % MODULUS


def mixed(checksums_W: Tensor) -> Tensor:
    """() int64 - the checksums of all ranks as one number, which is another one when two change places."""
    weights = 2 * torch.arange(len(checksums_W), device=checksums_W.device) + 1
    return (checksums_W * weights).sum() % MODULUS


def wrong_labels(batch: PackedBatch, labels_B: Tensor, keys_X: Tensor | None) -> Tensor:
    """() int64 - queries whose labelled passage is none of their positives. `keys_X`: of the passages in `labels_B`."""
    if keys_X is None or batch.positive_keys_BX is None:
        return labels_B.new_zeros(())
    return (batch.positive_keys_BX != keys_X[labels_B][:, None]).all(1).sum()


def without_negatives(dropped_B: Tensor, columns: int) -> Tensor:
    """() - share of the queries that have nothing but their positive left; 0 where there never was more."""
    return (dropped_B >= columns - 1).double().mean() * (columns > 1)
