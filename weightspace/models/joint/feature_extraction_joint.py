"""The input side of the joint model's weight tower: tokens, and which token reads which."""

from __future__ import annotations

from torch import Tensor

from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.schema import Architecture
from weightspace.tokenizers.links import token_links


class JointFeatureExtractor(WeightFeatureExtractor):
    """A `WeightFeatureExtractor` that adds ``weight_links (batch, n, d)``; see `token_links`.

    Samples of large models have no links: a token's partner need not be in the sample.
    """

    model_input_names = [*WeightFeatureExtractor.model_input_names, "weight_links"]  # noqa: RUF012

    def links(self, architecture: Architecture) -> dict[str, Tensor]:
        """Returns which token each entry reads."""
        return {"weight_links": token_links(self._tokenizer, architecture)}
