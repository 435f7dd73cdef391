"""What priors are trained on: a zoo's models in one neuron order, as latents, and what is known of each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from weightspace.data.features import dataset_features
from weightspace.data.image_encoders import DEFAULT_ENCODER, open_image_encoder
from weightspace.errors import ZooError
from weightspace.models.codec import LatentCodec
from weightspace.models.joint.modeling_joint import JointModel, unit
from weightspace.networks.alignment import align
from weightspace.schema import Architecture
from weightspace.training.batches import BatchPart, padded
from weightspace.training.classes import orders_of_models, output_count, renumbered_labels, reordered, reordered_outputs
from weightspace.training.joint_data import opened_datasets, stated_results
from weightspace.zoo.dataset import Zoo


@dataclass(frozen=True, eq=False)
class AlignedModels:
    """Models of a zoo in one neuron order for each architecture, with their latents.

    Attributes:
        rows: their rows in the zoo, architecture by architecture.
        parts: architecture, aligned weights and latents of the models that share it.
        codec: what the latents are of.
        references: what each architecture's models were aligned to: one model a dataset, and one for any other.
    """

    rows: Int[np.ndarray, "models"]
    parts: list[_Part]
    codec: LatentCodec
    references: dict[tuple[str, str | None], Tensor]

    @classmethod
    def of(
        cls,
        zoo: Zoo,
        rows: Int[np.ndarray, "models"],
        codec: LatentCodec,
        references: dict[tuple[str, str | None], Tensor] | None = None,
    ) -> AlignedModels:
        """Reads models, aligns and encodes them.

        Args:
            zoo: where they are.
            rows: which they are.
            codec: whose latents they get.
            references: of other models that these are to be aligned with; architectures without one are left out. New
                ones are chosen if left out.

        Raises:
            ZooError: no model is left.
        """
        headers, names = zoo.index["header"].to_numpy(), zoo.index["dataset"].to_numpy()
        given = references is not None
        references = {} if references is None else references
        order, parts = [], []
        for header, architecture in zoo.architectures.items():
            own = rows[headers[rows] == header]
            if not len(own) or (given and (header, None) not in references):
                continue
            flat = zoo.flat(own).float()
            if not given:
                references |= _references(zoo, own, flat, header, architecture)
            for name in dict.fromkeys(names[own]):
                members = names[own] == name if isinstance(name, str) else np.array([n is None for n in names[own]])
                reference = references.get((header, name), references[header, None])
                flat[members] = align(flat[members], reference, architecture)[0]
            order.append(own)
            parts.append(_Part(architecture, flat, codec.encode(flat, architecture)))
        if not order:
            raise ZooError(f"{zoo.location}: no models to train on are left; hold out fewer datasets or runs")
        return cls(np.concatenate(order), parts, codec, references)

    def tokens(self) -> Float[Tensor, "tokens latent"]:
        """All latents, token by token."""
        return torch.cat([part.latents.flatten(0, 1) for part in self.parts])

    def batch(
        self, places: Int[np.ndarray, "batch"], orders: Int[Tensor, "batch classes"]
    ) -> tuple[dict[str, Tensor], list[BatchPart]]:
        """Puts models together, padded to the longest; and tells which of them share an architecture.

        Args:
            places: where the models are in ``rows``.
            orders: which class each output of a model is to stand for, see `reordered_outputs`.
        """
        ends, numbers = self._parts_of(places)
        pieces: list[tuple[Tensor, dict[str, Tensor]]] = []
        parts = []
        for number in np.unique(numbers):
            part, where = self.parts[number], np.flatnonzero(numbers == number)
            inside = torch.from_numpy(places[where] - (ends[number] - len(part.flat)))
            flat, latents = part.renumbered(inside, orders[where], self.codec)
            target = torch.from_numpy(where)
            shared = self.codec.extractor.layout(part.architecture, len(where))
            pieces.append((target, {"latents": latents, **shared}))
            parts.append(BatchPart(part.architecture, self.rows[places[where]], target, flat))
        return padded(pieces, len(places)), parts

    def outputs(self, places: Int[np.ndarray, "batch"]) -> Int[Tensor, " batch"]:
        """Counts the outputs of models; 0 where they are not known."""
        counts = torch.tensor([output_count(part.architecture) for part in self.parts])
        return counts[torch.from_numpy(self._parts_of(places)[1])]

    def _parts_of(self, places: Int[np.ndarray, "batch"]) -> tuple[Int[np.ndarray, "parts"], Int[np.ndarray, "batch"]]:
        """Where each part ends, and which of them models are in."""
        ends = np.cumsum([len(part.flat) for part in self.parts])
        return ends, np.searchsorted(ends, places, side="right")


@dataclass(frozen=True, eq=False)
class _Part:
    architecture: Architecture
    flat: Float[Tensor, "models params"]
    latents: Float[Tensor, "models n latent"]

    def renumbered(
        self, places: Int[Tensor, " members"], orders: Int[Tensor, "members classes"], codec: LatentCodec
    ) -> tuple[Float[Tensor, "members params"], Float[Tensor, "members n latent"]]:
        """Weights and latents of models with their outputs in an order."""
        flat, latents = self.flat[places], self.latents[places]
        moved = reordered(orders)
        if len(moved):
            flat = reordered_outputs(flat, self.architecture, orders)
            latents[moved] = codec.encode(flat[moved], self.architecture)
        return flat, latents


def _references(
    zoo: Zoo, rows: Int[np.ndarray, "models"], flat: Tensor, header: str, architecture: Architecture
) -> dict[tuple[str, str | None], Tensor]:
    """The best model of all, and the best of each dataset in its order; the first where nothing says which is best."""
    known = zoo.index["test_accuracy"].to_numpy(dtype=np.float64)[rows] if "test_accuracy" in zoo.index else None
    scores = np.zeros(len(rows)) if known is None else np.nan_to_num(known, nan=-np.inf)
    names = zoo.index["dataset"].to_numpy()[rows]
    best = flat[int(scores.argmax())]
    references: dict[tuple[str, str | None], Tensor] = {(header, None): best}
    for name in sorted({name for name in names if isinstance(name, str)}):
        own = np.flatnonzero(names == name)
        first = int(own[scores[own].argmax()])
        references[header, name] = align(flat[[first]], best, architecture)[0][0]
    return references


@dataclass(frozen=True, eq=False)
class Conditions:
    """What is known of each of a zoo's models, and what a joint model sees of their datasets.

    Attributes:
        dataset: number of each model's dataset; 0 for none, which has neither images nor classes.
        results: one column a result of the joint model, NaN where a value is missing.
        activation: number of each model's activation; see `PriorCondition`.
        activations: names of activations, from number 1 on.
        states: of each dataset's images; see `DatasetTower.image_states`.
        labels: class of each image.
        shares: 1 where there is an image, 0 elsewhere.
        counts: classes of each dataset.
        joint: describes classes and embeds results.
        left_out: datasets that cannot be opened, with the reason; their models have none.
    """

    dataset: Int[Tensor, " models"]
    results: Float[Tensor, "models results"]
    activation: Int[Tensor, " models"]
    activations: list[str]
    states: Float[Tensor, "datasets images width"]
    labels: Int[Tensor, "datasets images"]
    shares: Float[Tensor, "datasets images"]
    counts: Int[Tensor, " datasets"]
    joint: JointModel
    left_out: Mapping[str, str]

    @classmethod
    @torch.no_grad()
    def of(cls, zoo: Zoo, joint: JointModel, *, allow_pickle: bool = False) -> Conditions:
        """Gathers what is known of a zoo.

        Args:
            zoo: the zoo.
            joint: the joint model, on the CPU.
            allow_pickle: read plain tensors from a pickle where the image encoder has no safetensors file.

        Raises:
            WeightspaceError: the image encoder or all datasets cannot be opened, or it is another one by now.
        """
        tower, wanted = joint.dataset_model, joint.result_model.config.results
        columns = [
            zoo.index[name].to_numpy(dtype=np.float64) if name in zoo.index else np.full(len(zoo.index), np.nan)
            for name in wanted
        ]
        encoder = open_image_encoder(tower.config.image_encoder or DEFAULT_ENCODER, allow_pickle=allow_pickle)
        joint.ensure_image_encoder(encoder.name, encoder.digest)
        names = zoo.index["dataset"].to_numpy()
        opened, left_out = opened_datasets(
            names, lambda name: dataset_features(name, encoder, images=tower.config.sample)
        )
        if left_out and not opened:
            reason = next(iter(left_out.values()))
            raise ZooError(f"{zoo.location}: no dataset can be opened ({reason}); a prior needs one")
        datasets, none = list(opened.values()), torch.zeros(1)
        seen = [tower.image_states(dataset.features.unsqueeze(0))[0] for dataset in datasets]
        numbers = {name: number for number, name in enumerate(opened, start=1)}
        used = [None if family is None else str(family.activation) for family in zoo.families]
        activations = sorted({name for name in used if name is not None})
        return cls(
            dataset=torch.tensor([numbers.get(name, 0) for name in names]),
            results=torch.from_numpy(np.stack(columns, 1)).float(),
            activation=torch.tensor([0 if name is None else 1 + activations.index(name) for name in used]),
            activations=activations,
            states=pad_sequence([torch.zeros(1, tower.image_in.out_features), *seen], batch_first=True),
            labels=pad_sequence([none.long(), *(one.labels for one in datasets)], batch_first=True),
            shares=pad_sequence([none, *(torch.ones(len(one.labels)) for one in datasets)], batch_first=True),
            counts=torch.tensor([0, *(one.classes for one in datasets)]),
            joint=joint,
            left_out=left_out,
        )

    @property
    def classes(self) -> int:
        """Classes of the dataset that has most."""
        return max(1, int(self.counts.max()))

    def orders(
        self,
        rows: Int[np.ndarray, "batch"],
        outputs: Int[Tensor, " batch"],
        share: float,
        generator: torch.Generator,
    ) -> Int[Tensor, "batch classes"]:
        """Draws for a share of the models of ``rows`` in which order their classes come; see `orders_of_models`."""
        counts = self.counts[self.dataset[rows]]
        return orders_of_models(counts, outputs, self.classes, share, generator)

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
        shares = self.shares[numbers].exponential_(generator=generator) * self.shares[numbers]
        labels = renumbered_labels(self.labels[numbers], orders)
        moments = self.joint.dataset_model.class_moments(self.states[numbers], labels, shares)
        missing = self.classes - moments.shape[1]
        return {
            "class_features": F.pad(moments, (0, 0, 0, missing)) * kept[0].unsqueeze(-1),
            "result_embeds": embedded * kept[1],
            "activation": self.activation[rows],
        }
