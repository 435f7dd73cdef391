"""SANE-style sequence autoencoder of weight tokens, with its input side."""
