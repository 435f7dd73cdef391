"""Image classification datasets, the frozen image encoders that see them, and their features."""
