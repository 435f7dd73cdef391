"""An index of embedded models, and the questions that are asked of it."""
