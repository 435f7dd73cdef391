"""What is known of an encoder, a zoo or models, and shown on its card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Facts:
    """What is known; a card leaves out the section of whatever is empty.

    Attributes:
        kind: names the template and, in ``card.json``, the class.
        name: heading of the card.
        location: folder or Hub id for the loading example.
        licence: licence id that the publisher gives.
    """

    kind: ClassVar[str]

    name: str
    location: str = "path/to/this/folder"
    licence: str | None = None


@dataclass(frozen=True)
class TrainingZoo:
    """The models that an encoder was trained on; what is not known stays empty.

    Attributes:
        name: what the zoo is called.
        digest: of the settings that its content follows from.
        hub_id: ``org/name`` where it lies on the Hub.
        revision: commit of ``hub_id``.
        models: number of models.
        runs: number of training runs they come from.
        architectures: their names.
        datasets: ids of the datasets that they were trained on.
        licences: number of models under each licence of the sources.
    """

    name: str
    digest: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    models: int | None = None
    runs: int | None = None
    architectures: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    licences: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One measured number with its 95 % interval; NaN or None where something is not known."""

    method: str
    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> float | None:
        """The value, or None in place of NaN and infinities."""
        return self.value if self.value is not None and math.isfinite(self.value) else None


@dataclass(frozen=True)
class Measurement:
    """What the encoder reached at one task, and what baselines reached on the same models.

    Attributes:
        task: e.g. ``"test accuracy from the embedding"``.
        metric: id of the metric, e.g. ``"r2"``.
        metric_name: how it is written, e.g. ``"R²"``.
        score: the encoder's.
        baselines: the others', on the same test models.
    """

    task: str
    metric: str
    metric_name: str
    score: Score
    baselines: tuple[Score, ...] = ()


@dataclass(frozen=True)
class EncoderFacts(Facts):
    """What is known of an encoder or a prior.

    Attributes:
        parameters: numbers the encoder itself has.
        embedding_size: length of the embedding of a model.
        tags: beside ``weightspace``.
        zoo: what it was trained on.
        config: content of its ``config.json``, or the part worth reading.
        training: settings of the training.
        measurements: on test models that it was not trained on.
        limits: what it is not good for, one sentence each.
        decodes: whether its latents can be decoded back to weights.
        samples: whether it samples weights, and embeds none.
    """

    kind: ClassVar[str] = "encoder"

    parameters: int | None = None
    embedding_size: int | None = None
    tags: tuple[str, ...] = ()
    zoo: TrainingZoo | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    limits: tuple[str, ...] = ()
    decodes: bool = True
    samples: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """One model: what its file and its row of ``metadata.jsonl`` tell.

    Attributes:
        file: path inside the repository; empty where the repository is one model.
        architecture: its class or family, or None.
        parameters: numbers it has.
        dtypes: numbers by stored dtype.
        dataset: what it was trained on, or None.
        results: as recorded, by name.
    """

    file: str = ""
    architecture: str | None = None
    parameters: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    dataset: str | None = None
    results: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingFacts:
    """How models were sampled in place of trained.

    Attributes:
        sampler: what drew them, e.g. ``"flow"``.
        sources: names of the models that the sampler uses, e.g. of the joint model, by their role.
        dataset: the dataset that they were sampled for, or None.
        result: the requested results, as they were written, or None.
        edited: the model that they were made from, or None.
        seed: what everything random was drawn from.
        settings: how the sampler was used.
    """

    sampler: str
    sources: Mapping[str, str] = field(default_factory=dict)
    dataset: str | None = None
    result: str | None = None
    edited: str | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelsFacts(Facts):
    """What is known of a folder of plain models: weights of any architecture, one model or several.

    Attributes:
        base_model: what they were made from, a Hub id, or None.
        models: those that the card lists.
        others: number of models beyond them.
        config: content of ``config.json`` where there is one model.
        sampling: how they came about if they were sampled.
    """

    kind: ClassVar[str] = "models"

    base_model: str | None = None
    models: tuple[ModelFacts, ...] = ()
    others: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    sampling: SamplingFacts | None = None


@dataclass(frozen=True)
class ArchitectureCount:
    """Models of a zoo that share their layers: name, weights a model if known, and number of models."""

    name: str
    weights: int | None
    models: int


@dataclass(frozen=True)
class ResultSummary:
    """What the models of a zoo reached, over those where it is known."""

    name: str
    models: int
    lowest: float
    mean: float
    highest: float


@dataclass(frozen=True)
class LicenceCount:
    """Models under one licence: its id, None where the sources name none.

    Those of the publisher's ``own`` stand under the licence of the zoo.
    """

    licence: str | None
    models: int
    own: bool = False


@dataclass(frozen=True)
class ZooFacts(Facts):
    """What is known of a zoo.

    Attributes:
        digest: of the settings that its content follows from.
        models: number of models.
        runs: number of training runs they come from.
        bytes: of all weights.
        reference: whether the weights stay in the repositories that they come from.
        architectures: the most frequent ones.
        other_architectures: number of the others.
        datasets: number of models by dataset that they were trained on, the most frequent ones.
        other_datasets: number of the others.
        results: what they reached.
        licences: of the models.
        left_out: number of models that are not in the published copy, by reason.
        skipped: files or repositories that could not be used when the zoo was made.
        settings: what the content follows from.
    """

    kind: ClassVar[str] = "zoo"

    digest: str | None = None
    models: int = 0
    runs: int = 0
    bytes: int = 0
    reference: bool = False
    architectures: tuple[ArchitectureCount, ...] = ()
    other_architectures: int = 0
    datasets: Mapping[str, int] = field(default_factory=dict)
    other_datasets: int = 0
    results: tuple[ResultSummary, ...] = ()
    licences: tuple[LicenceCount, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
