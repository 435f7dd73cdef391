"""Judges models by what they do."""
