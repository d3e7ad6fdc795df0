"""Losses that align a latent view with an explicit one over shared passages, and the latent step's attention."""

from laser_kernels.alignment import align, alignment_loss
from laser_kernels.dispatch import KERNELS, choose
from laser_kernels.latent_attention import latent_attention, latent_attention_reference
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
    "latent_attention",
    "latent_attention_reference",
]
