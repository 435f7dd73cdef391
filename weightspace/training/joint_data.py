"""What joint models are trained on: the datasets and results of a zoo's models, in batches of triplets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weightspace.data.features import DatasetFeatures
from weightspace.errors import ZooError
from weightspace.training.batches import Batch, ViewBatches, seeded_generator
from weightspace.training.classes import StepOrders, renumbered_labels
from weightspace.zoo.splits import Split

T = TypeVar("T")


def opened_datasets(names: Iterable[Any], open_one: Callable[[str], T]) -> tuple[dict[str, T], dict[str, str]]:
    """Opens datasets by name, in alphabetical order; one that cannot be opened does not stop the others.

    Args:
        names: as models name their datasets; what is no text is left out.
        open_one: opens one.

    Returns:
        What was opened, and the reasons for what was not, by name.
    """
    opened, left_out = {}, {}
    for name in sorted({name for name in names if isinstance(name, str)}):
        try:
            opened[name] = open_one(name)
        except ZooError as error:
            left_out[name] = str(error)
    return opened, left_out


@dataclass(frozen=True, eq=False)
class JointData:
    """What is known of a zoo's models besides their weights, row by row.

    Attributes:
        split: runs for training, validation and test.
        datasets: features of the datasets, by number.
        numbers: number of each model's dataset, -1 if it is not known or cannot be opened.
        result_names: names of the results that are known of training models.
        results: one column for each name, NaN where a value is missing.
        held_out: numbers of the datasets whose models are not trained on.
        left_out: datasets that cannot be opened, with the reason.
    """

    split: Split
    datasets: tuple[DatasetFeatures, ...]
    numbers: Int[np.ndarray, "models"]
    result_names: tuple[str, ...]
    results: Float[np.ndarray, "models results"]
    held_out: tuple[int, ...]
    left_out: Mapping[str, str]

    @property
    def train(self) -> Int[np.ndarray, "models"]:
        """Rows to train on."""
        return self._seen(self.split.train)

    @property
    def validation(self) -> Int[np.ndarray, "models"]:
        """Rows to validate on, of datasets that are trained on."""
        return self._seen(self.split.validation)

    def _seen(self, rows: np.ndarray) -> np.ndarray:
        return rows[~np.isin(self.numbers[rows], self.held_out)]


@dataclass(frozen=True)
class JointBatches:
    """Endless micro-batches of triplets; see `weightspace.training.loop.Batches`.

    All models of a dataset see the same draw of its images in a step, on all processes, so that it is embedded once.
    Of its results, each model states one or more at random: later queries will state some of them, too.
    """

    views: ViewBatches
    data: JointData
    orders: StepOrders
    images: int

    def __call__(self, start: int, process: int, processes: int) -> Iterator[Batch]:
        """Yields the micro-batches of one process from number ``start`` on."""
        for batch in self.views(start, process, processes):
            inputs = {name: value for name, value in batch.inputs.items() if name != "views"}
            results = torch.from_numpy(self.data.results[batch.rows]).float()
            stated = stated_results(results, seeded_generator(self.views.seed, batch.number, process))
            inputs |= {"results": results, "stated": stated}
            numbers, index = np.unique(self.data.numbers[batch.rows], return_inverse=True)
            unknown = int((numbers < 0).sum())
            if len(numbers) > unknown:
                ids = torch.from_numpy(numbers[unknown:])
                inputs |= self._images(ids, batch.number)
                inputs |= {"dataset_index": torch.from_numpy(index) - unknown, "dataset_ids": ids}
            yield replace(batch, inputs=inputs)

    def _images(self, numbers: Int[Tensor, " datasets"], step: int) -> dict[str, Tensor]:
        """Draws images of datasets, with replacement, each by a generator of its own."""
        features, labels, orders = [], [], []
        for number in numbers.tolist():
            dataset, generator = self.data.datasets[number], seeded_generator(self.views.seed, step, number)
            chosen = torch.randint(len(dataset.labels), (self.images,), generator=generator)
            features.append(dataset.features[chosen])
            labels.append(dataset.labels[chosen])
            orders.append(self.orders.order(step, number))
        renumbered = renumbered_labels(torch.stack(labels), torch.stack(orders))
        return {"dataset_features": torch.stack(features), "dataset_labels": renumbered}


def stated_results(
    results: Float[Tensor, "batch results"], generator: torch.Generator
) -> Bool[Tensor, "batch results"]:
    """Draws what each row states: a subset of its known results, every size equally likely, none empty if avoidable."""
    known = results.isfinite()
    counts = known.sum(1, keepdim=True)
    sizes = (torch.rand(len(results), 1, generator=generator) * counts).floor() + 1
    keys = torch.rand(results.shape, generator=generator).masked_fill(~known, 2.0)
    return known & (keys.argsort(1).argsort(1) < sizes)
