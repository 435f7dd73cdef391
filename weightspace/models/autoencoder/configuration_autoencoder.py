"""Configuration of the weight autoencoder."""

import math

from huggingface_hub.dataclasses import strict

from weightspace.io.header import shown
from weightspace.models.configuration import TransformerConfig

_LARGEST_CODEBOOK = 2**16
"""Most codes of a codebook: a prior over codes has an output for each."""


@strict
class WeightAutoencoderConfig(TransformerConfig):
    r"""Configures a [`WeightAutoencoderModel`], in addition to [`TransformerConfig`].

    Args:
        token_size: entries a weight token, d.
        latent_size: numbers that each token is compressed to.
        window: tokens that attend to each other; longer sequences are cut into windows of this length.
        num_encoder_layers: transformer layers before the bottleneck.
        num_decoder_layers: transformer layers after it.
        depth_bins: parts of a network, from input to output, whose tokens are pooled separately.
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
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    depth_bins: int = 3
    projection_size: int = 64
    temperature: float | int = 0.1
    beta: float | int = 0.95
    code_levels: list[int] | None = None

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses values out of bounds."""
        super().validate_architecture()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta {self.beta} is not between 0 and 1")
        levels = self.code_levels
        if levels is None:
            return
        if not 0 < len(levels) <= self.latent_size or min(levels) < 2 or math.prod(levels) > _LARGEST_CODEBOOK:
            raise ValueError(
                f"code_levels {shown(levels)} must be up to latent_size numbers, each 2 or more, of a product of at "
                f"most {_LARGEST_CODEBOOK:,}"
            )
        if self.latent_size % len(levels) != 0:
            raise ValueError(f"latent_size {self.latent_size} is not a multiple of the {len(levels)} code_levels")
