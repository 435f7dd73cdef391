"""The zoo models that samples are compared with: their rows, weights and predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.data.images import load_images
from weightspace.errors import SettingsError
from weightspace.evaluation.accuracy import ModelSet, predictions
from weightspace.evaluation.novelty import KnownModels
from weightspace.networks.families import FamilyConfig
from weightspace.schema import Architecture, TensorSpec
from weightspace.zoo.dataset import Zoo


class ReferenceModels:
    """A zoo, split into the models that samplers were trained on and the held-out ones.

    Weights and predictions are kept once they were read, so that several samplers share them.
    """

    def __init__(self, zoo: Zoo, training_rows: Int[np.ndarray, "rows"], nearest: Mapping[str, str]) -> None:
        """Splits ``zoo``.

        Args:
            zoo: the zoo.
            training_rows: rows of the models that samplers were trained on.
            nearest: the training dataset that is nearest to each dataset without training models.
        """
        self.zoo = zoo
        self.training = np.zeros(len(zoo), dtype=bool)
        self.training[training_rows] = True
        self.runs = np.unique(zoo.index["run_id"].to_numpy(), return_inverse=True)[1]
        self._datasets = zoo.index["dataset"].to_numpy()
        self._headers = zoo.index["header"].to_numpy()
        self._nearest = nearest
        self._weights: dict[int, Float[Tensor, " params"]] = {}
        self._known: dict[tuple[TensorSpec, ...], KnownModels] = {}
        self._predicted: dict[str, tuple[Int[np.ndarray, "rows"], Int[Tensor, "rows images"]]] = {}

    def seen(self, dataset: str) -> bool:
        """Whether any training model was trained on the dataset."""
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
            # Headers may differ in more than the tensors.
            known = self.zoo.architectures.items()
            chosen &= np.isin(self._headers, [header for header, own in known if own.tensors == architecture.tensors])
        return np.flatnonzero(chosen)

    def runnable(self, rows: Int[np.ndarray, "rows"], dataset: str) -> Int[np.ndarray, "runnable"]:
        """Leaves out models that cannot be run on the images of the dataset."""
        images = load_images(dataset)
        configs = [self.zoo.families[row] for row in rows]
        return rows[np.array([config is not None and config.fits(images) for config in configs], dtype=bool)]

    def flat(self, rows: Int[np.ndarray, "rows"]) -> Float[Tensor, "rows params"]:
        """Returns the weights of ``rows``, in this order; all must have the same tensors."""
        if missing := [row for row in rows.tolist() if row not in self._weights]:
            for batch in self.zoo.batches(missing):
                self._weights |= zip(batch.rows.tolist(), batch.flat, strict=True)
        return torch.stack([self._weights[row] for row in rows.tolist()])

    def models(self, rows: Int[np.ndarray, "rows"], dataset: str) -> ModelSet:
        """Returns zoo models of one config, to be evaluated on a dataset that need not be their own."""
        config = self.zoo.families[rows[0]]
        assert config is not None
        return ModelSet(dataset, config, self.zoo.architectures[self._headers[rows[0]]], self.flat(rows))

    def known(self, architecture: Architecture) -> KnownModels | None:
        """Returns all training models of an architecture, whatever their dataset and config; None without any."""
        tensors = architecture.tensors
        if tensors not in self._known and len(rows := self.rows(training=True, architecture=architecture)):
            self._known[tensors] = KnownModels(self.flat(rows), architecture)
        return self._known.get(tensors)

    def predictions(
        self, dataset: str, rows: Int[np.ndarray, "rows"]
    ) -> tuple[Int[np.ndarray, "runnable"], Int[Tensor, "runnable images"]]:
        """Runs the dataset's own models and the training models of its source on its test images.

        Returns:
            Those of ``rows`` that are among these models and can be run, and the classes that they predict.
        """
        if dataset not in self._predicted:
            every = np.union1d(self.rows(dataset), self.rows(self.source(dataset), training=True))
            every = self.runnable(every, dataset)
            predicted = torch.empty(len(every), len(load_images(dataset).test_labels), dtype=torch.int64)
            groups: dict[tuple[FamilyConfig | None, str], list[int]] = {}
            for number, row in enumerate(every):
                groups.setdefault((self.zoo.families[row], self._headers[row]), []).append(number)
            for members in groups.values():
                predicted[members] = predictions(self.models(every[members], dataset))
            self._predicted[dataset] = every, predicted
        every, predicted = self._predicted[dataset]
        chosen = np.flatnonzero(np.isin(every, rows))
        return every[chosen], predicted[chosen]
