"""Models of a zoo in one neuron order, with their latents: what priors are trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.errors import ZooError
from weightspace.models.codec import LatentCodec
from weightspace.networks.alignment import align
from weightspace.schema import Architecture
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.views import output_group, reordered_outputs


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
    ) -> tuple[dict[str, Tensor], list[Members]]:
        """Puts models together, padded to the longest; and says which of them share an architecture.

        Args:
            places: where the models are in ``rows``.
            orders: which class each output of a model is to stand for, see `reordered_outputs`; in ascending order, the
                model stays as it is.
        """
        ends, numbers = self._parts_of(places)
        chosen = [(number, np.flatnonzero(numbers == number)) for number in np.unique(numbers)]
        longest = max(self.parts[number].latents.shape[1] for number, _ in chosen)
        inputs: dict[str, Tensor] = {}
        members = []
        for number, where in chosen:
            part = self.parts[number]
            inside = torch.from_numpy(places[where] - (ends[number] - len(part.flat)))
            flat, latents = part.renumbered(inside, orders[where], self.codec)
            shared = self.codec.extractor.places(part.architecture, len(where))
            for name, values in {"latents": latents, **shared}.items():
                whole = inputs.setdefault(name, values.new_zeros(len(places), longest, *values.shape[2:]))
                whole[where, : values.shape[1]] = values
            members.append(Members(part.architecture, torch.from_numpy(where), flat))
        return inputs, members

    def outputs(self, places: Int[np.ndarray, "batch"]) -> Int[Tensor, " batch"]:
        """Counts the outputs of models; 0 where they are not known."""
        groups = [output_group(part.architecture) for part in self.parts]
        counts = torch.tensor([0 if group is None else group.size for group in groups])
        return counts[torch.from_numpy(self._parts_of(places)[1])]

    def _parts_of(self, places: Int[np.ndarray, "batch"]) -> tuple[Int[np.ndarray, "parts"], Int[np.ndarray, "batch"]]:
        """Where each part ends, and which of them models are in."""
        ends = np.cumsum([len(part.flat) for part in self.parts])
        return ends, np.searchsorted(ends, places, side="right")


@dataclass(frozen=True, eq=False)
class Members:
    """The rows of a batch that share an architecture, and their weights."""

    architecture: Architecture
    places: Int[Tensor, " members"]
    flat: Float[Tensor, "members params"]


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
        moved = (orders != torch.arange(orders.shape[1])).any(1).nonzero().flatten()
        if len(moved):
            group = output_group(self.architecture)
            assert group is not None
            flat[moved] = reordered_outputs(flat[moved], self.architecture, orders[moved, : group.size])
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
