"""Samplers from trained priors: loading a prior, passing it a condition, and drawing latents or codes from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.encoder import Encoder, saved_folder
from weightspace.errors import SettingsError
from weightspace.io.header import shown
from weightspace.io.hub import HubOptions
from weightspace.models.codec import LatentCodec
from weightspace.models.loading import autoencoder_of, load_trained
from weightspace.models.prior.modeling_code_prior import WeightCodePriorModel
from weightspace.models.prior.modeling_prior import ConditionedPrior, Guidance, PriorCondition, WeightPriorModel
from weightspace.sampling.base import Condition, Sources, prior_type, public_name
from weightspace.search.queries import dataset_classes, result_query
from weightspace.settings import NonNegativeFloat, PositiveInt, Settings
from weightspace.training.classes import output_count
from weightspace.training.run import read_training

P = TypeVar("P", bound=ConditionedPrior)
S = TypeVar("S")
Self = TypeVar("Self", bound="PriorSampler[Any, Any]")

_BATCH = 256


@dataclass(frozen=True, eq=False)
class PriorSampler(Generic[P, S]):
    """P(W | D, R), and with parts of the condition left out P(W | D), P(W | R) and P(W), by a trained prior.

    A subclass names the classes of its prior and settings, and draws.

    Attributes:
        prior: in evaluation mode.
        codec: its autoencoder.
        joint: the joint model that it was trained with.
        settings: of the drawing.
    """

    prior_class: ClassVar[type[ConditionedPrior]]
    settings_class: ClassVar[type[Any]]

    prior: P
    codec: LatentCodec
    joint: Encoder
    settings: S

    @classmethod
    def _prior_type(cls) -> str:
        assert cls.prior_class.config_class is not None
        return str(cls.prior_class.config_class.model_type)

    @classmethod
    def load(cls: type[Self], folder: str | Path, joint: Encoder, settings: Any = None) -> Self:
        """Loads a prior that `train_prior` wrote.

        Args:
            folder: what `train_prior` wrote.
            joint: the joint model that it was trained with.
            settings: of the drawing.

        Raises:
            WeightspaceError: there is no prior of this type, its file lacks weights, or it was trained with another
                joint model.
        """
        if (found := prior_type(folder)) != (wanted := cls._prior_type()):
            raise SettingsError(f"{folder}: holds a model of type {shown(found)}; give a prior of type {wanted}")
        prior, extractor = load_trained(folder, cls.prior_class)
        record = read_training(joint.path)
        if record is None or prior.config.joint_identity != record.identity:
            raise SettingsError(
                f"joint model {joint.name}: the prior {folder} was trained with another one "
                f"({prior.config.joint_identity}); give that"
            )
        codec = LatentCodec(autoencoder_of(prior), extractor)
        return cls(prior, codec, joint, cls.settings_class() if settings is None else settings)

    @classmethod
    def from_sources(cls: type[Self], name: str, sources: Sources, settings: Any) -> tuple[Self, dict[str, str]]:
        """Loads the first prior of this type; see `weightspace.sampling.factory.SAMPLERS`."""
        for location in sources.priors:
            if sampler_of_prior(location, sources.options) is cls:
                folder, prior = saved_folder(location, sources.options, kind="prior")
                return cls.load(folder, sources.joint, settings), {"prior": public_name(prior, folder)}
        raise SettingsError(f"sampler {name}: needs a trained {cls._prior_type()} (weightspace train prior); give one")

    def latents(self, condition: Condition, count: int, generator: torch.Generator) -> Float[Tensor, "count n latent"]:
        """Samples latents; see `weightspace.sampling.base.Sampler`."""
        parts = [min(_BATCH, count - start) for start in range(0, count, _BATCH)]
        return torch.cat([self._drawn(condition, part, generator) for part in parts])

    def _drawn(self, condition: Condition, count: int, generator: torch.Generator) -> Float[Tensor, "count n latent"]:
        raise NotImplementedError

    def _inputs(self, condition: Condition, count: int) -> dict[str, Any]:
        """What the prior's ``sample`` takes for ``count`` samples: the condition, and the positions of the tokens.

        Raises:
            SettingsError: the condition does not fit the joint model.
        """
        config, family = self.prior.config, condition.family
        dataset, result = torch.zeros(1, config.class_size), torch.zeros(config.result_size)
        if condition.dataset is not None:
            dataset = dataset_classes(self.joint, condition.dataset)
        if condition.results:
            result = result_query(self.joint, condition.results)
        activation = self.prior.activation_number(None if family is None else family.activation)
        expanded = dataset.expand(count, -1, -1), result.expand(count, -1), torch.full((count,), activation)
        ordered = torch.full((count,), output_count(condition.architecture) > 0)
        return {
            "condition": PriorCondition(*expanded, ordered),
            **self.codec.extractor.layout(condition.architecture, count),
        }


def sampler_of_prior(location: str, options: HubOptions | None = None) -> type[PriorSampler[Any, Any]]:
    """Returns the class of sampler that a prior is for.

    Raises:
        WeightspaceError: there is no prior.
    """
    found = prior_type(location, options)
    for sampler in PriorSampler.__subclasses__():
        if sampler._prior_type() == found:
            return sampler
    raise SettingsError(f"prior {location}: holds a model of type {shown(found)}; give what `train prior` wrote")


@dataclass(frozen=True)
class FlowSettings(Settings):
    """How the flow is followed.

    A prior that was trained with the behaviour loss has learned the behaviour of its guesses, not of what many small
    steps make of them: with priors on small networks 4 steps gave models as good as 10 steps that look twice, or
    better.

    Attributes:
        dataset_guidance: weight of the dataset; 1 is what the model says.
        result_guidance: weight of the results, given the dataset.
        steps: of the solver.
        solver: ``"euler"`` or ``"heun"``.
    """

    dataset_guidance: float = 1.0
    result_guidance: float = 2.0
    steps: PositiveInt = 4
    solver: Literal["euler", "heun"] = "euler"


class FlowSampler(PriorSampler[WeightPriorModel, FlowSettings]):
    """Samples with a `WeightPriorModel`."""

    prior_class, settings_class = WeightPriorModel, FlowSettings

    def edit(
        self, flat: Float[Tensor, "models params"], condition: Condition, strength: float, generator: torch.Generator
    ) -> Float[Tensor, "models n latent"]:
        """Moves models towards a condition: noise hides part of them, and the flow fills it in (Meng et al., 2022).

        Args:
            flat: the models.
            condition: their architecture, and what they are to be good for.
            strength: 0 leaves the models as they are, 1 samples new ones.
            generator: draws the noise.

        Raises:
            SettingsError: the strength is out of range.
        """
        if not 0 <= strength <= 1:
            raise SettingsError(f"strength: {strength} is out of range, give 0 to 1")
        start = self.codec.encode(flat.float(), condition.architecture)
        return self._drawn(condition, len(flat), generator, start=start, begin=1 - strength)

    def _drawn(
        self,
        condition: Condition,
        count: int,
        generator: torch.Generator,
        start: Float[Tensor, "models n latent"] | None = None,
        begin: float = 0.0,
    ) -> Float[Tensor, "count n latent"]:
        return self.prior.sample(
            **self._inputs(condition, count),
            generator=generator,
            guidance=Guidance(self.settings.dataset_guidance, self.settings.result_guidance),
            steps=self.settings.steps,
            solver=self.settings.solver,
            latents=start,
            begin=begin,
        )


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
