"""One embedding space for datasets, weights and results, with its input side."""
