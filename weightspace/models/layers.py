"""Transformer layers on weight tokens, shared by the models."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from weightspace.models.configuration import TransformerConfig
from weightspace.models.shapes import Hidden, Positions, TokenMask

_WINDOWS_AT_ONCE, _SCORES_AT_ONCE = 512, 2**25


class TokenAttention(nn.Module):
    """Multi-head self-attention over the tokens of a window, in both directions unless the mask is causal."""

    is_causal = False

    def __init__(self, config: TransformerConfig, residual_scale: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = start_at(residual_scale, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, hidden: Hidden, attention_mask: Tensor | None) -> Hidden:
        """Mixes the tokens of each sequence; ``attention_mask`` is additive, ``(batch, 1, 1 or n, n)``."""
        batch, length, _ = hidden.shape
        query, key, value = self.qkv(hidden).view(batch, length, 3, -1, self.head_size).permute(2, 0, 3, 1, 4)
        # On a CPU and for windows of tens of tokens, eager attention trains much faster than the fused kernel.
        attend: Callable[..., tuple[Tensor, Tensor]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.head_size**-0.5)
        return self.out(mixed.reshape(batch, length, -1))


class TokenLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer (Xiong et al., 2020).

    A conditioned layer scales and shifts its norms and gates its outputs by a condition (adaLN-Zero, Peebles and Xie,
    2023); it starts as the identity.
    """

    def __init__(self, config: TransformerConfig, *, residual_scale: float = 1.0, conditioned: bool = False) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps, elementwise_affine=not conditioned)
        self.attention = TokenAttention(config, residual_scale)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps, elementwise_affine=not conditioned)
        self.feed_forward_in = nn.Linear(width, config.intermediate_size)
        self.feed_forward_out = start_at(residual_scale, nn.Linear(config.intermediate_size, width))
        self.activation = ACT2FN[config.hidden_act]
        self.modulation = start_at(0.0, nn.Linear(width, 6 * width)) if conditioned else None

    def forward(
        self, hidden: Hidden, attention_mask: Tensor | None, condition: Float[Tensor, "batch width"] | None = None
    ) -> Hidden:
        """Attention, then a feed-forward network, each added to its input."""
        if self.modulation is None:
            hidden = hidden + self.attention(self.attention_norm(hidden), attention_mask)
            return hidden + self._feed_forward(self.feed_forward_norm(hidden))
        scale, shift, gate, inner_scale, inner_shift, inner_gate = self.modulation(condition).unsqueeze(1).chunk(6, -1)
        hidden = hidden + gate * self.attention(self.attention_norm(hidden) * (1 + scale) + shift, attention_mask)
        return hidden + inner_gate * self._feed_forward(
            self.feed_forward_norm(hidden) * (1 + inner_scale) + inner_shift
        )

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return self.feed_forward_out(self.activation(self.feed_forward_in(hidden)))


class TokenTransformer(nn.Module):
    """A stack of layers with a final norm."""

    def __init__(self, config: TransformerConfig, layers: int) -> None:
        super().__init__()
        # Each layer adds to the residual stream twice: their sum should start at the scale of one.
        scale = (2 * layers) ** -0.5
        self.layers = nn.ModuleList(TokenLayer(config, residual_scale=scale) for _ in range(layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Hidden, attention_mask: TokenMask) -> Hidden:
        """Runs all layers; no token attends to one whose ``attention_mask`` is false."""
        additive = additive_mask(attention_mask, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, additive)
        return self.norm(hidden)


def token_mask(position_ids: Positions, attention_mask: Tensor | None) -> TokenMask:
    """Returns the attention mask; all true if there is none."""
    return torch.ones_like(position_ids[..., 0], dtype=torch.bool) if attention_mask is None else attention_mask.bool()


def additive_mask(
    attention_mask: TokenMask, dtype: torch.dtype, *, causal: bool = False
) -> Float[Tensor, "batch 1 _ n"] | None:
    """Returns what to add to attention scores; None where every token may attend to every other."""
    blocked = ~attention_mask[:, None, None, :]
    if causal:
        blocked = blocked | torch.ones(2 * blocked.shape[-1:], dtype=torch.bool, device=blocked.device).triu(1)
    if not bool(blocked.any()):
        return None
    return torch.zeros_like(blocked, dtype=dtype).masked_fill(blocked, torch.finfo(dtype).min)


def in_windows(run: Callable[..., Tensor], window: int, hidden: Hidden, *rows: Tensor) -> Hidden:
    """Runs layers on windows of the sequence, so that cost grows with its length and not with the square.

    Args:
        run: takes the hidden states of some windows, and their part of ``rows``.
        window: tokens of a window; those that the last one lacks are masked.
        hidden: states of whole sequences.
        rows: first the attention mask ``(batch, n)``, then what belongs to each whole sequence ``(batch, ...)``.
    """
    batch, length, width = hidden.shape
    window = min(length, window)
    missing = -length % window
    hidden = F.pad(hidden, (0, 0, 0, missing)).view(-1, window, width)
    mask, *others = rows
    others = [row.repeat_interleave(len(hidden) // batch, 0) for row in others]
    # What a layer holds at once would otherwise grow with the size of the models.
    inputs = (hidden, F.pad(mask, (0, missing)).view(-1, window), *others)
    at_once = min(_WINDOWS_AT_ONCE, max(1, _SCORES_AT_ONCE // window**2))
    parts = zip(*(part.split(at_once) for part in inputs), strict=True)
    return torch.cat([run(*part) for part in parts]).view(batch, -1, width)[:, :length]


class PositionEmbedding(nn.Module):
    """Expands the columns token, layer, channel to sines and cosines (Vaswani et al., 2017) and mixes them linearly.

    Nothing is learned per index, so that a network deeper or wider than any in training still has distinct positions.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.pairs = config.position_size // 2
        self.mix = nn.Linear(3 * config.position_size, config.hidden_size)

    def forward(self, position_ids: Positions) -> Hidden:
        """One vector a token."""
        # Wavelengths from 2 pi to about 6,000 positions: neighbours differ, and so do the ends of long networks.
        features = sinusoids(position_ids.float(), self.pairs, 1000.0).flatten(2)
        return self.mix(features.to(self.mix.weight.dtype))


def sinusoids(values: Float[Tensor, "*shape"], pairs: int, ratio: float) -> Float[Tensor, "*shape two_pairs"]:
    """Expands each value to sines and cosines whose frequencies fall geometrically from 1 to nearly 1 / ``ratio``."""
    exponents = torch.arange(pairs, device=values.device, dtype=torch.float32) / pairs
    angles = values.unsqueeze(-1) * torch.exp(-math.log(ratio) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def start_at(scale: float, layer: nn.Linear) -> nn.Linear:
    """Has `initialize` draw a layer at another scale than 1."""
    # On the layer itself, since transformers does not initialise modules without parameters of their own.
    layer.initial_scale = scale  # type: ignore[assignment]
    return layer


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Draws linear layers with variance ``scale**2 / fan_in`` and embeddings with variance 1; biases start at 0.

    Signals then keep unit scale through the layers.
    """
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=getattr(module, "initial_scale", 1.0) * module.in_features**-0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight)
