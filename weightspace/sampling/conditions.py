"""What is asked of a sampler: a dataset and results, and the architecture that the weights are to be of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightspace.data.features import DatasetFeatures
from weightspace.errors import ArchitectureError, SettingsError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.header import load_json_object
from weightspace.io.hub import HubOptions
from weightspace.networks.families import FamilyConfig, family_config
from weightspace.networks.infer import infer_architecture
from weightspace.schema import Architecture, TensorSpec
from weightspace.search.queries import WantedResult

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, eq=False)
class Condition:
    """A dataset, wanted results, or both; without either, any model will do.

    Attributes:
        dataset: as the joint model's image encoder sees it.
        wanted: results to have.
    """

    dataset: DatasetFeatures | None = None
    wanted: tuple[WantedResult, ...] = ()


@dataclass(frozen=True, eq=False)
class Blueprint:
    """What is to be filled with weights.

    Attributes:
        architecture: names and shapes of the tensors.
        config: content of ``config.json``, or None; it tells what the weights alone do not, as the activation.
    """

    architecture: Architecture
    config: Mapping[str, Any] | None = None

    @property
    def counters(self) -> tuple[str, ...]:
        """Names of the counters beside running statistics, which are no weights; empty where there are none."""
        return tuple(exclusion.tensor for exclusion in self.architecture.exclusions)

    @property
    def family(self) -> FamilyConfig | None:
        """The config of a network that the library can run; None for any other."""
        return None if self.config is None else family_config(self.config)


def open_blueprint(location: str, options: HubOptions | None = None) -> Blueprint:
    """Reads what is to be sampled from a config or from a model of the same architecture, of which only names matter.

    Args:
        location: a JSON file with the config of one of the library's families, or a checkpoint: a path or
            ``org/name[@revision][:path]``.
        options: how the Hub is reached.

    Raises:
        WeightspaceError: there is nothing to read, the config is of no family of the library, or it is of one whose
            networks have other tensors than the checkpoint.
    """
    if location.endswith(".json") and Path(location).is_file():
        return blueprint_of(load_json_object(Path(location).read_bytes(), where=location), location)
    checkpoint = open_checkpoint(location, options=options)
    strange = next((one for one in checkpoint.architecture.exclusions if not one.tensor.endswith(_COUNTER)), None)
    if strange is not None:
        raise ArchitectureError(
            f"{location}: {strange.tensor} cannot be sampled ({strange.reason}); give an architecture of floating "
            "point tensors"
        )
    return Blueprint(checkpoint.architecture, checkpoint.config)


def blueprint_of(config: Mapping[str, Any], where: str = "config") -> Blueprint:
    """Lays out the weights that a config of one of the library's families asks for.

    Raises:
        SettingsError: it names no family, or has wrong values.
    """
    family = family_config(config)
    if family is None:
        raise SettingsError(f"{where}: names no family of this library (mlp, cnn); give a model of the architecture")
    specs = [TensorSpec(name, shape, "F32") for name, shape in family.shapes().items()]
    return Blueprint(infer_architecture(specs, config=config), config)
