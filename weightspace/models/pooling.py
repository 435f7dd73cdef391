"""From a sequence of tokens to one vector a model: statistics that do not change when neurons are reordered."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.models.shapes import Depths, Entries, EntryMask, Hidden, Positions, TokenMask

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_MOMENTS, _TOKEN_STATISTICS = 5, 7
STATISTICS = _MOMENTS + 2 * _TOKEN_STATISTICS + len(QUANTILES)
"""Numbers a part that `entry_statistics` gives."""


def relative_depths(position_ids: Positions, attention_mask: TokenMask) -> Depths:
    """Layer of each token over the last layer of its sequence: 0 at the input of a network, 1 at its output."""
    layers = position_ids[..., 1].float()
    return layers / (layers * attention_mask).amax(1, keepdim=True).clamp(min=1)


def depth_weights(depths: Depths, attention_mask: TokenMask, bins: int) -> Float[Tensor, "batch bins n"]:
    """Says how much each token belongs to each part of a network, from input to output.

    The parts are triangles around ``bins`` centres, evenly spaced over the relative depth, so that networks of any
    depth have equally many parts.

    Args:
        depths: relative depth of each token's layer, 0 (first) to 1 (last).
        attention_mask: true where there is a token.
        bins: number of parts; 1 takes the whole network as one.
    """
    if bins == 1:
        return attention_mask.unsqueeze(1).to(depths.dtype)
    # In steps between centres, which are whole numbers then, a token is exactly within one step of two of them.
    centres = torch.arange(bins, device=depths.device, dtype=depths.dtype)
    weights = (1 - ((bins - 1) * depths.unsqueeze(1) - centres.unsqueeze(-1)).abs()).clamp(min=0)
    return weights * attention_mask.unsqueeze(1)


def state_moments(states: Hidden, parts: Float[Tensor, "batch bins n"]) -> Float[Tensor, "batch features"]:
    """Mean and standard deviation of token states in each part of a network; zero for a part without tokens."""
    total = parts.sum(-1, keepdim=True)
    shares = parts / total.clamp(min=1e-6)
    mean = shares @ states
    variance = (shares @ states.square() - mean.square()).clamp(min=0)
    return torch.cat([mean, (variance + 1e-6).sqrt() * (total > 0)], dim=-1).flatten(1)


def entry_statistics(
    values: Entries, mask: EntryMask, parts: Float[Tensor, "batch bins n"]
) -> Float[Tensor, "batch features"]:
    """How the weights themselves are distributed in each part of a network: ``STATISTICS`` numbers a part.

    Moments and quantiles of all entries, and mean and standard deviation over tokens of what each token looks like (its
    own moments, its largest entry, and its last one, which in channel tokens is the bias). Statistics of this kind
    predict accuracy well (Unterthiner et al., 2020), and an encoder that sees them need not learn them.

    Args:
        values: normalised token entries, zero in the padding.
        mask: true where an entry is a weight.
        parts: as `depth_weights` gives them.
    """
    counts = mask.sum(-1)
    present = parts * (counts > 0).unsqueeze(1)
    exists = present.sum(-1, keepdim=True) > 0
    features = torch.cat([_moments(values, mask, parts), _quantiles(values, mask, present)], dim=-1) * exists
    return torch.cat([features.flatten(1), state_moments(_token_statistics(values, mask), present)], dim=-1)


def _moments(values: Tensor, mask: Tensor, parts: Tensor) -> Float[Tensor, "batch bins moments"]:
    total = (parts @ mask.sum(-1, keepdim=True).to(values.dtype)).clamp(min=1e-6)
    mean, second, third, fourth, magnitude = (
        parts @ (entries * mask).sum(-1, keepdim=True) / total
        for entries in (values, values**2, values**3, values**4, values.abs())
    )
    variance = (second - mean.square()).clamp(min=1e-8)
    skewness = (third - 3 * mean * second + 2 * mean**3) / variance**1.5
    kurtosis = (fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean**4) / variance.square()
    # Logarithms keep heavy tails from drowning everything else in a linear probe.
    return torch.cat(
        [mean, variance.log(), skewness, kurtosis.clamp(min=0).log1p(), magnitude / variance.sqrt()], dim=-1
    )


def _quantiles(values: Tensor, mask: Tensor, parts: Tensor) -> Float[Tensor, "batch bins quantiles"]:
    """Quantiles of the entries of those tokens that belong to a part more than to any other."""
    nearest = parts.argmax(1)
    points = torch.tensor(QUANTILES, device=values.device, dtype=values.dtype)
    columns = []
    for part in range(parts.shape[1]):
        chosen = mask & (nearest == part).unsqueeze(-1)
        entries = values.masked_fill(~chosen, float("inf")).flatten(1)
        last = (chosen.flatten(1).sum(1, keepdim=True) - 1).clamp(min=0)
        found = _sorted(entries).gather(1, (points * last).round().long())
        columns.append(found.masked_fill(~found.isfinite(), 0.0))
    return torch.stack(columns, dim=1)


def _sorted(rows: Tensor) -> Tensor:
    if rows.is_cpu and rows.dtype == torch.float32 and not rows.requires_grad:
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))  # vectorised, ten times as fast as sorting in PyTorch
    return rows.sort(dim=1).values


def _token_statistics(values: Tensor, mask: Tensor) -> Float[Tensor, "batch n statistics"]:
    count = mask.sum(-1).clamp(min=1)
    mean = values.sum(-1) / count
    centred = (values - mean.unsqueeze(-1)) * mask
    variance = centred.square().sum(-1) / count + 1e-6
    skewness = (centred**3).sum(-1) / count / variance**1.5
    kurtosis = (centred**4).sum(-1) / count / variance.square()
    largest = (values.abs() * mask).amax(-1)
    last = values.gather(-1, (mask.sum(-1, keepdim=True) - 1).clamp(min=0)).squeeze(-1)
    return torch.stack(
        [mean, variance.log(), skewness, kurtosis.log1p(), (largest + 1e-6).log(), last, last.abs()], dim=-1
    )
