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
from weightspace.models.prior.configuration_prior import ConditionedPriorConfig

TokenConfig = WeightAutoencoderConfig | ConditionedPriorConfig


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

    def __init__(self, config: TokenConfig) -> None:
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
        for layer in self.layers:
            assert isinstance(layer, TokenLayer)
            # Each layer adds to the residual stream twice: their sum should start at the scale of one. The layers say
            # so themselves, since transformers asks nobody to initialise modules without own parameters.
            for last in (layer.attention.out, layer.feed_forward_out):
                last.initial_scale = (2 * layers) ** -0.5

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

    def __init__(self, config: TokenConfig) -> None:
        super().__init__()
        self.pairs = config.position_size // 2
        self.mix = nn.Linear(3 * config.position_size, config.hidden_size)

    def forward(self, position_ids: Int[Tensor, "batch n 3"]) -> Float[Tensor, "batch n width"]:
        """One vector a token."""
        exponents = torch.arange(self.pairs, device=position_ids.device, dtype=torch.float32) / self.pairs
        # Wavelengths from 2 pi to about 6,000 positions: neighbours differ, and so do the ends of long networks.
        angles = position_ids.unsqueeze(-1).float() * torch.exp(-math.log(1000.0) * exponents)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)
        return self.mix(features.to(self.mix.weight.dtype))


@torch.no_grad()
def initialize_linear(module: nn.Linear, scale: float = 1.0) -> None:
    """Draws a linear layer's weight with variance ``scale**2 / fan_in`` and zeroes its bias."""
    init.normal_(module.weight, std=scale * module.in_features**-0.5)
    if module.bias is not None:
        init.zeros_(module.bias)
