"""From tensor names and shapes to ordered layers and their permutation symmetries; small networks of trained zoos."""
