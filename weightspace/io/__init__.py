"""Bytes to tensors and back: the only code that knows file names and file formats."""
