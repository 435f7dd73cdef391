"""Model and dataset cards from recorded facts."""
