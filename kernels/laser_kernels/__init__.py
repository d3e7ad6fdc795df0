"""Losses that align a latent view with an explicit one over a shared set of passages; see kernels/README.md."""

from laser_kernels.reference import AlignmentTerms, alignment_loss_reference

# One implementation so far; a fused one must agree with the reference in value and in every gradient.
alignment_loss = alignment_loss_reference

__all__ = ["AlignmentTerms", "alignment_loss", "alignment_loss_reference"]
