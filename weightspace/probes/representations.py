"""What a probe may look at: raw weights, their statistics, linear codes, or an encoder's embedding.

A representation hands a probe its feature matrix, for the models as they are and for the same models neuron-permuted;
what it learns from data (PCA) it learns from the training split alone.

Mixed architectures: each architecture has its own columns, which are zero for the models of the others, and an
indicator column for each architecture follows. One probe thus serves all of them: for a linear one this is a linear
map and an offset per architecture under one penalty.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from sklearn.decomposition import PCA, IncrementalPCA
from torch import Tensor

from weightspace.errors import SettingsError, ZooError
from weightspace.networks.permutation import permute, random_permutations
from weightspace.probes.statistics import CHUNK_ENTRIES, FLOAT32_MAX, weight_invariants, weight_statistics
from weightspace.schema import Architecture
from weightspace.zoo.dataset import ZooBatch

LARGEST_MATRIX = 2**28
"""Most entries of a feature matrix: 1 GiB in float32."""

_LOGGER = logging.getLogger(__name__)


def fit_codes(
    flat: Iterable[Shaped[np.ndarray, "_chunk params"]], size: int, *, incremental: bool = False
) -> PCA | IncrementalPCA:
    """Fits PCA of the flat weights of one architecture: whole, or chunk by chunk in bounded memory.

    Args:
        flat: weights of the training models, in chunks of any length.
        size: numbers a code; at most as many as models and parameters, fewer are used where it is larger.
        incremental: streams the chunks through ``IncrementalPCA``.

    Returns:
        The fitted estimator; its ``inverse_transform`` gives weights back, so that reconstructions compare at the same
        code size.

    Raises:
        ZooError: there are fewer than two models.
    """
    if size < 1:
        raise SettingsError(f"size: {size} is no code size; use 1 or more")

    def bounded(chunk: np.ndarray) -> int:
        if len(chunk) < 2:
            raise ZooError(f"PCA: {len(chunk)} training models of one architecture are too few; add at least 2")
        return min(size, *chunk.shape)

    if not incremental:
        whole = np.concatenate(list(flat))
        return PCA(bounded(whole), random_state=0).fit(whole)
    codes = None
    # A chunk of twice the code size costs least a model: each fit decomposes the chunk and the components so far.
    for chunk in _rechunked(flat, max(2 * size, 64)):
        if codes is None:
            codes = IncrementalPCA(bounded(chunk))
        codes.partial_fit(chunk)
    if codes is None:
        raise ZooError("PCA: there is no model to fit on; add at least 2 training models of this architecture")
    return codes


def _rechunked(chunks: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Cuts a stream anew into chunks of ``length`` to ``2 * length - 1`` rows; only a shorter stream gives fewer."""
    kept: np.ndarray | None = None
    for chunk in chunks:
        kept = chunk if kept is None else np.concatenate([kept, chunk])
        while len(kept) >= 2 * length:
            yield kept[:length]
            kept = kept[length:]
    if kept is not None and len(kept):
        yield kept


@runtime_checkable
class Representation(Protocol):
    """A way to describe models; ``fit`` sees the rows of the training split and nothing else."""

    def fit(self, train: Int[np.ndarray, "train"]) -> Features:
        """Learns from the training models, and describes all models."""
        ...


@dataclass(frozen=True)
class FeatureBlock:
    """Features of the models that share an architecture.

    Attributes:
        rows: which models of the zoo these are, by number.
        values: their features; a memory map will do.
        permuted: features of the same models neuron-permuted, or None where no symmetry is known.
    """

    rows: Int[np.ndarray, "models"]
    values: Shaped[np.ndarray, "_models _features"]
    permuted: Shaped[np.ndarray, "_models _features"] | None = None

    def __post_init__(self) -> None:
        for name, values in (("features", self.values), ("permuted features", self.permuted)):
            if values is None:
                continue
            if values.ndim != 2 or len(values) != len(self.rows) or values.shape[1] != self.values.shape[1]:
                expected = (len(self.rows), self.values.shape[-1])
                raise ZooError(f"{name}: shape {values.shape} for {expected}; give one row of features a model")
            bad = int((~np.isfinite(values).all(axis=1)).sum())
            if bad:
                raise ZooError(f"{name}: NaN or Inf for {bad} of {len(values)} models; leave these models out")


