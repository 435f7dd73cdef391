"""Training batches of weight tokens: models drawn from a zoo, each seen in one or more augmented views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
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
    """The models of a batch that share an architecture, with all their tokens.

    Attributes:
        architecture: their architecture.
        rows: their rows in the zoo, once for each view.
        places: their numbers in the batch, in the same order.
        flat: the weights that each of these views shows, before erasing and noise.
    """

    architecture: Architecture
    rows: Int[np.ndarray, "part"]
    places: Int[Tensor, " part"]
    flat: Float[Tensor, "part params"]


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch.

    Attributes:
        inputs: arguments of the model's forward.
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
    """Endless micro-batches of augmented views of the ``rows`` of a zoo; see `weightspace.training.loop.Batches`.

    The batch holds the first view of each model and then, in the same order, the next one.

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

    def __call__(self, start: int, process: int, processes: int) -> Iterator[Batch]:
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
    ) -> Batch:
        generator = seeded_generator(self.seed, number, process)
        members: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            members.setdefault(id(held[int(row)][0]), []).append(place)
        pieces: list[tuple[Tensor, dict[str, Tensor]]] = []
        parts = []
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
            pieces.append((target, self._inputs(flat, architecture, generator)))
            if self.extractor.token_count(architecture) <= self.window:
                parts.append(BatchPart(architecture, np.tile(rows[places], self.views), target, flat))
        inputs = padded(pieces, self.views * len(rows))
        return Batch({**inputs, "views": self.views}, parts, number, rows)

    def _inputs(self, flat: Tensor, architecture: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
        """Inputs of models of one architecture: all tokens, or a random window of them."""
        inputs: dict[str, Tensor] = dict(self.extractor.batch(flat, architecture))
        inputs["labels"] = inputs.pop("weight_values")
        inputs["depths"] = relative_depths(inputs["position_ids"], inputs["attention_mask"])
        count, length = inputs["labels"].shape[:2]
        if length > self.window:
            starts = torch.tensor(window_starts([length] * count, self.window, generator))
            index = starts.unsqueeze(1) + torch.arange(self.window)
            inputs = {name: value[torch.arange(count).unsqueeze(1), index] for name, value in inputs.items()}
            if "weight_links" in inputs:
                links = inputs["weight_links"] - starts.view(-1, 1, 1)
                inputs["weight_links"] = links.masked_fill((links < 1) | (links > self.window), 0)
        inputs["weight_values"] = corrupt(inputs["labels"], inputs["weight_mask"], self.augmentation, generator)
        return inputs


def padded(pieces: Sequence[tuple[Tensor, Mapping[str, Tensor]]], count: int) -> dict[str, Tensor]:
    """Puts a batch together from the inputs of some of its rows each, padded with zeros to the longest sequence.

    Args:
        pieces: places in the batch ``(piece,)``, and the inputs of these rows, ``(piece, n, ...)``.
        count: rows of the batch.
    """
    longest = max(next(iter(inputs.values())).shape[1] for _, inputs in pieces)
    batch: dict[str, Tensor] = {}
    for places, inputs in pieces:
        for name, values in inputs.items():
            whole = batch.setdefault(name, values.new_zeros(count, longest, *values.shape[2:]))
            whole[places, : values.shape[1]] = values
    return batch
