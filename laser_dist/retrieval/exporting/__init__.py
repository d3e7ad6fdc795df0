"""The parts of `laser-dist export`: where to, from what, weights, files for sentence-transformers, the model card."""
