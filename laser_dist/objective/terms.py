"""Names of the objective's terms, for whom they are enough (the legend of scalars, pages): without torch."""

TERMS = ("infonce_latent", "infonce_explicit", "kl_output", "kl_trajectory")
STEP_TERMS = ("infonce_steps", "refinement")
"""There where the objective compares every latent step; see alignment.py."""