class Features:
    """Feature matrices of all models of a zoo, architectures side by side; a representation that needs no fitting.

    Args:
        blocks: one for each architecture; together they hold the models 0, 1, 2, ... once each.
        shared: whether the columns mean the same in every block (an encoder's embedding) and are not set side by side.
    """

    def __init__(self, blocks: Sequence[FeatureBlock], *, shared: bool = False) -> None:
        """Checks that the blocks cover the models, and lays out the columns."""
        self.blocks = tuple(blocks)
        rows = np.concatenate([block.rows for block in self.blocks]) if self.blocks else np.zeros(0, dtype=int)
        if not np.array_equal(np.sort(rows), np.arange(len(rows))):
            raise ZooError(
                f"features: {len(rows)} rows that are not 0 to {len(rows) - 1} once each; give every model once"
            )
        self._owner = np.empty(len(rows), dtype=int)
        self._place = np.empty(len(rows), dtype=int)
        for number, block in enumerate(self.blocks):
            self._owner[block.rows] = number
            self._place[block.rows] = np.arange(len(block.rows))
        widths = [block.values.shape[1] for block in self.blocks]
        if shared and len(set(widths)) > 1:
            raise ZooError(f"features: widths {widths} differ between architectures; embed them with one encoder")
        self.dimensions = max(widths, default=0)
        self._starts = np.zeros(len(widths), dtype=int) if shared else np.cumsum([0, *widths[:-1]])
        self._width = self.dimensions if shared else sum(widths)

    def fit(self, train: Int[np.ndarray, "train"]) -> Features:
        """Returns itself."""
        return self

    def features(self, rows: Int[np.ndarray, "rows"]) -> Float[np.ndarray, "rows features"]:
        """Returns float32 features, zero in the columns of other architectures."""
        return self._assembled(rows, [block.values for block in self.blocks])

    def permuted_features(self, rows: Int[np.ndarray, "rows"]) -> Float[np.ndarray, "rows features"]:
        """Returns the same of the neuron-permuted models; NaN for models without a known symmetry."""
        return self._assembled(rows, [block.permuted for block in self.blocks])

    def _assembled(self, rows: np.ndarray, sources: Sequence[np.ndarray | None]) -> np.ndarray:
        indicators = len(self.blocks) if len(self.blocks) > 1 else 0
        matrix = np.zeros((len(rows), self._width + indicators), dtype=np.float32)
        for number, source in enumerate(sources):
            here = np.flatnonzero(self._owner[rows] == number)
            if source is None:
                matrix[here] = np.nan
                continue
            columns = slice(self._starts[number], self._starts[number] + source.shape[1])
            matrix[here, columns] = np.clip(source[self._place[rows[here]]], -FLOAT32_MAX, FLOAT32_MAX)
            if indicators:
                matrix[here, self._width + number] = 1
        return matrix


@dataclass(frozen=True)
class WeightBlock:
    """Flat weights of the models that share an architecture.

    Attributes:
        architecture: of all of them.
        rows: which models of the zoo these are, by number.
        flat: their weights.
        permuted: the same weights neuron-permuted, or None where no symmetry is known.
    """

    architecture: Architecture
    rows: Int[np.ndarray, "models"]
    flat: Float[Tensor, "models params"]
    permuted: Float[Tensor, "models params"] | None = None

    def described(self, describe: Callable[[Tensor], Tensor]) -> FeatureBlock:
        """Builds features by applying ``describe`` to the weights and to the permuted weights."""
        permuted = None if self.permuted is None else describe(self.permuted).numpy()
        return FeatureBlock(self.rows, describe(self.flat).numpy(), permuted)


