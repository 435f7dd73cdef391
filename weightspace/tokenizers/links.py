"""Which token writes what another token reads: the wiring of a network in the places of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from weightspace.networks.flat import unflatten
from weightspace.schema import Architecture, GroupAxis, PermutationGroup
from weightspace.tokenizers.base import WeightTokenizer
from weightspace.tokenizers.rows import ChannelTokenizer


@lru_cache(maxsize=64)
def token_links(tokenizer: WeightTokenizer, architecture: Architecture) -> Int[Tensor, "n d"]:
    """Finds for each token entry the token of the channel that the entry is multiplied with.

    A weight that reads channel c of the layer before is linked to the first token of that layer's row c. The links
    follow from the architecture's permutation groups: when neurons are reordered, tokens and links move together.

    Args:
        tokenizer: only `ChannelTokenizer` gives each channel tokens of its own, and so does `LoraTokenizer` where there
            are no factors; with any other nothing is linked.
        architecture: of the models.

    Returns:
        Numbers of tokens counted from 1, and 0 where an entry reads no known channel: inputs of the network, biases,
        padding. The tensor is shared: do not write to it.
    """
    layout = tokenizer.layout(architecture)
    if not isinstance(tokenizer, ChannelTokenizer) or tokenizer.arrange(architecture) is not architecture:
        return torch.zeros(layout.mask.shape, dtype=torch.int64)
    # Token numbers take the places of the weights and become tokens with them; float64 holds them exactly.
    flat = torch.zeros(1, architecture.numel, dtype=torch.float64)
    tensors = unflatten(flat, architecture)
    rows = _first_tokens(architecture, layout.positions)
    for group in architecture.groups:
        for writer, reader in _pairs(group, list(rows)):
            channels = rows[writer.tensor][:: writer.block].repeat_interleave(reader.block)
            weights = tensors[reader.tensor][0]
            weights.copy_(channels.double().view(1, -1, *(1,) * (weights.ndim - 2)))
    return tokenizer.tokenize_batch(flat, architecture)[0].long()


def _first_tokens(architecture: Architecture, positions: Int[Tensor, "n 3"]) -> dict[str, Int[Tensor, " rows"]]:
    """Number, from 1, of the first token of every row of the matrices, in forward order."""
    found = {}
    for number, layer in enumerate(architecture.layers):
        if layer.layout == "channels" and len(layer.tensors[0].shape) > 1:
            tokens = (positions[:, 1] == number).nonzero().flatten() + 1
            found[layer.tensors[0].name] = tokens[:: len(tokens) // layer.rows]
    return found


def _pairs(group: PermutationGroup, matrices: list[str]) -> Iterator[tuple[GroupAxis, GroupAxis]]:
    """Yields each matrix that reads the group's channels with the last one before it that writes them."""
    known = [axis for axis in group.axes if axis.tensor in matrices]
    for reader in (axis for axis in known if axis.axis == 1):
        before = matrices[: matrices.index(reader.tensor)]
        writers = [axis for axis in known if axis.axis == 0 and axis.tensor in before]
        if writers:
            yield max(writers, key=lambda axis: before.index(axis.tensor)), reader
