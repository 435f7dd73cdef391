"""Between flat weight vectors and the latents of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.schema import Architecture

_CHUNK = 256


@dataclass(frozen=True, eq=False)
class LatentCodec:
    """A trained autoencoder with its input side.

    Attributes:
        model: in evaluation mode.
        extractor: turns weights into its inputs, and its outputs into weights.
    """

    model: WeightAutoencoderModel
    extractor: WeightFeatureExtractor

    @torch.no_grad()
    def encode(
        self, flat: Float[Tensor, "models params"], architecture: Architecture
    ) -> Float[Tensor, "models n latent"]:
        """Compresses flat weight vectors to the latents of their tokens."""
        names = WeightFeatureExtractor.model_input_names
        parts = [self.extractor.batch(part, architecture) for part in flat.split(_CHUNK)]
        return torch.cat([self.model.encode(**{name: part[name] for name in names}) for part in parts])

    def decode(
        self, latents: Float[Tensor, "models n latent"], architecture: Architecture
    ) -> Float[Tensor, "models params"]:
        """Expands latents to flat weight vectors, of this architecture whatever it is; differentiable."""
        parts = []
        for part in latents.split(_CHUNK):
            tokens = self.model.decode(part, **self.extractor.layout(architecture, len(part)))
            parts.append(self.extractor.restore(tokens.float(), architecture))
        return torch.cat(parts)
