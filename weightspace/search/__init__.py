"""An index of embedded models, and queries for its models."""
