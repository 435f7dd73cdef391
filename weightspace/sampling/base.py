"""The interface of samplers: from a condition to latents that an autoencoder decodes, and what they are built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.data.features import DatasetFeatures
from weightspace.encoder import Encoder, saved_folder
from weightspace.errors import ArchitectureError, SettingsError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.folders import LocalFolder
from weightspace.io.header import load_json_object
from weightspace.io.hub import HubOptions
from weightspace.io.locations import locate
from weightspace.models.codec import LatentCodec
from weightspace.networks.families import FamilyConfig, family_config
from weightspace.networks.infer import infer_architecture
from weightspace.networks.running_statistics import PREPROCESSOR
from weightspace.schema import Architecture, TensorSpec
from weightspace.search.queries import WantedResult
from weightspace.training.run import read_training
from weightspace.zoo.dataset import Zoo

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
        architecture = checkpoint.architecture
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


@dataclass(frozen=True, eq=False)
class Sources:
    """What samplers are built from; a sampler that needs what is missing is refused.

    Attributes:
        joint: the joint model that datasets and results are embedded with.
        priors: folders of trained priors, or ``org/name`` on the Hub; ``flow`` and ``codes`` need one of their type.
        zoo: models to sample around; ``kde`` needs it.
        encoder: autoencoder whose latents ``kde`` samples; that of the first prior if left out.
        options: how the Hub is reached.
    """

    joint: Encoder
    priors: tuple[str, ...] = ()
    zoo: Zoo | None = None
    encoder: str | None = None
    options: HubOptions | None = None


def prior_type(location: str | Path, options: HubOptions | None = None) -> str | None:
    """Returns the model type of a prior.

    Raises:
        WeightspaceError: there is no prior.
    """
    folder, _ = saved_folder(location, options, kind="prior")
    kind: str | None = (LocalFolder(folder).read_json("config.json") or {}).get("model_type")
    return kind


def public_name(name: str, folder: Path) -> str:
    """Names a model without its location on this machine: by its name on the Hub, or by its folder and identity."""
    if not Path(name).is_absolute():
        return name
    record = read_training(folder)
    return folder.resolve().name + ("" if record is None else f" ({record.identity})")


def training_rows(zoo: Zoo, joint: Encoder) -> Int[np.ndarray, "rows"]:
    """Returns the rows of a zoo that a joint model, and models that hold out the same runs, were trained on.

    Raises:
        SettingsError: the joint model was trained on another zoo.
    """
    record = read_training(joint.path)
    if record is None or record.zoo_digest != zoo.digest:
        known = "of which nothing is recorded" if record is None else f"of digest {record.zoo_digest}"
        raise SettingsError(
            f"{zoo.location}: a zoo of digest {zoo.digest}, but the joint model {joint.name} was trained on one "
            f"{known}; give that zoo, or the joint model of this one"
        )
    held_out = zoo.index["run_id"].isin([*record.test_runs, *record.validation_runs])
    held_out |= zoo.index["dataset"].isin(held_out_datasets(joint))
    return np.flatnonzero(~held_out.to_numpy())


def held_out_datasets(joint: Encoder) -> tuple[str, ...]:
    """Returns the datasets that a joint model was not trained on although its zoo has models of them."""
    record = read_training(joint.path)
    return () if record is None else record.held_out_datasets
