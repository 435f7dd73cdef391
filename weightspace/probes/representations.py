"""What a probe may look at: raw weights, their statistics, linear codes, or an encoder's embedding.

Two kinds of things stand here. ``weight_statistics`` and ``weight_invariants`` describe weights by numbers that do not
change when hidden neurons are reordered. Representations hand a probe its feature matrix, for the models as they are
and for the same models neuron-permuted; what they learn from data (PCA) they learn from the training split alone.

Mixed architectures: each architecture has its own columns, which are zero for the models of the others, and an
indicator column for each architecture follows. One probe thus serves all of them: for a linear one this is a linear
map and an offset per architecture under one penalty.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from sklearn.decomposition import PCA, IncrementalPCA
from torch import Tensor

from weightspace.errors import SettingsError, ZooError
from weightspace.networks.flat import unflatten
from weightspace.networks.permutation import permute, random_permutations
from weightspace.schema import Architecture

LARGEST_MATRIX = 2**28
"""Most entries of a feature matrix: 1 GiB in float32."""

PERCENTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
_LOGGER = logging.getLogger(__name__)
_NORM_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_SPECTRUM = 16
# Matrices whose smaller side is longer would take minutes a model.
_LARGEST_SPECTRUM = 1024
# Weights that are described at once: 32 MiB in float64.
_CHUNK_ENTRIES = 2**22
_FLOAT32_MAX = float(torch.finfo(torch.float32).max)


# --- numbers that describe weights -----------------------------------------------------------------------------------


def weight_statistics(
    flat: Float[Tensor, "models params"], architecture: Architecture
) -> Float[Tensor, "models stats"]:
    """Computes s(W): mean, variance and percentiles 1, 25, 50, 75, 99 of each tensor (Unterthiner et al., 2020).

    Seven numbers a tensor in the order of ``architecture.tensors``, so 14 for a layer of kernel and bias. They are
    computed in float64 from sorted weights: permuting neurons does not change a single bit of them.

    Raises:
        ArchitectureError: ``flat`` does not fit ``architecture``.
    """
    return _by_chunk(flat, architecture, _statistics)


def weight_invariants(
    flat: Float[Tensor, "models params"], architecture: Architecture
) -> Float[Tensor, "models stats"]:
    """Computes further numbers that neuron permutations leave alone, beside s(W).

    For each tensor skewness and excess kurtosis. For each tensor of two or more axes, read as a matrix (output
    channels, rest): its singular values, quantiles of the norms of its output and of its input channels, and for
    convolution kernels the roughness along each spatial axis (mean squared difference of neighbours over mean square).
    For each hidden permutation group: the singular values of the product of the layer that writes its channels and
    each layer that reads them. More than 16 singular values are read off at 16 evenly spaced ranks, the largest and
    the smallest among them; where the smaller side of a matrix is over 1,024 its spectrum is left out.

    Raises:
        ArchitectureError: ``flat`` does not fit ``architecture``.
    """
    return _by_chunk(flat, architecture, _invariants)


def _by_chunk(
    flat: Tensor, architecture: Architecture, describe: Callable[[dict[str, Tensor], Architecture], Iterator[Tensor]]
) -> Tensor:
    chunks = flat.detach().split(max(1, _CHUNK_ENTRIES // max(1, architecture.numel)))
    described = [torch.cat(list(describe(unflatten(c.double(), architecture), architecture)), dim=1) for c in chunks]
    # Diverged models stay finite: the variance of weights of 1e20 has no float32.
    return torch.cat(described).clamp(-_FLOAT32_MAX, _FLOAT32_MAX).float()


def _statistics(tensors: dict[str, Tensor], architecture: Architecture) -> Iterator[Tensor]:
    for spec in architecture.tensors:
        ordered = tensors[spec.name].reshape(-1, spec.numel).sort(dim=1).values
        mean = ordered.mean(dim=1, keepdim=True)
        yield mean
        yield (ordered - mean).square().mean(dim=1, keepdim=True)
        yield _quantiles(ordered, PERCENTILES)


def _invariants(tensors: dict[str, Tensor], architecture: Architecture) -> Iterator[Tensor]:
    blocks = {(axis.tensor, axis.axis): axis.block for group in architecture.groups for axis in group.axes}
    for spec in architecture.tensors:
        weight = tensors[spec.name]
        yield _shape_of_distribution(weight.reshape(-1, spec.numel))
        if len(spec.shape) < 2:
            continue
        if min(spec.shape[0], spec.numel // spec.shape[0]) <= _LARGEST_SPECTRUM:
            yield _singular_values(weight.flatten(2))
        for axis in (0, 1):
            norms = _channels(weight, axis, blocks.get((spec.name, axis), 1)).norm(dim=2)
            yield _quantiles(norms.sort(dim=1).values, _NORM_QUANTILES)
        for axis in range(2, len(spec.shape)):
            if spec.shape[axis] > 1:
                rough = weight.diff(dim=axis + 1).square().flatten(1).mean(dim=1, keepdim=True)
                yield _ratio(rough, weight.square().flatten(1).mean(dim=1, keepdim=True))
    yield from _products(tensors, architecture)


def _products(tensors: dict[str, Tensor], architecture: Architecture) -> Iterator[Tensor]:
    place = {spec.name: number for number, spec in enumerate(architecture.tensors) if len(spec.shape) >= 2}
    for group in architecture.groups:
        if group.size > _LARGEST_SPECTRUM:
            continue
        writers = [axis for axis in group.axes if axis.axis == 0 and axis.tensor in place]
        for reader in (axis for axis in group.axes if axis.axis == 1 and axis.tensor in place):
            before = [axis for axis in writers if place[axis.tensor] < place[reader.tensor]]
            if not before:
                continue
            writer = max(before, key=lambda axis: place[axis.tensor])
            written = _channels(tensors[writer.tensor], 0, writer.block)
            read = _channels(tensors[reader.tensor], 1, reader.block)
            # The product is read^T written; its squared singular values are the eigenvalues of R^1/2 W R^1/2 with the
            # Gram matrices of both, which are only as large as the group.
            values, vectors = torch.linalg.eigh(read @ read.mT)
            root = vectors * values.clamp(min=0).sqrt().unsqueeze(1) @ vectors.mT
            squared = torch.linalg.eigvalsh(root @ (written @ written.mT) @ root)
            yield _spectrum(squared, min(group.size, written.shape[2], read.shape[2]))


def _channels(weight: Tensor, axis: int, block: int) -> Float[Tensor, "models channels entries"]:
    """Moves an axis of the tensors to the front; ``block`` consecutive entries are one channel."""
    front = weight.movedim(axis + 1, 1)
    return front.reshape(len(front), front.shape[1] // block, -1)


def _singular_values(matrix: Float[Tensor, "models rows width"]) -> Float[Tensor, "models values"]:
    small = matrix if matrix.shape[1] <= matrix.shape[2] else matrix.mT
    return _spectrum(torch.linalg.eigvalsh(small @ small.mT), small.shape[1])


def _spectrum(ascending_squares: Float[Tensor, "models all"], rank: int) -> Float[Tensor, "models values"]:
    values = ascending_squares[:, -rank:].clamp(min=0).sqrt()
    return values if rank <= _SPECTRUM else _quantiles(values, np.linspace(0, 1, _SPECTRUM))


def _quantiles(ordered: Float[Tensor, "models entries"], points: Sequence[float] | np.ndarray) -> Tensor:
    # torch.quantile sorts again and refuses more than 16M entries.
    last = ordered.shape[1] - 1
    place = torch.as_tensor(np.asarray(points) * last)
    low = place.floor().long().clamp(max=last)
    return torch.lerp(ordered[:, low], ordered[:, (low + 1).clamp(max=last)], place - low)


def _shape_of_distribution(values: Float[Tensor, "models entries"]) -> Float[Tensor, "models 2"]:
    centred = values - values.mean(dim=1, keepdim=True)
    scale = centred.square().mean(dim=1, keepdim=True).sqrt()
    unit = _ratio(centred, scale)
    kurtosis = unit.pow(4).mean(dim=1) - 3
    return torch.stack([unit.pow(3).mean(dim=1), torch.where(scale[:, 0] > 0, kurtosis, 0.0)], dim=1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)


# --- linear codes ----------------------------------------------------------------------------------------------------


class LinearCodes:
    """PCA of flat weights of one architecture, by scikit-learn: whole (``PCA``) or streamed (``IncrementalPCA``).

    Both ways: ``inverse_transform`` gives weights back, so that reconstructions compare at the same code size.

    Args:
        size: numbers a code; at most as many as training models and parameters, fewer are used where it is larger.
        incremental: fits chunk by chunk in bounded memory.
        seed: of the randomised solver that PCA uses for large matrices.
    """

    def __init__(self, size: int, *, incremental: bool = False, seed: int = 0) -> None:
        """Remembers the settings."""
        if size < 1:
            raise SettingsError(f"size: {size} is no code size; use 1 or more")
        self.size, self.incremental, self.seed = size, incremental, seed
        self._estimator: PCA | IncrementalPCA | None = None

    def fit(
        self, flat: Shaped[np.ndarray, "models params"] | Iterable[Shaped[np.ndarray, "_chunk params"]]
    ) -> LinearCodes:
        """Fits the components on training models, given as one matrix or as chunks of any length.

        Raises:
            ZooError: there are fewer than two models.
        """
        if not self.incremental:
            whole = flat if isinstance(flat, np.ndarray) else np.concatenate(list(flat))
            size = self._bounded(*whole.shape)
            self._estimator = PCA(size, random_state=self.seed).fit(whole)
            return self
        self._estimator = None
        # A chunk of twice the code size costs least a model: each fit decomposes the chunk and the components so far.
        for chunk in _rechunked([flat] if isinstance(flat, np.ndarray) else flat, max(2 * self.size, 64)):
            if self._estimator is None:
                self._estimator = IncrementalPCA(self._bounded(*chunk.shape))
            self._estimator.partial_fit(chunk)
        if self._estimator is None:
            raise ZooError("PCA: there is no model to fit on; add at least 2 training models of this architecture")
        return self

    def transform(self, flat: Shaped[np.ndarray, "models params"]) -> Shaped[np.ndarray, "models codes"]:
        """Encodes weights."""
        codes: np.ndarray = self._fitted.transform(flat)
        return codes

    def inverse_transform(self, codes: Shaped[np.ndarray, "models codes"]) -> Shaped[np.ndarray, "models params"]:
        """Decodes codes into weights."""
        flat: np.ndarray = self._fitted.inverse_transform(codes)
        return flat

    @property
    def _fitted(self) -> PCA | IncrementalPCA:
        if self._estimator is None:
            raise SettingsError("PCA: not fitted yet; call fit with training models first")
        return self._estimator

    def _bounded(self, models: int, params: int) -> int:
        if models < 2:
            raise ZooError(f"PCA: {models} training models of one architecture are too few; add at least 2")
        return min(self.size, models, params)


def _rechunked(chunks: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Cuts a stream anew into chunks of ``length`` to ``2 * length - 1`` rows; only a shorter stream gives fewer."""
    held: np.ndarray | None = None
    for chunk in chunks:
        held = chunk if held is None else np.concatenate([held, chunk])
        while len(held) >= 2 * length:
            yield held[:length]
            held = held[length:]
    if held is not None and len(held):
        yield held


