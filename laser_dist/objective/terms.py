"""Names of the objective's terms, for whom they are enough (the legend of scalars, pages): without torch."""

TERMS = ("infonce_latent", "infonce_explicit", "kl_output", "kl_trajectory")
