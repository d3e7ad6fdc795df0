"""What a query's soft tokens say, what each latent state finds, and how states compare with a written rationale."""
