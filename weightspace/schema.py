"""The nouns that cross package borders.

Frozen dataclasses without behaviour beyond what follows from their own fields. Nothing here reads a file or imports
torch at run time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

LayerKind = Literal["linear", "conv", "embedding", "norm", "vector", "other"]


@dataclass(frozen=True)
class ModelRef:
    """Where a model lives: a folder, a file or a Hub repository.

    Attributes:
        location: local path, or ``org/name`` on the Hub.
        revision: branch, tag or commit; pinned to a commit sha before weights are read from the Hub.
        subfolder: folder inside the repository.
    """

    location: str
    revision: str | None = None
    subfolder: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        subfolder = f":{self.subfolder}" if self.subfolder else ""
        return f"{self.location}{revision}{subfolder}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and safetensors dtype (``"F32"``, ``"BF16"``, ``"F8_E4M3"``, ...) of one stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of scalar entries; 1 for a 0-d tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LayerSpec:
    """Tensors that belong together, read as one matrix of ``rows`` x ``width``.

    Two layouts cover every layer:

    - ``"channels"`` (linear, conv, embedding, other tensors of two or more axes): the first tensor is cut along its
      first axis, and the same entry of every further one-axis tensor (the bias) is appended: ``[w_c | b_c]`` is row c.
    - ``"vectors"`` (norm layers, lone vectors, scalars): each tensor is one row.

    Attributes:
        name: common name of the tensors, e.g. ``"features.0"``.
        kind: what the layer does, as far as its names and shapes tell.
        tensors: the tensors in row order, the weight first.
        layout: how the tensors become rows.
    """

    name: str
    kind: LayerKind
    tensors: tuple[TensorSpec, ...]
    layout: Literal["channels", "vectors"]

    @property
    def rows(self) -> int:
        """Output channels (``"channels"``) or tensors (``"vectors"``)."""
        return self.tensors[0].shape[0] if self.layout == "channels" else len(self.tensors)

    @property
    def width(self) -> int:
        """Entries a row."""
        if self.layout == "vectors":
            return self.tensors[0].numel
        return math.prod(self.tensors[0].shape[1:]) + len(self.tensors) - 1

    @property
    def numel(self) -> int:
        """Scalar entries over all tensors of the layer."""
        return sum(tensor.numel for tensor in self.tensors)


@dataclass(frozen=True)
class GroupAxis:
    """One axis that a permutation group acts on.

    Attributes:
        tensor: tensor name.
        axis: axis of that tensor.
        block: consecutive entries that move together, e.g. ``H * W`` for the input axis of a linear layer that reads
            a flattened ``(C, H, W)`` map.
    """

    tensor: str
    axis: int
    block: int = 1


@dataclass(frozen=True)
class PermutationGroup:
    """``size`` hidden channels that can be reordered on all ``axes`` at once without changing the function."""

    size: int
    axes: tuple[GroupAxis, ...]


@dataclass(frozen=True)
class Exclusion:
    """A tensor that does not become tokens, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class Architecture:
    """A model's layers in forward order (as far as known), its symmetries, and what stays outside of the tokens.

    Attributes:
        layers: every tensor that becomes tokens, once, in forward order where it could be derived.
        groups: permutation symmetries that are known to hold.
        exclusions: tensors outside of the tokens (integers, booleans, complex numbers, empty tensors), with the reason;
            they are carried beside the tokens unchanged.
        aliases: ``(alias, kept name)`` of tied tensors that are stored once.
        notes: what could not be known, one sentence each.
        ordered: whether the order of ``layers`` is the forward order; otherwise it is the natural order of the names.
    """

    layers: tuple[LayerSpec, ...]
    groups: tuple[PermutationGroup, ...] = ()
    exclusions: tuple[Exclusion, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    ordered: bool = False

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Tokenized tensors in layer order: the order of the flat weight vector."""
        return tuple(tensor for layer in self.layers for tensor in layer.tensors)

    @cached_property
    def numel(self) -> int:
        """Length of the flat weight vector."""
        return sum(layer.numel for layer in self.layers)

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of all tokenized names, shapes and dtypes; equal for equal headers."""
        lines = sorted(f"{t.name} {t.shape} {t.dtype}" for t in self.tensors)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class WeightTokens:
    """One model as a token sequence.

    Attributes:
        tokens: ``(n, d)`` floating point entries; zero where ``mask`` is false.
        mask: ``(n, d)``, true where an entry of ``tokens`` is a weight and not padding.
        positions: ``(n, 3)`` columns token, layer, channel as in SANE: running number, layer number, row of the layer.
        architecture: the specs that invert the tokens.
        passthrough: excluded tensors by name, carried unchanged.
    """

    tokens: Float[Tensor, "n d"]
    mask: Bool[Tensor, "n d"]
    positions: Int[Tensor, "n 3"]
    architecture: Architecture
    passthrough: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A classification dataset in memory, split into train and test.

    Attributes:
        id: the dataset id that ``weightspace.data.images.load_images`` opens.
        train_images: intensities in [0, 1].
        train_labels: class numbers in ``range(classes)``.
        test_images: intensities in [0, 1].
        test_labels: class numbers in ``range(classes)``.
        classes: number of classes.
        names: of the classes, in the order of their numbers, as the source has them: its own numbers where it names
            none, and nothing for images that come from no source.
    """

    id: str
    train_images: Float[Tensor, "train channels height width"]
    train_labels: Int[Tensor, " train"]
    test_images: Float[Tensor, "test channels height width"]
    test_labels: Int[Tensor, " test"]
    classes: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportedMetric:
    """A result as a model's card or training log reports it.

    Attributes:
        name: the metric's type, e.g. ``"accuracy"``, as written.
        value: the number as written; a text where it is none, or not finite.
        dataset: id or name of the dataset that it was measured on, or None.
        split: split of the dataset, or None.
        verified: whether the Hub has verified it.
    """

    name: str
    value: float | str
    dataset: str | None = None
    split: str | None = None
    verified: bool = False


@dataclass(frozen=True)
class ZooEntry:
    """What a zoo knows of one model beside its weights.

    Attributes:
        model_id: unique within the zoo.
        run_id: training run that the checkpoint belongs to; splits keep runs together.
        ref: where the weights came from.
        dataset: dataset id or folder that ``weightspace.zoo`` can open, or None.
        results: raw metrics, e.g. ``test_accuracy`` (fraction), ``test_loss`` (nats), ``step`` (optimizer steps).
        hyperparameters: everything else that is known of the training.
        config: architecture config (the content of ``config.json``), or None.
        licence: licence id of the weights, or None.
        base_model: model that this one was trained from, or None.
        lineage: ancestors, nearest first.
        task: what the model does, as a pipeline tag of the Hub (``"image-classification"``), or None.
        datasets: all datasets that the model's card names.
        metrics: everything that is reported of the model, as written.
        content: tells equal weights: for stored weights what ``weightspace.zoo.storage`` makes of the tensors, for
            weights on the Hub what names the file's content there. None if nobody has looked.
    """

    model_id: str
    run_id: str
    ref: ModelRef
    dataset: str | None = None
    results: Mapping[str, float] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    licence: str | None = None
    base_model: str | None = None
    lineage: tuple[str, ...] = ()
    task: str | None = None
    datasets: tuple[str, ...] = ()
    metrics: tuple[ReportedMetric, ...] = ()
    content: str | None = None
