"""Losses that align a latent view with an explicit one over a shared set of passages; see kernels/README.md."""

from laser_kernels.alignment import align, alignment_loss
from laser_kernels.dispatch import KERNELS, choose
from laser_kernels.reference import Alignment, AlignmentTerms, alignment_loss_reference, alignment_reference

__all__ = [
    "KERNELS",
    "Alignment",
    "AlignmentTerms",
    "align",
    "alignment_loss",
    "alignment_loss_reference",
    "alignment_reference",
    "choose",
]
