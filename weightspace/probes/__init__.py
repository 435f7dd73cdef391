"""Probes and baselines: what can be read off weights, by how much, and what is left of it after neuron permutation."""
