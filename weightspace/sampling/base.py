"""The interface of samplers: from a condition to latents that an autoencoder decodes to weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.data.features import DatasetFeatures
from weightspace.errors import ArchitectureError, SettingsError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.header import load_json_object
from weightspace.io.hub import HubOptions
from weightspace.io.locations import locate
from weightspace.models.codec import LatentCodec
from weightspace.networks.families import FamilyConfig, family_config
from weightspace.networks.infer import infer_architecture
from weightspace.networks.running_statistics import PREPROCESSOR
from weightspace.schema import Architecture, TensorSpec
from weightspace.search.queries import WantedResult

_COUNTER = "num_batches_tracked"
_LARGEST = 2**26  # weights of a network that nothing but a config vouches for


@dataclass(frozen=True, eq=False)
class Condition:
    """What is requested of a sampler: an architecture, and what models of it are to be good for.

    Attributes:
        architecture: names and shapes of the tensors to sample.
        config: content of ``config.json``, or None; it says what the tensors do not, such as the activation.
        preprocessor: folder of the ``preprocessor_config.json`` of the model's images, or None.
        dataset: features of a dataset from the joint model's image encoder; None requests none.
        results: requested results; empty requests none.
    """

    architecture: Architecture
    config: Mapping[str, Any] | None = None
    preprocessor: Path | None = None
    dataset: DatasetFeatures | None = None
    results: tuple[WantedResult, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config") -> Condition:
        """Requests any model with a config of one of the library's families.

        Raises:
            SettingsError: the config names no family, or has wrong values.
        """
        family = family_config(config)
        if family is None:
            raise SettingsError(
                f"{where}: names no family of this library (mlp, cnn); give a model of the architecture"
            )
        specs = [TensorSpec(name, shape, "F32") for name, shape in family.shapes().items()]
        if (size := sum(spec.numel for spec in specs)) > _LARGEST:
            raise SettingsError(f"{where}: a network of {size:,} weights; sample networks of {_LARGEST:,} at most")
        return cls(infer_architecture(specs, config=config), config)

    @classmethod
    def open(cls, location: str, options: HubOptions | None = None) -> Condition:
        """Requests any model of the architecture of a config file or of another model.

        Args:
            location: a JSON file with the config of one of the library's families, or a checkpoint: a path or
                ``org/name[@revision][:path]``.
            options: how the Hub is reached.

        Raises:
            WeightspaceError: there is nothing to read, the config is of no family of the library, or it is of one whose
                networks have other tensors than the checkpoint.
        """
        if location.endswith(".json") and Path(location).is_file():
            return cls.from_config(load_json_object(Path(location).read_bytes(), where=location), location)
        checkpoint = open_checkpoint(location, options=options)
        try:
            architecture = infer_architecture(
                checkpoint.specs.values(), config=checkpoint.config, aliases=checkpoint.aliases
            )
        except ArchitectureError as error:
            raise ArchitectureError(f"{location}: {error}") from error
        other = next((one for one in architecture.exclusions if not one.tensor.endswith(_COUNTER)), None)
        if other is not None:
            raise ArchitectureError(
                f"{location}: {other.tensor} cannot be sampled ({other.reason}); give an architecture of floating "
                "point tensors"
            )
        # Only running statistics need images as the model sees them.
        found = locate(location, options) if architecture.exclusions else None
        if found is None or not found[0].has(PREPROCESSOR):
            return cls(architecture, checkpoint.config)
        return cls(architecture, checkpoint.config, found[0].local_path(PREPROCESSOR).parent)

    @cached_property
    def family(self) -> FamilyConfig | None:
        """The config of a network that the library can run; None for any other."""
        return None if self.config is None else family_config(self.config)

    @property
    def counters(self) -> tuple[str, ...]:
        """Names of the counters beside running statistics, which are not sampled; empty where there are none."""
        return tuple(exclusion.tensor for exclusion in self.architecture.exclusions)

    @property
    def requested(self) -> dict[str, float]:
        """The requested results that are single values, by name."""
        return {result.name: result.low for result in self.results if result.low == result.high}


@runtime_checkable
class Sampler(Protocol):
    """From a condition to latents that its codec decodes."""

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder whose latents are sampled."""

    def latents(self, condition: Condition, count: int, generator: torch.Generator) -> Float[Tensor, "count n latent"]:
        """Samples models, independently of each other.

        Args:
            condition: the architecture, and what the models are to be good for.
            count: number of models.
            generator: draws everything random, on the CPU; the same one gives the same samples.

        Raises:
            SettingsError: the sampler cannot sample for this condition.
        """


@dataclass(frozen=True, eq=False)
class SamplerStep:
    """A sampler that chooses among or improves the samples of another one.

    A subclass adds its ``settings``, of the class ``settings_class``.

    Attributes:
        sampler: the other sampler.
    """

    settings_class: ClassVar[type[Any]]
    sampler: Sampler

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder whose latents are sampled."""
        return self.sampler.codec


@torch.no_grad()
def sample(
    sampler: Sampler, condition: Condition, count: int, generator: torch.Generator
) -> Float[Tensor, "count params"]:
    """Samples flat weight vectors; see `Sampler.latents`."""
    return sampler.codec.decode(sampler.latents(condition, count, generator), condition.architecture)
