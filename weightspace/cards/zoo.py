"""The card of a zoo, as a dataset on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import DatasetCardData

from weightspace.cards.rendering import render_template, text, thousands

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


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
    """Models under one licence.

    Attributes:
        licence: its id; None where the sources name none.
        models: how many.
        own: whether they are the publisher's own and stand under the licence of the zoo.
    """

    licence: str | None
    models: int
    own: bool = False


@dataclass(frozen=True)
class ZooFacts:
    """What is known of a zoo; the card leaves out the section of whatever is empty.

    Attributes:
        name: heading of the card.
        location: folder or Hub id for the loading example.
        licence: licence id that the publisher gives the zoo and the models of their own in it.
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

    name: str
    location: str = "path/to/this/folder"
    licence: str | None = None
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


def render_zoo(facts: ZooFacts) -> str:
    """Renders the card. Texts in the facts are escaped; the metadata name the data files for ``datasets``."""
    results = [
        (text(one.name), f"{one.models:,}", *map(thousands, (one.lowest, one.mean, one.highest)))
        for one in facts.results
    ]
    return render_template("zoo", _metadata(facts), facts=facts, results=results)


def _metadata(facts: ZooFacts) -> DatasetCardData:
    known = [one.licence for one in facts.licences if one.licence is not None]
    licences = list(dict.fromkeys([*([facts.licence] if facts.licence else []), *known]))
    kinds = ("index",) if facts.reference else ("index", "weights")
    configs = [{"config_name": kind, "data_files": f"{kind}/*.parquet"} for kind in kinds]
    return DatasetCardData(
        pretty_name=facts.name,
        license=licences[0] if len(licences) == 1 else licences or None,
        tags=["weightspace", "model-zoo", "weight-space-learning"],
        size_categories=[next((name for limit, name in _SIZES if facts.models < limit), "n>10M")],
        configs=[{**configs[0], "default": True}, *configs[1:]],
    )
