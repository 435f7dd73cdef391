"""Samples weights from the prior of codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.models.prior.modeling_code_prior import WeightCodePriorModel
from weightspace.models.prior.modeling_prior import Guidance
from weightspace.sampling.base import Condition
from weightspace.sampling.priors import PriorSampler
from weightspace.settings import NonNegativeFloat, Settings


@dataclass(frozen=True)
class CodeSettings(Settings):
    """How codes are drawn.

    Attributes:
        dataset_guidance: weight of the dataset; 1 is what the model says.
        result_guidance: weight of the results, given the dataset.
        temperature: share of each draw's deviation from the expected number that is kept: 1 samples what the model
            says, 0 takes the expected number, which gives one model only.
    """

    dataset_guidance: float = 1.0
    result_guidance: float = 1.5
    temperature: NonNegativeFloat = 0.25


class CodeSampler(PriorSampler[WeightCodePriorModel, CodeSettings]):
    """Samples latents that codes stand for, with a `WeightCodePriorModel`."""

    prior_class, settings_class = WeightCodePriorModel, CodeSettings

    def _drawn(self, condition: Condition, count: int, generator: torch.Generator) -> Float[Tensor, "count n latent"]:
        codes = self.prior.sample(
            **self._inputs(condition, count),
            generator=generator,
            guidance=Guidance(self.settings.dataset_guidance, self.settings.result_guidance),
            temperature=self.settings.temperature,
        )
        return self.prior.autoencoder.from_codes(codes)
