"""Tokens cut from the rows of layers: each row padded to whole tokens, or all rows end to end."""

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


@dataclass(frozen=True)
class DenseTokenizer(WeightTokenizer):
    """Lays the rows ``[w_c | b_c]`` of a layer end to end and cuts them every ``token_size`` entries.

    Only a layer's last token is padded, so that a sequence is as short as tokens that do not cross layers allow. A
    token may hold parts of several channels: its channel position is the row that its first entry belongs to. Use
    ``ChannelTokenizer`` where tokens must follow neuron permutations.
    """

    name: ClassVar[str] = "dense"

    def row_stride(self, width: int) -> int:
        """Returns ``width``: the next row starts where this one ends."""
        return width
