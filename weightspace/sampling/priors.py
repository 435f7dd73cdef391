"""What samplers from trained priors share: loading a prior, and passing it a condition."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.encoder import Encoder, saved_folder
from weightspace.errors import SettingsError, WeightspaceError
from weightspace.io.header import shown
from weightspace.io.hub import HubOptions
from weightspace.models.codec import LatentCodec
from weightspace.models.loading import autoencoder_of, load_trained
from weightspace.models.prior.modeling_prior import ConditionedPrior, PriorCondition
from weightspace.sampling.base import Condition
from weightspace.sampling.sources import Sources, prior_type, public_name
from weightspace.search.queries import dataset_classes, result_query
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
    by_prior_type: ClassVar[dict[str, type[PriorSampler[Any, Any]]]] = {}

    prior: P
    codec: LatentCodec
    joint: Encoder
    settings: S

    def __init_subclass__(cls) -> None:
        """Makes the sampler known as that of its type of prior."""
        super().__init_subclass__()
        cls.by_prior_type[cls._prior_type()] = cls

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
        try:
            prior, extractor = load_trained(folder, cls.prior_class)
        except WeightspaceError as error:
            raise type(error)(f"{folder}: the prior cannot be loaded: {error}") from error
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
    if found not in PriorSampler.by_prior_type:
        raise SettingsError(f"prior {location}: holds a model of type {shown(found)}; give what `train prior` wrote")
    return PriorSampler.by_prior_type[found]
