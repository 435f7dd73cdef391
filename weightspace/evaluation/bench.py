"""The zoo's side of a proof: which of its models a condition is compared with, their weights and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weightspace.data.images import load_images
from weightspace.errors import SettingsError
from weightspace.evaluation.finetuning import Trial, fits, predictions
from weightspace.evaluation.novelty import KnownModels
from weightspace.networks.families import FamilyConfig
from weightspace.schema import Architecture, TensorSpec
from weightspace.zoo.dataset import Zoo


@dataclass(frozen=True, eq=False)
class Judged:
    """Zoo models on the test images of one dataset.

    Attributes:
        rows: their rows in the zoo.
        predicted: the class that each of them predicts for each image.
        wrong: where it is not the image's class.
    """

    rows: Int[np.ndarray, "models"]
    predicted: Int[Tensor, "models images"]
    wrong: Bool[Tensor, "models images"]

    def __getitem__(self, rows: Int[np.ndarray, "chosen"]) -> Judged:
        """Returns those of ``rows`` that are among these models."""
        places = np.flatnonzero(np.isin(self.rows, rows))
        return Judged(self.rows[places], self.predicted[places], self.wrong[places])


class Bench:
    """A zoo, split into the models that samplers have seen and the others.

    Weights and predictions are kept once they were read, so that several samplers share them.
    """

    def __init__(self, zoo: Zoo, training_rows: Int[np.ndarray, "rows"], nearest: Mapping[str, str]) -> None:
        """Takes ``zoo`` apart.

        Args:
            zoo: the zoo.
            training_rows: rows of the models that samplers have seen.
            nearest: the training dataset that stands for each dataset without training models.
        """
        self.zoo = zoo
        self.training = np.zeros(len(zoo), dtype=bool)
        self.training[training_rows] = True
        self.runs = np.unique(zoo.index["run_id"].to_numpy(), return_inverse=True)[1]
        self._datasets = zoo.index["dataset"].to_numpy()
        self._headers = zoo.index["header"].to_numpy()
        # Headers may differ in what they tell beside the tensors.
        self._layouts = {header: architecture.tensors for header, architecture in zoo.architectures.items()}
        self._nearest = nearest
        self._flat: dict[tuple[TensorSpec, ...], Float[Tensor, "models params"]] = {}
        self._known: dict[tuple[TensorSpec, ...], KnownModels] = {}
        self._judged: dict[str, Judged] = {}

    def seen(self, dataset: str) -> bool:
        """Tells whether any training model was trained on the dataset."""
        return bool((self.training & (self._datasets == dataset)).any())

    def source(self, dataset: str) -> str:
        """Returns the dataset whose training models a sampler can draw on: the dataset itself if it is seen.

        Raises:
            SettingsError: it is not, and neither is the one named nearest to it.
        """
        source = dataset if self.seen(dataset) else self._nearest.get(dataset)
        if source is None or not self.seen(source):
            raise SettingsError(
                f"{dataset}: no training model, and nearest names {source or 'no dataset'}; "
                "name a dataset that training models have"
            )
        return source

    def rows(
        self,
        dataset: str | None = None,
        *,
        training: bool | None = None,
        config: FamilyConfig | None = None,
        architecture: Architecture | None = None,
    ) -> Int[np.ndarray, "rows"]:
        """Returns the rows, in ascending order, that meet every condition that is given."""
        chosen = np.ones(len(self.zoo), dtype=bool)
        if dataset is not None:
            chosen &= self._datasets == dataset
        if training is not None:
            chosen &= self.training == training
        if config is not None:
            chosen &= np.array([own == config for own in self.zoo.families], dtype=bool)
        if architecture is not None:
            chosen &= self._laid_out(architecture.tensors)
        return np.flatnonzero(chosen)

    def _laid_out(self, tensors: tuple[TensorSpec, ...]) -> Bool[np.ndarray, "all_models"]:
        same: np.ndarray = np.isin(self._headers, [header for header, own in self._layouts.items() if own == tensors])
        return same

    def flat(self, rows: Int[np.ndarray, "rows"]) -> Float[Tensor, "rows params"]:
        """Returns the weights of ``rows``, in this order; all must have the same tensors."""
        tensors = self._layouts[self._headers[rows[0]]]
        own = np.flatnonzero(self._laid_out(tensors))
        if tensors not in self._flat:
            batches = list(self.zoo.batches(own))
            order = np.argsort(np.concatenate([batch.rows for batch in batches]))
            self._flat[tensors] = torch.cat([batch.flat for batch in batches])[torch.from_numpy(order)]
        return self._flat[tensors][np.searchsorted(own, rows)]

    def known(self, architecture: Architecture) -> KnownModels | None:
        """Returns all training models of an architecture, whatever their dataset and config; None without any."""
        tensors = architecture.tensors
        if tensors not in self._known and len(rows := self.rows(training=True, architecture=architecture)):
            self._known[tensors] = KnownModels(self.flat(rows), architecture)
        return self._known.get(tensors)

    def trial(self, rows: Int[np.ndarray, "rows"], dataset: str) -> Trial:
        """Tries zoo models of one config on a dataset, which need not be their own."""
        config = self.zoo.families[rows[0]]
        assert config is not None
        return Trial(dataset, config, self.zoo.architectures[self._headers[rows[0]]], self.flat(rows))

    def runnable(self, rows: Int[np.ndarray, "rows"], dataset: str) -> Int[np.ndarray, "runnable"]:
        """Leaves out models that the library cannot run on the dataset's images."""
        images = load_images(dataset)
        configs = [self.zoo.families[row] for row in rows]
        return rows[np.array([config is not None and fits(config, images) for config in configs], dtype=bool)]

    def judged(self, dataset: str) -> Judged:
        """Runs the dataset's own models and the training models of its source on its test images."""
        if dataset not in self._judged:
            rows = np.union1d(self.rows(dataset), self.rows(self.source(dataset), training=True))
            self._judged[dataset] = self._run(self.runnable(rows, dataset), dataset)
        return self._judged[dataset]

    def _run(self, rows: Int[np.ndarray, "rows"], dataset: str) -> Judged:
        labels = load_images(dataset).test_labels
        groups: dict[tuple[FamilyConfig | None, str], list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault((self.zoo.families[row], self._headers[row]), []).append(place)
        predicted = labels.repeat(len(rows), 1)
        for places in groups.values():
            predicted[places] = predictions(self.trial(rows[places], dataset))
        return Judged(rows, predicted, predicted != labels)
