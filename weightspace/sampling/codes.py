"""Samples weights from the prior of codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.encoder import Encoder
from weightspace.errors import SettingsError
from weightspace.models.codec import LatentCodec
from weightspace.models.prior.modeling_code_prior import WeightCodePriorModel
from weightspace.models.prior.modeling_prior import Guidance
from weightspace.sampling.conditions import Blueprint, Condition
from weightspace.sampling.priors import load_prior, told

_TOGETHER = 256


@dataclass(frozen=True)
class CodeSettings:
    """How codes are drawn.

    Attributes:
        dataset_guidance: how much the dataset counts; 1 is what the model says.
        result_guidance: how much the results count, given the dataset.
        temperature: share that is kept of what each draw differs by from the expected number: 1 samples what the model
            says, 0 takes what is expected, which gives one model only.
    """

    dataset_guidance: float = 1.0
    result_guidance: float = 1.5
    temperature: float = 0.25

    def __post_init__(self) -> None:
        """Refuses temperatures that there are not."""
        if self.temperature < 0:
            raise SettingsError(f"temperature: {self.temperature} is negative; give 0 or more")


@dataclass(frozen=True, eq=False)
class CodeSampler:
    """P(W | D, R), and with parts of the condition left out P(W | D), P(W | R) and P(W), by a `WeightCodePriorModel`.

    Attributes:
        prior: in evaluation mode.
        codec: its autoencoder.
        joint: the joint model that it was trained with.
        settings: see `CodeSettings`.
    """

    prior: WeightCodePriorModel
    codec: LatentCodec
    joint: Encoder
    settings: CodeSettings = field(default_factory=CodeSettings)

    @classmethod
    def load(cls, folder: str | Path, joint: Encoder, settings: CodeSettings | None = None) -> CodeSampler:
        """Loads a prior of codes that `train_prior` wrote.

        Raises:
            WeightspaceError: there is no prior of codes, or it was trained with another joint model.
        """
        return cls(*load_prior(folder, joint, WeightCodePriorModel), joint, settings or CodeSettings())

    def latents(
        self, condition: Condition, blueprint: Blueprint, count: int, generator: torch.Generator
    ) -> Float[Tensor, "count n latent"]:
        """Samples latents that codes stand for; see `weightspace.sampling.samplers.Sampler`."""
        parts = [min(_TOGETHER, count - start) for start in range(0, count, _TOGETHER)]
        return torch.cat([self._drawn(condition, blueprint, part, generator) for part in parts])

    def _drawn(
        self, condition: Condition, blueprint: Blueprint, count: int, generator: torch.Generator
    ) -> Float[Tensor, "count n latent"]:
        settings = self.settings
        codes = self.prior.sample(
            told(self.prior, condition, blueprint, count, self.joint),
            **self.codec.extractor.places(blueprint.architecture, count),
            generator=generator,
            guidance=Guidance(settings.dataset_guidance, settings.result_guidance),
            temperature=settings.temperature,
        )
        return self.prior.autoencoder.from_codes(codes)
