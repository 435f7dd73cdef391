"""SANE's tokens: every output channel starts a token of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from weightspace.tokenizers.base import WeightTokenizer


@dataclass(frozen=True)
class ChannelTokenizer(WeightTokenizer):
    """Cuts each row ``[w_c | b_c]`` into pieces of ``token_size`` entries and pads the last piece with zeros.

    Source: SANE, "Towards Scalable and Versatile Weight Space Learning" (Schürholt et al., ICML 2024). A token never
    mixes channels, which keeps neuron permutations permutations of tokens; narrow rows cost mostly padding, for which
    ``DenseTokenizer`` is the answer.
    """

    name: ClassVar[str] = "channel"

    def row_stride(self, width: int) -> int:
        """Rounds ``width`` up to whole tokens."""
        return -(-width // self.token_size) * self.token_size