# --- representations -------------------------------------------------------------------------------------------------


@runtime_checkable
class FittedRepresentation(Protocol):
    """Feature matrices of any models of the zoo, after fitting."""

    @property
    def dimensions(self) -> int:
        """Numbers that describe one model, architecture indicators left out."""
        ...

    def features(self, rows: Int[np.ndarray, "rows"]) -> Float[np.ndarray, "rows features"]:
        """Returns the features of these models."""
        ...

    def permuted_features(self, rows: Int[np.ndarray, "rows"]) -> Float[np.ndarray, "rows features"]:
        """Returns the features of the same models neuron-permuted; NaN for models without a known symmetry."""
        ...


@runtime_checkable
class Representation(Protocol):
    """A way to describe models; ``fit`` sees the rows of the training split and nothing else."""

    def fit(self, train: Int[np.ndarray, "train"]) -> FittedRepresentation:
        """Learns what there is to learn from the training models."""
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


class FixedFeatures:
    """Features that need no fitting, side by side for each architecture.

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

    def fit(self, train: Int[np.ndarray, "train"]) -> FixedFeatures:
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
            matrix[here, columns] = np.clip(source[self._place[rows[here]]], -_FLOAT32_MAX, _FLOAT32_MAX)
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

    def fit(self, train: Int[np.ndarray, "train"]) -> FixedFeatures:
        """Fits components on these models and encodes all; an architecture with one training model has no codes."""
        return FixedFeatures([self._coded(block, train) for block in self.blocks])

    def codes(self, block: WeightBlock, train: Int[np.ndarray, "train"]) -> LinearCodes:
        """Fits the codes of one architecture on those of the models ``train`` that are in ``block``."""
        known = np.flatnonzero(np.isin(block.rows, train))
        weights = block.flat.numpy()
        step = max(1, _CHUNK_ENTRIES // max(1, weights.shape[1]))
        chunks = (weights[known[i : i + step]] for i in range(0, len(known), step))
        return LinearCodes(self.size, incremental=self.incremental).fit(chunks)

    def _coded(self, block: WeightBlock, train: np.ndarray) -> FeatureBlock:
        if np.isin(block.rows, train).sum() < 2:
            return block.described(lambda flat: flat[:, :0])
        codes = self.codes(block, train)
        return block.described(lambda flat: torch.from_numpy(codes.transform(flat.numpy())))


@runtime_checkable
class WeightBatch(Protocol):
    """What ``collect_weights`` reads of a zoo's batch."""

    @property
    def rows(self) -> Int[np.ndarray, "models"]:
        """Row numbers in the zoo."""

    @property
    def architecture(self) -> Architecture:
        """What all models of the batch share."""

    @property
    def flat(self) -> Float[Tensor, "models params"]:
        """Their weights."""


