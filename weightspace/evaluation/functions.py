"""Judges reconstructed models by what they do: accuracy, and agreement with the original."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.data.images import load_images
from weightspace.networks.families import FamilyConfig, run_flat
from weightspace.schema import Architecture
from weightspace.zoo.dataset import Zoo


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


@torch.no_grad()
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
    datasets = zoo.index["dataset"].to_numpy()
    groups: dict[tuple[FamilyConfig, str], list[int]] = {}
    for place, row in enumerate(rows):
        config = zoo.families[row]
        if config is not None and isinstance(datasets[row], str):
            groups.setdefault((config, datasets[row]), []).append(place)
    columns: list[tuple[np.ndarray, ...]] = []
    for (config, name), places in groups.items():
        dataset = load_images(name)
        labels = dataset.test_labels
        before = run_flat(config, architecture, original[places], dataset.test_images).argmax(-1)
        after = run_flat(config, architecture, decoded[places], dataset.test_images).argmax(-1)
        chance = float(labels.bincount().max()) / len(labels)
        columns.append(
            (
                np.asarray(rows)[places],
                (before == labels).float().mean(1).numpy(),
                (after == labels).float().mean(1).numpy(),
                (before == after).float().mean(1).numpy(),
                np.full(len(places), chance),
            )
        )
    if not columns:
        empty = np.empty(0)
        return FunctionComparison(np.empty(0, dtype=np.int64), empty, empty, empty, empty)
    gathered = [np.concatenate(column) for column in zip(*columns, strict=True)]
    order = np.argsort(gathered[0], kind="stable")
    return FunctionComparison(*(column[order] for column in gathered))
