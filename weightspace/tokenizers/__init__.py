"""Architectures and tensors to token sequences and back.

A new tokenizer is one file with one class and one entry in ``TOKENIZERS``; the contract tests run on every entry. A
saved encoder names its tokenizer by the registered name.
"""

from __future__ import annotations

from weightspace.errors import SettingsError
from weightspace.tokenizers.base import TokenLayout, TokenWindow, WeightTokenizer
from weightspace.tokenizers.lora import LoraTokenizer
from weightspace.tokenizers.normalization import TokenNormalizer
from weightspace.tokenizers.rows import ChannelTokenizer, DenseTokenizer

TOKENIZERS: dict[str, type[WeightTokenizer]] = {
    cls.name: cls for cls in (ChannelTokenizer, DenseTokenizer, LoraTokenizer)
}


def get_tokenizer(name: str, token_size: int) -> WeightTokenizer:
    """Builds the tokenizer that is registered as ``name``, with ``token_size`` entries a token.

    Raises:
        SettingsError: no such tokenizer, or an impossible token size.
    """
    if name not in TOKENIZERS:
        raise SettingsError(f"tokenizer: unknown name {name!r}; choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name](token_size)


__all__ = [
    "TOKENIZERS",
    "ChannelTokenizer",
    "DenseTokenizer",
    "LoraTokenizer",
    "TokenLayout",
    "TokenNormalizer",
    "TokenWindow",
    "WeightTokenizer",
    "get_tokenizer",
]
