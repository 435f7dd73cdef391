"""What is known of a zoo's models besides their weights: what priors are told while they learn to sample them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from weightspace.data.features import DatasetFeatures, features_of_datasets
from weightspace.data.image_encoders import open_image_encoder
from weightspace.models.joint.configuration_joint import ResultTowerConfig
from weightspace.models.joint.modeling_joint import JointModel, unit
from weightspace.training.joint import stated_results
from weightspace.zoo.dataset import Zoo


@dataclass(frozen=True, eq=False)
class SeenDatasets:
    """What a joint model sees of datasets; number 0 is none, without images.

    Attributes:
        states: of each image; see `DatasetTower.image_states`.
        labels: its class.
        shares: 1 where there is an image, 0 elsewhere.
        counts: classes of each dataset.
    """

    states: Float[Tensor, "datasets images width"]
    labels: Int[Tensor, "datasets images"]
    shares: Float[Tensor, "datasets images"]
    counts: Int[Tensor, " datasets"]

    @classmethod
    @torch.no_grad()
    def of(cls, datasets: Sequence[DatasetFeatures], joint: JointModel) -> SeenDatasets:
        """Looks at datasets, which get the numbers from 1 on."""
        for dataset in datasets:
            joint.ensure_image_encoder(dataset.encoder, dataset.encoder_digest)
        tower, none = joint.dataset_model, torch.zeros(1)
        seen = [tower.image_states(dataset.features.unsqueeze(0))[0] for dataset in datasets]
        return cls(
            pad_sequence([torch.zeros(1, tower.image_in.out_features), *seen], batch_first=True),
            pad_sequence([none.long(), *(dataset.labels for dataset in datasets)], batch_first=True),
            pad_sequence([none, *(torch.ones(len(dataset.labels)) for dataset in datasets)], batch_first=True),
            torch.tensor([0, *(dataset.classes for dataset in datasets)]),
        )


@dataclass(frozen=True, eq=False)
class Conditions:
    """What is known of each of a zoo's models.

    Attributes:
        dataset: number of its dataset; 0 where there is none.
        results: one column a result of the joint model, NaN where a value is missing.
        activation: number of its activation; see `PriorCondition`.
        activations: names of activations, from number 1 on.
        datasets: see `SeenDatasets`.
        joint: describes classes and embeds results.
    """

    dataset: Int[Tensor, " models"]
    results: Float[Tensor, "models results"]
    activation: Int[Tensor, " models"]
    activations: list[str]
    datasets: SeenDatasets
    joint: JointModel

    @classmethod
    def of(cls, zoo: Zoo, joint: JointModel, trained: Mapping[str, Any], *, allow_pickle: bool = False) -> Conditions:
        """Gathers what is known of a zoo.

        Args:
            zoo: the zoo.
            joint: the joint model, on the CPU.
            trained: the settings that it was trained with.
            allow_pickle: read plain tensors from a pickle where the image encoder has no safetensors file.

        Raises:
            WeightspaceError: a dataset or the image encoder cannot be opened, or it is another one by now.
        """
        config = joint.config.result_config
        assert isinstance(config, ResultTowerConfig)
        columns = [
            zoo.index[name].to_numpy(dtype=np.float64) if name in zoo.index else np.full(len(zoo), np.nan)
            for name in config.results
        ]
        names = zoo.index["dataset"].to_numpy()
        known = sorted({name for name in names if isinstance(name, str)})
        numbers = {name: number for number, name in enumerate(known, start=1)}
        encoder = open_image_encoder(trained["image_encoder"], allow_pickle=allow_pickle)
        datasets = features_of_datasets(known, encoder, images=trained["sample"])
        used = [None if family is None else str(family.activation) for family in zoo.families]
        activations = sorted({name for name in used if name is not None})
        return cls(
            torch.tensor([numbers.get(name, 0) for name in names]),
            torch.from_numpy(np.stack(columns, 1)).float(),
            torch.tensor([0 if name is None else 1 + activations.index(name) for name in used]),
            activations,
            SeenDatasets.of(datasets, joint),
            joint,
        )

    @property
    def classes(self) -> int:
        """Classes of the dataset that has most."""
        return max(1, int(self.datasets.counts.max()))

    def orders(
        self,
        rows: Int[np.ndarray, "batch"],
        outputs: Int[Tensor, " batch"],
        share: float,
        generator: torch.Generator,
    ) -> Int[Tensor, "batch classes"]:
        """Draws for a share of the models in which order the classes of their datasets come.

        The others keep theirs, and so do models that have not as many outputs as there are classes.

        Args:
            rows: of the models in the zoo.
            outputs: how many each of them has.
            share: of models whose order is drawn.
            generator: draws.
        """
        counts, classes = self.datasets.counts[self.dataset[rows]], torch.arange(self.classes)
        absent = classes >= counts.unsqueeze(1)
        drawn = (torch.rand(absent.shape, generator=generator) + absent * (1 + classes)).argsort(1)
        chosen = (torch.rand(len(rows), generator=generator) < share) & (counts == outputs)
        return torch.where(chosen.unsqueeze(1), drawn, classes)

    @torch.no_grad()
    def asked(
        self,
        rows: Int[np.ndarray, "batch"],
        orders: Int[Tensor, "batch classes"],
        drop: float,
        generator: torch.Generator,
    ) -> dict[str, Float[Tensor, "batch ..."]]:
        """States some of what is known of models, as later questions will; the arguments of a prior's forward.

        Every model sees a sample of its dataset of its own: images count with random shares (the Bayesian bootstrap of
        Rubin, 1981), for a prior that always saw the same would know the training datasets by their sample.

        Args:
            rows: of the models in the zoo.
            orders: see `orders`.
            drop: share of models whose dataset, and of those whose results, are kept back, each by itself.
            generator: draws.
        """
        results, numbers = self.results[rows], self.dataset[rows]
        stated = stated_results(results, generator)
        embedded = unit(self.joint.get_result_features(results, stated)) * stated.any(1, keepdim=True)
        kept = torch.rand(2, len(rows), 1, generator=generator) >= drop
        seen = self.datasets
        shares = seen.shares[numbers].exponential_(generator=generator) * seen.shares[numbers]
        places = orders.argsort(1).gather(1, seen.labels[numbers])
        moments = self.joint.dataset_model.class_moments(seen.states[numbers], places, shares)
        missing = self.classes - moments.shape[1]
        return {
            "class_features": F.pad(moments, (0, 0, 0, missing)) * kept[0].unsqueeze(-1),
            "result_embeds": embedded * kept[1],
            "activation": self.activation[rows],
        }
