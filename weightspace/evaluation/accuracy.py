"""Test accuracy and predictions of models on image datasets, and what reconstructed models do beside the originals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.data.images import load_images
from weightspace.errors import SettingsError
from weightspace.networks.families import FamilyConfig, run_flat
from weightspace.schema import Architecture, ImageDataset
from weightspace.zoo.dataset import Zoo


@dataclass(frozen=True, eq=False)
class ModelSet:
    """Models of one config that are evaluated on one dataset.

    Attributes:
        dataset: image dataset id.
        config: of all models.
        architecture: how their weights are laid out.
        flat: one flat weight vector a model.
        requested: results that were requested of them, by name; empty if they were not sampled for any.
        baselines: models to compare these with, by name, besides those that every comparison has.
    """

    dataset: str
    config: FamilyConfig
    architecture: Architecture
    flat: Float[Tensor, "models params"]
    requested: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, ModelSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses weights of another config."""
        shapes = {tensor.name: tensor.shape for tensor in self.architecture.tensors}
        if shapes != self.config.shapes():
            raise SettingsError(
                f"{self.config.to_dict()} has the tensors {self.config.shapes()}, the architecture {shapes}; "
                "give the config that the weights are of"
            )

    @property
    def images(self) -> ImageDataset:
        """The dataset.

        Raises:
            SettingsError: the models cannot be run on it.
        """
        images = load_images(self.dataset)
        self.config.ensure_fits(images)
        return images


def predictions(models: ModelSet) -> Int[Tensor, "models images"]:
    """Returns the class that each model predicts for each test image.

    Raises:
        SettingsError: the images do not fit the models.
    """
    return _predicted(models.config, models.architecture, models.flat.float(), models.images)


def accuracies(models: ModelSet) -> Float[np.ndarray, "models"]:
    """Returns the test accuracy of each model.

    Raises:
        SettingsError: the images do not fit the models.
    """
    images = models.images
    predicted = _predicted(models.config, models.architecture, models.flat.float(), images)
    found: np.ndarray = (predicted == images.test_labels).double().mean(1).numpy()
    return found


@dataclass(frozen=True, eq=False)
class FunctionComparison:
    """Original and reconstructed models on the test images of their own datasets, one entry a model.

    Attributes:
        rows: zoo rows of the models whose function can be run.
        original: test accuracy of the original.
        decoded: test accuracy of the reconstruction.
        agreement: share of test images on which both predict the same class.
        chance: accuracy of the most frequent class.
    """

    rows: Int[np.ndarray, "models"]
    original: Float[np.ndarray, "models"]
    decoded: Float[np.ndarray, "models"]
    agreement: Float[np.ndarray, "models"]
    chance: Float[np.ndarray, "models"]

    @property
    def learned(self) -> np.ndarray:
        """True for models whose original is better than chance."""
        return self.original > self.chance


def compare_functions(
    zoo: Zoo,
    rows: Int[np.ndarray, "models"],
    original: Float[Tensor, "models params"],
    decoded: Float[Tensor, "models params"],
    architecture: Architecture,
) -> FunctionComparison:
    """Runs models and their reconstructions on the test split of each model's own dataset.

    Models without a known function (no config of this library's families, or no dataset) are left out.

    Args:
        zoo: the zoo that the models are from.
        rows: their rows.
        original: their weights.
        decoded: reconstructed weights, in the same order.
        architecture: shared by all of them.
    """
    rows, datasets = np.asarray(rows), zoo.index["dataset"].to_numpy()
    groups: dict[tuple[FamilyConfig, str], list[int]] = {}
    for number, row in enumerate(rows):
        config = zoo.families[row]
        if config is not None and isinstance(datasets[row], str):
            groups.setdefault((config, datasets[row]), []).append(number)
    found = np.full((4, len(rows)), np.nan)
    for (config, name), members in groups.items():
        images = load_images(name)
        labels = images.test_labels
        before, after = (_predicted(config, architecture, flat[members], images) for flat in (original, decoded))
        for column, matches in zip(found, (before == labels, after == labels, before == after), strict=False):
            column[members] = matches.float().mean(1).numpy()
        found[3, members] = float(labels.bincount().max()) / len(labels)
    known = np.flatnonzero(~np.isnan(found[3]))
    known = known[np.argsort(rows[known], kind="stable")]
    original_accuracy, decoded_accuracy, agreement = found[:3, known].astype(np.float32)
    return FunctionComparison(rows[known], original_accuracy, decoded_accuracy, agreement, found[3, known])


@torch.no_grad()
def _predicted(
    config: FamilyConfig, architecture: Architecture, flat: Float[Tensor, "models params"], images: ImageDataset
) -> Int[Tensor, "models images"]:
    return run_flat(config, architecture, flat, images.test_images).argmax(-1)