class CodeFeatures:
    """PCA codes: components are fitted on the training models of each architecture at every ``fit``.

    Args:
        blocks: the weights.
        size: numbers a code.
        incremental: streams the training models through ``IncrementalPCA``.
    """

    def __init__(self, blocks: Sequence[WeightBlock], size: int, *, incremental: bool = False) -> None:
        """Remembers the weights."""
        self.blocks, self.size, self.incremental = tuple(blocks), size, incremental

    def fit(self, train: Int[np.ndarray, "train"]) -> Features:
        """Fits components on these models and encodes all; an architecture with one training model has no codes."""
        return Features([self._coded(block, train) for block in self.blocks])

    def _coded(self, block: WeightBlock, train: np.ndarray) -> FeatureBlock:
        known = np.flatnonzero(np.isin(block.rows, train))
        if len(known) < 2:
            return block.described(lambda flat: flat[:, :0])
        weights = block.flat.numpy()
        step = max(1, CHUNK_ENTRIES // max(1, weights.shape[1]))
        chunks = (weights[known[i : i + step]] for i in range(0, len(known), step))
        codes = fit_codes(chunks, self.size, incremental=self.incremental)
        return block.described(lambda flat: torch.from_numpy(codes.transform(flat.numpy())))


def collect_weights(batches: Iterable[ZooBatch], generator: torch.Generator) -> list[WeightBlock]:
    """Gathers the batches of a whole zoo into one block for each architecture, with a permuted copy of every model.

    Args:
        batches: as ``Zoo.batches`` gives them.
        generator: draws one random neuron permutation a model and group.
    """
    gathered: dict[tuple[object, object], list[ZooBatch]] = {}
    for batch in batches:
        # Not the digest: it is the same for any order of the layers, and flat vectors follow that order.
        gathered.setdefault((batch.architecture.tensors, batch.architecture.groups), []).append(batch)
    blocks = []
    for same in gathered.values():
        architecture, flat = same[0].architecture, torch.cat([batch.flat for batch in same])
        drawn = random_permutations(architecture, len(flat), generator) if architecture.groups else None
        permuted = None if drawn is None else permute(flat, drawn, architecture)
        blocks.append(WeightBlock(architecture, np.concatenate([batch.rows for batch in same]), flat, permuted))
    return blocks


def statistics_of_rows(
    batches: Iterable[ZooBatch], rows: Int[np.ndarray, "rows"]
) -> tuple[Float[np.ndarray, "rows stats"], bool]:
    """Describes models by s(W): tensor by tensor where all architectures have as many, else each in its own columns.

    Args:
        batches: of the rows, as ``Zoo.batches`` gives them.
        rows: ascending.

    Returns:
        The statistics, in the order of the rows, and whether columns mean the same for all of them.
    """
    parts = [(batch.rows, weight_statistics(batch.flat, batch.architecture).numpy()) for batch in batches]
    width = max(values.shape[1] for _, values in parts)
    matrix = np.zeros((len(rows), width))
    for members, values in parts:
        matrix[np.searchsorted(rows, members), : values.shape[1]] = values
    return matrix, all(values.shape[1] == width for _, values in parts)


def baselines(blocks: Sequence[WeightBlock], *, code_size: int = 64) -> dict[str, Representation]:
    """Builds the representations that an encoder is compared with, by the names that tables print.

    ``W`` (raw weights), ``s(W)`` (weight statistics), ``s(W)+invariants`` (the strongest), ``PCA``, ``IncrementalPCA``.
    ``W`` is left out, with a warning, where its matrix would have more than ``LARGEST_MATRIX`` entries.
    """

    def features(describe: Callable[[Tensor, Architecture], Tensor]) -> Features:
        def described(block: WeightBlock) -> FeatureBlock:
            return block.described(lambda flat: describe(flat, block.architecture))

        return Features([described(block) for block in blocks])

    def invariants(flat: Tensor, architecture: Architecture) -> Tensor:
        return torch.cat([weight_statistics(flat, architecture), weight_invariants(flat, architecture)], dim=1)

    entries = sum(len(block.rows) for block in blocks) * sum(block.architecture.numel for block in blocks)
    raw = {"W": features(lambda flat, architecture: flat)} if entries <= LARGEST_MATRIX else {}
    if not raw:
        _LOGGER.warning(
            "raw weights are left out of the probes: each of %d architectures has columns of its own, %.3g entries in "
            "all; probe models of fewer architectures to have them",
            len(blocks),
            entries,
        )
    return {
        **raw,
        "s(W)": features(weight_statistics),
        "s(W)+invariants": features(invariants),
        "PCA": CodeFeatures(blocks, code_size),
        "IncrementalPCA": CodeFeatures(blocks, code_size, incremental=True),
    }