def collect_weights(batches: Iterable[WeightBatch], generator: torch.Generator) -> list[WeightBlock]:
    """Gathers the batches of a whole zoo into one block for each architecture, with a permuted copy of every model.

    Args:
        batches: as ``Zoo.batches`` gives them; each holds models of one architecture.
        generator: draws one random neuron permutation a model and group.
    """
    gathered: dict[tuple[object, object], list[WeightBatch]] = {}
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
    batches: Iterable[WeightBatch], rows: Int[np.ndarray, "rows"]
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
    statistics = [block.described(partial(weight_statistics, architecture=block.architecture)) for block in blocks]
    invariants = [block.described(partial(weight_invariants, architecture=block.architecture)) for block in blocks]
    entries = sum(len(block.rows) for block in blocks) * sum(block.architecture.numel for block in blocks)
    raw = {"W": FixedFeatures([block.described(lambda w: w) for block in blocks])} if entries <= LARGEST_MATRIX else {}
    if not raw:
        _LOGGER.warning(
            "raw weights are left out of the probes: each of %d architectures has columns of its own, %.3g entries in "
            "all; probe models of fewer architectures to have them",
            len(blocks),
            entries,
        )
    return {
        **raw,
        "s(W)": FixedFeatures(statistics),
        "s(W)+invariants": FixedFeatures([_joined(*pair) for pair in zip(statistics, invariants, strict=True)]),
        "PCA": CodeFeatures(blocks, code_size),
        "IncrementalPCA": CodeFeatures(blocks, code_size, incremental=True),
    }


def _joined(one: FeatureBlock, other: FeatureBlock) -> FeatureBlock:
    permuted = None
    if one.permuted is not None and other.permuted is not None:
        permuted = np.hstack([one.permuted, other.permuted])
    return FeatureBlock(one.rows, np.hstack([one.values, other.values]), permuted)


def embedding_features(
    embeddings: Shaped[np.ndarray, "models dims"],
    permuted: Shaped[np.ndarray, "models dims"] | None,
    architectures: Shaped[np.ndarray, "models"],
) -> FixedFeatures:
    """Builds the representation of an encoder's embedding, whose columns all architectures share.

    Args:
        embeddings: one row a model.
        permuted: embeddings of the same models neuron-permuted; rows of NaN for models without a known symmetry.
        architectures: digest or name of each model's architecture.
    """
    blocks = []
    for name in np.unique(architectures):
        rows = np.flatnonzero(architectures == name)
        moved = None if permuted is None or np.isnan(permuted[rows]).all() else permuted[rows]
        blocks.append(FeatureBlock(rows, embeddings[rows], moved))
    return FixedFeatures(blocks, shared=True)
