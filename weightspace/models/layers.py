"""Transformer layers on weight tokens, shared by the models."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attention written out: on a CPU and for windows of tens of tokens much faster to train than the fused kernel."""
    weights = query @ key.mT * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.dropout(weights.softmax(-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class TokenAttention(nn.Module):
    """Multi-head self-attention over all tokens of a window, in both directions."""

    is_causal = False

    def __init__(self, config: WeightAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden: Float[Tensor, "batch n width"], attention_mask: Tensor | None
    ) -> Float[Tensor, "batch n width"]:
        """Mixes the tokens of each sequence; ``attention_mask`` is additive, ``(batch, 1, 1, n)``."""
        batch, length, _ = hidden.shape
        query, key, value = self.qkv(hidden).view(batch, length, 3, -1, self.head_size).permute(2, 0, 3, 1, 4)
        attend: Callable[..., tuple[Tensor, Tensor]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.head_size**-0.5)
        return self.out(mixed.reshape(batch, length, -1))


class TokenLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer (Xiong et al., 2020)."""

    def __init__(self, config: WeightAutoencoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = TokenAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.feed_forward_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(
        self, hidden: Float[Tensor, "batch n width"], attention_mask: Tensor | None
    ) -> Float[Tensor, "batch n width"]:
        """Attention, then a feed-forward network, each added to its input."""
        hidden = hidden + self.attention(self.attention_norm(hidden), attention_mask)
        inner = self.activation(self.feed_forward_in(self.feed_forward_norm(hidden)))
        return hidden + self.feed_forward_out(inner)


class TokenTransformer(nn.Module):
    """A stack of layers with a final norm."""

    def __init__(self, config: WeightAutoencoderConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TokenLayer(config) for _ in range(layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden: Float[Tensor, "batch n width"], attention_mask: Bool[Tensor, "batch n"]
    ) -> Float[Tensor, "batch n width"]:
        """Runs all layers; a token whose ``attention_mask`` is false is attended to by nobody."""
        blocked = ~attention_mask
        additive = None
        if bool(blocked.any()):
            additive = torch.zeros_like(blocked, dtype=hidden.dtype).masked_fill(blocked, torch.finfo(hidden.dtype).min)
            additive = additive[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, additive)
        return self.norm(hidden)


class PositionEmbedding(nn.Module):
    """Expands the columns token, layer, channel to sines and cosines (Vaswani et al., 2017) and mixes them linearly.

    Nothing is learned per index, so that a network deeper or wider than any in training still has distinct positions.
    """

    def __init__(self, config: WeightAutoencoderConfig) -> None:
        super().__init__()
        self.half = config.position_size // 2
        self.mix = nn.Linear(3 * config.position_size, config.hidden_size)

    def forward(self, position_ids: Int[Tensor, "batch n 3"]) -> Float[Tensor, "batch n width"]:
        """One vector a token."""
        exponents = torch.arange(self.half, device=position_ids.device, dtype=torch.float32) / self.half
        # Wavelengths from 2 pi to about 6,000 positions: neighbours differ clearly, and so do the ends of long networks.
        angles = position_ids.unsqueeze(-1).float() * torch.exp(-math.log(1000.0) * exponents)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)
        return self.mix(features.to(self.mix.weight.dtype))


def depth_weights(
    depths: Float[Tensor, "batch n"], attention_mask: Bool[Tensor, "batch n"], bins: int
) -> Float[Tensor, "batch bins n"]:
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
    centres = torch.linspace(0, 1, bins, device=depths.device)
    weights = (1 - (depths.unsqueeze(1) - centres.unsqueeze(-1)).abs() * (bins - 1)).clamp(min=0)
    return weights * attention_mask.unsqueeze(1)


def state_moments(
    hidden: Float[Tensor, "batch n width"], parts: Float[Tensor, "batch bins n"]
) -> Float[Tensor, "batch features"]:
    """Mean and standard deviation of token states in each part of a network; zero for a part without tokens.

    Reordering the tokens of a layer changes nothing.
    """
    total = parts.sum(-1, keepdim=True)
    shares = parts / total.clamp(min=1e-6)
    mean = shares @ hidden
    variance = (shares @ hidden.square() - mean.square()).clamp(min=0)
    return torch.cat([mean, (variance + 1e-6).sqrt() * (total > 0)], dim=-1).flatten(1)


def entry_moments(
    values: Float[Tensor, "batch n d"], mask: Bool[Tensor, "batch n d"], parts: Float[Tensor, "batch bins n"]
) -> Float[Tensor, "batch features"]:
    """How the weights themselves are distributed in each part of a network: seven numbers a part.

    Mean, logarithm of the standard deviation, skewness, kurtosis, mean magnitude over standard deviation, and mean and
    standard deviation of the logarithm of the tokens' norms. None changes when neurons are reordered and rows are
    tokens; weight statistics of this kind predict accuracy well (Unterthiner et al., 2020).

    Args:
        values: normalised token entries, zero in the padding.
        mask: true where an entry is a weight.
        parts: as `depth_weights` gives them.
    """
    counts = mask.sum(-1).to(values.dtype)
    total = (parts @ counts.unsqueeze(-1)).clamp(min=1e-6)

    def average(entries: Tensor) -> Tensor:
        return parts @ (entries * mask).sum(-1, keepdim=True) / total

    mean = average(values)
    second, third, fourth = (average(values**power) for power in (2, 3, 4))
    variance = (second - mean.square()).clamp(min=1e-8)
    skewness = (third - 3 * mean * second + 2 * mean**3) / variance**1.5
    kurtosis = (fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean**4) / variance.square()
    magnitude = average(values.abs()) / variance.sqrt()
    norms = ((values.square() * mask).sum(-1) / counts.clamp(min=1) + 1e-8).log()
    present = parts * (counts > 0).unsqueeze(1)
    shares = present / present.sum(-1, keepdim=True).clamp(min=1e-6)
    norm_mean = shares @ norms.unsqueeze(-1)
    norm_std = ((shares @ norms.square().unsqueeze(-1)) - norm_mean.square()).clamp(min=0).sqrt()
    features = [mean, variance.log(), skewness, kurtosis.clamp(max=1e4).log1p(), magnitude, norm_mean, norm_std]
    return (torch.cat(features, dim=-1) * (present.sum(-1, keepdim=True) > 0)).flatten(1)


@torch.no_grad()
def initialize_linear(module: nn.Linear, scale: float = 1.0) -> None:
    """Draws a linear layer's weight with variance ``scale**2 / fan_in`` and zeroes its bias."""
    init.normal_(module.weight, std=scale * module.in_features**-0.5)
    if module.bias is not None:
        init.zeros_(module.bias)
