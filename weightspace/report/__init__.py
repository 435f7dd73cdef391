"""Pages for readers: the report on a zoo and its encoder, and the atlas of a zoo's models."""
