"""The objective that samples are selected and refined by: their fit to a few training images of the dataset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from weightspace.data.images import load_images
from weightspace.errors import SettingsError
from weightspace.networks.families import FamilyConfig, run_flat
from weightspace.sampling.base import Condition
from weightspace.schema import Architecture, ImageDataset
from weightspace.search.queries import UNNAMED, WantedResult

Scores = Float[Tensor, "models 2"]
"""Of each model the distance from its accuracy to the wanted range, 0 if none is wanted, and its cross-entropy.

Less is better, and the cross-entropy decides between equal distances.
"""


@dataclass(frozen=True, eq=False)
class Objective:
    """The training images of a dataset, the networks that are run on them, and the test accuracy that is wanted.

    Attributes:
        images: only the training images are used.
        family: config of the networks.
        architecture: how their weights are laid out.
        wanted: range of test accuracies; None if the highest is wanted.
    """

    images: ImageDataset
    family: FamilyConfig
    architecture: Architecture
    wanted: WantedResult | None

    @classmethod
    def of(cls, condition: Condition) -> Objective:
        """Opens the images of a condition's dataset.

        Raises:
            SettingsError: there is no dataset, the library cannot run the networks, or they do not fit the images.
            ZooError: the dataset cannot be opened.
        """
        if condition.dataset is None:
            raise SettingsError("no dataset to judge samples by; give one, or sample without selecting and refining")
        family = condition.family
        if family is None:
            raise SettingsError(
                "samples cannot be judged: the architecture comes with no config of a family that the library can run "
                "(mlp, cnn); give one, or sample without selecting and refining"
            )
        images = load_images(condition.dataset.dataset_id)
        family.ensure_fits(images)
        wanted = next((one for one in condition.results if one.name == UNNAMED), None)
        return cls(images, family, condition.architecture, wanted)

    def draw(self, models: int, images: int, generator: torch.Generator) -> Int[Tensor, "models images"]:
        """Draws training images for each model without replacement; all of them where there are fewer."""
        order = torch.rand(models, len(self.images.train_images), generator=generator).argsort(dim=1)
        return order[:, :images]

    def logits(
        self, flat: Float[Tensor, "models params"], images: Int[Tensor, "models images"]
    ) -> Float[Tensor, "models images classes"]:
        """Runs each model on its images."""
        return run_flat(self.family, self.architecture, flat, self.images.train_images, images)

    def loss(
        self, logits: Float[Tensor, "models images classes"], images: Int[Tensor, "models images"]
    ) -> Float[Tensor, " models"]:
        """Computes each model's mean cross-entropy."""
        labels = self.images.train_labels[images]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)

    @torch.no_grad()
    def score(self, flat: Float[Tensor, "models params"], images: Int[Tensor, "models images"]) -> Scores:
        """Scores each model on its images."""
        logits = self.logits(flat, images)
        accuracy = (logits.argmax(-1) == self.images.train_labels[images]).float().mean(1)
        low, high = (0.0, 1.0) if self.wanted is None else (self.wanted.low, self.wanted.high)
        distance = (low - accuracy).clamp_min(0) + (accuracy - high).clamp_min(0)
        return torch.stack([distance, self.loss(logits, images).nan_to_num(torch.inf)], dim=1)


def ranking(scores: Scores) -> Int[np.ndarray, "models"]:
    """Returns the numbers of the models, the best first."""
    distance, loss = scores.T.numpy()
    order: np.ndarray = np.lexsort((loss, distance))
    return order


def is_better(scores: Scores, others: Scores) -> Bool[Tensor, " models"]:
    """Whether each model is better than the one in the same place of ``others``."""
    (distance, loss), (other_distance, other_loss) = scores.T, others.T
    return (distance < other_distance) | ((distance == other_distance) & (loss < other_loss))
