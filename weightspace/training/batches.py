"""Training batches of weight tokens: models drawn from a zoo, each seen in one or more augmented views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weightspace.errors import ZooError
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.pooling import relative_depths
from weightspace.schema import Architecture
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.views import Augmentation, corrupt, permuted_views, window_starts

VIEWS = 2
_BLOCK_BYTES = 256 * 2**20


def seeded_generator(*seeds: int) -> torch.Generator:
    """Makes a generator that follows from all of the numbers: any micro-batch can be drawn without the others."""
    state = np.random.SeedSequence([int(seed) for seed in seeds]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


@dataclass(frozen=True, eq=False)
class BatchPart:
    """The models of a batch that share an architecture and are there with all their tokens.

    Attributes:
        architecture: their architecture.
        rows: their rows in the zoo, once for each view.
        places: their numbers in the batch, in the same order.
        flat: the weights that each of these views shows, before erasing and noise.
    """

    architecture: Architecture
    rows: Int[np.ndarray, "views_models"]
    places: Int[Tensor, " views_models"]
    flat: Float[Tensor, "views_models params"]


@dataclass(frozen=True, eq=False)
class ViewBatch:
    """Views of models: first one of each model and then, in the same order, the next one.

    Attributes:
        inputs: arguments of `WeightAutoencoderModel.forward`.
        parts: what the behaviour loss needs, one entry an architecture.
        number: running number of the micro-batch.
        rows: rows of the models in the zoo.
    """

    inputs: dict[str, Any]
    parts: list[BatchPart]
    number: int
    rows: Int[np.ndarray, "models"]


@dataclass(frozen=True)
class ViewBatches:
    """Endless micro-batches over the ``rows`` of a zoo; see `weightspace.training.loop.Batches`.

    Rows are shuffled within blocks that fit a fixed number of bytes, and blocks are shuffled too, so that memory is
    bounded however large the zoo is.

    Attributes:
        zoo: where the models are.
        rows: those to train on.
        extractor: turns weights into inputs.
        augmentation: how views differ from the models.
        batch_size: models a process and micro-batch.
        window: tokens a view has at most.
        seed: of order, permutations and augmentations.
        views: views a model.
        change: what else is done to flat weights, given with their architecture, their rows and the number of the
            micro-batch.
    """

    zoo: Zoo
    rows: Int[np.ndarray, "models"]
    extractor: WeightFeatureExtractor
    augmentation: Augmentation
    batch_size: int
    window: int
    seed: int
    views: int = VIEWS
    change: Callable[[Tensor, Architecture, np.ndarray, int], Tensor] | None = None

    def __call__(self, start: int, process: int, processes: int) -> Iterator[ViewBatch]:
        """Yields the micro-batches of one process from number ``start`` on."""
        together = self.batch_size * processes
        if len(self.rows) < processes:
            raise ZooError(
                f"{self.zoo.location}: {len(self.rows)} training models for {processes} processes; use fewer"
            )
        number = 0
        held: dict[int, tuple[Architecture, Tensor]] = {}
        for epoch in range(2**62):
            for block in self._blocks(epoch):
                order = np.random.default_rng([self.seed, epoch, int(block[0])]).permutation(block)
                batches = [order[i : i + together] for i in range(0, len(order), together)]
                # A short last batch would change the number of negatives: it is left out unless it is the only one.
                batches = [batch for batch in batches if len(batch) == together] or batches[:1]
                for batch in batches:
                    if number >= start:
                        # A zoo of one block is read once, and not in every epoch again.
                        held = held if int(block[0]) in held else self._read(block)
                        yield self._batch(batch[process::processes], held, number, process)
                    number += 1

    def _blocks(self, epoch: int) -> list[Int[np.ndarray, "models"]]:
        sizes = self.zoo.index["size"].to_numpy()[self.rows]
        numbers = (np.cumsum(sizes) - 1) // _BLOCK_BYTES
        blocks = np.split(self.rows, np.flatnonzero(np.diff(numbers)) + 1)
        return [blocks[i] for i in np.random.default_rng([self.seed, epoch]).permutation(len(blocks))]

    def _read(self, block: Int[np.ndarray, "models"]) -> dict[int, tuple[Architecture, Tensor]]:
        held: dict[int, tuple[Architecture, Tensor]] = {}
        for batch in self.zoo.batches(block):
            held |= {int(row): (batch.architecture, flat) for row, flat in zip(batch.rows, batch.flat, strict=True)}
        return held

    def _batch(
        self, rows: np.ndarray, held: dict[int, tuple[Architecture, Tensor]], number: int, process: int
    ) -> ViewBatch:
        generator = seeded_generator(self.seed, number, process)
        members: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            members.setdefault(id(held[int(row)][0]), []).append(place)
        pieces, parts = [], []
        for places in members.values():
            architecture = held[int(rows[places[0]])][0]
            flat = torch.stack([held[int(rows[place])][1] for place in places])
            if self.change is not None:
                flat = self.change(flat, architecture, rows[places], number)
            if self.augmentation.permute:
                flat = permuted_views(flat, architecture, self.views, generator)
            else:
                flat = flat.repeat(self.views, 1)
            target = torch.cat([torch.tensor(places) + view * len(rows) for view in range(self.views)])
            piece = self._piece(flat, architecture, target, generator)
            pieces.append(piece)
            if piece.whole:
                parts.append(BatchPart(architecture, np.tile(rows[places], self.views), target, flat))
        return ViewBatch({**_assembled(pieces, self.views * len(rows)), "views": self.views}, parts, number, rows)

    def _piece(self, flat: Tensor, architecture: Architecture, places: Tensor, generator: torch.Generator) -> _Piece:
        features = self.extractor.batch(flat, architecture)
        labels, mask, positions = features["weight_values"], features["weight_mask"], features["position_ids"]
        depths = relative_depths(positions, features["attention_mask"])
        links = features.get("weight_links")
        whole = labels.shape[1] <= self.window
        if not whole:
            starts = torch.tensor(window_starts([labels.shape[1]] * len(labels), self.window, generator))
            index = starts.unsqueeze(1) + torch.arange(self.window)
            rows = torch.arange(len(labels)).unsqueeze(1)
            labels, mask, positions, depths = (value[rows, index] for value in (labels, mask, positions, depths))
            if links is not None:
                links = links[rows, index] - starts.view(-1, 1, 1)
                links = links.masked_fill((links < 1) | (links > self.window), 0)
        values = corrupt(labels, mask, self.augmentation, generator)
        return _Piece(places, values, labels, mask, positions, depths, links, whole)


@dataclass(frozen=True, eq=False)
class _Piece:
    places: Int[Tensor, " batch"]
    values: Float[Tensor, "batch n d"]
    labels: Float[Tensor, "batch n d"]
    mask: Bool[Tensor, "batch n d"]
    positions: Int[Tensor, "batch n 3"]
    depths: Float[Tensor, "batch n"]
    links: Int[Tensor, "batch n d"] | None
    whole: bool


def _assembled(pieces: list[_Piece], count: int) -> dict[str, Any]:
    longest = max(piece.values.shape[1] for piece in pieces)

    def gathered(field: str) -> Tensor:
        first = getattr(pieces[0], field)
        out = first.new_zeros(count, longest, *first.shape[2:])
        for piece in pieces:
            out[piece.places, : piece.values.shape[1]] = getattr(piece, field)
        return out

    wired = {} if pieces[0].links is None else {"weight_links": gathered("links")}
    attention = torch.zeros(count, longest, dtype=torch.bool)
    for piece in pieces:
        attention[piece.places, : piece.values.shape[1]] = True
    return {
        "weight_values": gathered("values"),
        "weight_mask": gathered("mask"),
        "position_ids": gathered("positions"),
        "attention_mask": attention,
        "depths": gathered("depths"),
        "labels": gathered("labels"),
        **wired,
    }
