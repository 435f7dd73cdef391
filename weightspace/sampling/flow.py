"""Samples weights from the flow-matching prior, and moves existing models towards another dataset or result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.encoder import Encoder
from weightspace.errors import SettingsError
from weightspace.models.codec import LatentCodec
from weightspace.models.prior.modeling_prior import Guidance, WeightPriorModel
from weightspace.sampling.conditions import Blueprint, Condition
from weightspace.sampling.priors import load_prior, told

SOLVERS = ("euler", "heun")
_TOGETHER = 256


@dataclass(frozen=True)
class FlowSettings:
    """How the flow is followed.

    A prior that was trained with the behaviour loss has learned what its guesses do, and not what becomes of them after
    many small steps: with priors on small networks 4 steps gave models as good as 10 steps that look twice, or better.

    Attributes:
        dataset_guidance: how much the dataset counts; 1 is what the model says.
        result_guidance: how much the results count, given the dataset.
        steps: of the solver.
        solver: ``"euler"`` or ``"heun"``.
    """

    dataset_guidance: float = 1.0
    result_guidance: float = 2.0
    steps: int = 4
    solver: str = "euler"

    def __post_init__(self) -> None:
        """Refuses solvers that there are not."""
        if self.solver not in SOLVERS or self.steps < 1:
            raise SettingsError(f"solver {self.solver!r} with {self.steps} steps: choose euler or heun, 1 step or more")


@dataclass(frozen=True, eq=False)
class FlowSampler:
    """P(W | D, R), and with parts of the condition left out P(W | D), P(W | R) and P(W), by one `WeightPriorModel`.

    Attributes:
        prior: in evaluation mode.
        codec: its autoencoder.
        joint: the joint model that it was trained with.
        settings: see `FlowSettings`.
    """

    prior: WeightPriorModel
    codec: LatentCodec
    joint: Encoder
    settings: FlowSettings = field(default_factory=FlowSettings)

    @classmethod
    def load(cls, folder: str | Path, joint: Encoder, settings: FlowSettings | None = None) -> FlowSampler:
        """Loads a prior that `train_prior` wrote.

        Raises:
            WeightspaceError: there is no prior, or it was trained with another joint model.
        """
        return cls(*load_prior(folder, joint, WeightPriorModel), joint, settings or FlowSettings())

    def latents(
        self, condition: Condition, blueprint: Blueprint, count: int, generator: torch.Generator
    ) -> Float[Tensor, "count n latent"]:
        """Samples latents; see `weightspace.sampling.samplers.Sampler`."""
        parts = [min(_TOGETHER, count - start) for start in range(0, count, _TOGETHER)]
        return torch.cat([self._followed(condition, blueprint, part, generator) for part in parts])

    def edit(
        self,
        flat: Float[Tensor, "models params"],
        condition: Condition,
        blueprint: Blueprint,
        strength: float,
        generator: torch.Generator,
    ) -> Float[Tensor, "models n latent"]:
        """Moves models towards a condition: noise hides part of them, and the flow fills it in (Meng et al., 2022).

        Args:
            flat: the models.
            condition: what they are to become.
            blueprint: what they are.
            strength: 0 leaves the models as they are, 1 samples new ones.
            generator: draws the noise.

        Raises:
            SettingsError: the strength is no share.
        """
        if not 0 <= strength <= 1:
            raise SettingsError(f"strength: {strength} is no share, give 0 to 1")
        start = self.codec.encode(flat.float(), blueprint.architecture)
        return self._followed(condition, blueprint, len(flat), generator, start=start, begin=1 - strength)

    def _followed(
        self,
        condition: Condition,
        blueprint: Blueprint,
        count: int,
        generator: torch.Generator,
        start: Float[Tensor, "models n latent"] | None = None,
        begin: float = 0.0,
    ) -> Float[Tensor, "count n latent"]:
        settings = self.settings
        return self.prior.sample(
            told(self.prior, condition, blueprint, count, self.joint),
            **self.codec.extractor.places(blueprint.architecture, count),
            generator=generator,
            guidance=Guidance(settings.dataset_guidance, settings.result_guidance),
            steps=settings.steps,
            solver=settings.solver,
            latents=start,
            begin=begin,
        )
