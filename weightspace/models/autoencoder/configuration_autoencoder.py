"""Configuration of the weight autoencoder."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

_LARGEST_CODEBOOK = 2**16
"""Most codes that a code is one of: a prior over codes has an output for each."""


@strict
class WeightAutoencoderConfig(PreTrainedConfig):
    r"""Configures a [`WeightAutoencoderModel`].

    Args:
        token_size: entries a weight token, d.
        latent_size: numbers that each token is compressed to.
        window: tokens that attend to each other; longer sequences are cut into windows of this length.
        hidden_size: width of the transformer.
        num_encoder_layers: transformer layers before the bottleneck.
        num_decoder_layers: transformer layers after it.
        num_attention_heads: attention heads of each layer.
        intermediate_size: width of the feed-forward networks.
        hidden_act: their activation.
        layer_norm_eps: epsilon of the layer norms.
        position_size: numbers that each of the three position columns is expanded to (sines and cosines), even.
        depth_bins: parts of a network, from input to output, whose tokens are pooled apart in an embedding.
        projection_size: width of the space in which two views are contrasted.
        temperature: of NT-Xent.
        beta: weight of the reconstruction loss; NT-Xent weighs `1 - beta`.
        code_levels: levels of each of the numbers that one code stands for, if latents are decoded from codes; see
            [`ScalarQuantizer`]. `latent_size` is a multiple of their number. None for latents that are not quantised.
    """

    model_type = "weight_autoencoder"

    token_size: int = 64
    latent_size: int = 16
    window: int = 64
    hidden_size: int = 128
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    position_size: int = 32
    depth_bins: int = 3
    projection_size: int = 64
    temperature: float | int = 0.1
    beta: float | int = 0.95
    code_levels: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Asks for written-out attention where the caller asks for nothing.

        It is what encoders are trained with, so that a loaded one gives the same embeddings to the last bit.
        """
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = "eager"
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses sizes that do not fit each other."""
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.position_size % 2 != 0:
            raise ValueError(f"position_size {self.position_size} is odd; sines and cosines come in pairs")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta {self.beta} is not between 0 and 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} is not positive")
        if self.depth_bins < 1 or self.window < 1:
            raise ValueError(f"depth_bins {self.depth_bins} and window {self.window} must be at least 1")
        if self.code_levels is not None:
            self._validate_codes(self.code_levels)

    def _validate_codes(self, levels: list[int]) -> None:
        if not levels or min(levels) < 2 or math.prod(levels) > _LARGEST_CODEBOOK:
            raise ValueError(
                f"code_levels {levels} must be at least one number, each 2 or more, and their product at most "
                f"{_LARGEST_CODEBOOK:,}"
            )
        if self.latent_size % len(levels) != 0:
            raise ValueError(f"latent_size {self.latent_size} is not a multiple of the {len(levels)} code_levels")


__all__ = ["WeightAutoencoderConfig"]
