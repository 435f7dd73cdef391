"""Sampling weights for a dataset and a result, and the proof that they are good and new."""
