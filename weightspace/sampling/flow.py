"""Samples weights from the flow-matching prior, and moves existing models towards another dataset or result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.errors import SettingsError, WeightspaceError
from weightspace.index import Encoder
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.prior.modeling_prior import Guidance, PriorCondition, WeightPriorModel
from weightspace.sampling.conditions import Blueprint, Condition
from weightspace.sampling.decoding import LatentCodec
from weightspace.training.autoencoder import read_training

SOLVERS = ("euler", "heun")
_TOGETHER = 256


@dataclass(frozen=True)
class FlowSettings:
    """How the flow is followed.

    Attributes:
        dataset_guidance: how much the dataset counts; 1 is what the model says.
        result_guidance: how much the results count, given the dataset.
        steps: of the solver.
        solver: ``"euler"`` or ``"heun"``.
    """

    dataset_guidance: float = 2.0
    result_guidance: float = 2.0
    steps: int = 20
    solver: str = "heun"

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
        if not (Path(folder) / "config.json").is_file():
            raise WeightspaceError(f"{folder}: no prior (there is no config.json); train one or check the path")
        prior = WeightPriorModel.from_pretrained(folder).eval()
        record = read_training(joint.path)
        if record is None or prior.config.joint_identity != record["identity"]:
            raise SettingsError(
                f"joint model {joint.name}: the prior {folder} was trained with another one "
                f"({prior.config.joint_identity}); give that"
            )
        extractor = WeightFeatureExtractor.from_pretrained(folder)
        return cls(prior, LatentCodec(prior.autoencoder, extractor), joint, settings or FlowSettings())

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
        dataset, result = condition.embedded(self.joint)
        family = blueprint.family
        activation = self.prior.activation_number(None if family is None else family.activation)
        settings = self.settings
        return self.prior.sample(
            PriorCondition(dataset.expand(count, -1), result.expand(count, -1), torch.full((count,), activation)),
            **self.codec.extractor.places(blueprint.architecture, count),
            generator=generator,
            guidance=Guidance(settings.dataset_guidance, settings.result_guidance),
            steps=settings.steps,
            solver=settings.solver,
            latents=start,
            begin=begin,
        )
