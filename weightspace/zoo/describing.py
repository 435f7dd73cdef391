"""What cards say of a zoo, counted from its index."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from weightspace.cards.encoder import TrainingZoo
from weightspace.cards.zoo import ArchitectureCount, LicenceCount, ResultSummary, ZooFacts
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.licences import is_own

OWN = "the publisher's own"
_LISTED, _LISTED_DATASETS = 20, 50


def training_zoo(zoo: Zoo) -> TrainingZoo:
    """Describes a zoo as what an encoder was trained on."""
    licences = [(OWN if one.own else one.licence or "none named", one.models) for one in licence_counts(zoo)]
    return TrainingZoo(
        name=zoo.repo.repo_id if zoo.repo else zoo.path.resolve().name,
        digest=zoo.digest,
        hub_id=zoo.repo.repo_id if zoo.repo else None,
        revision=zoo.repo.sha if zoo.repo else None,
        models=len(zoo),
        runs=int(zoo.index["run_id"].nunique()),
        architectures=tuple(one.name for one in architecture_counts(zoo)[:_LISTED]),
        datasets=tuple(sorted(zoo.index["dataset"].dropna().unique())),
        licences=dict(licences),
    )


def zoo_facts(zoo: Zoo, *, name: str, location: str, licence: str | None = None) -> ZooFacts:
    """Describes a zoo for its own card.

    Args:
        zoo: the zoo.
        name: heading of the card.
        location: what the loading example opens.
        licence: licence id of the publisher, for the zoo and the models of their own.
    """
    architectures = architecture_counts(zoo)
    counted = Counter(zoo.index["dataset"].dropna())
    datasets = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    skips = zoo.path / "skips.jsonl"
    return ZooFacts(
        name=name,
        location=location,
        licence=licence,
        digest=zoo.digest,
        models=len(zoo),
        runs=int(zoo.index["run_id"].nunique()),
        bytes=int(zoo.index["size"].sum()),
        reference=zoo.reference,
        architectures=tuple(architectures[:_LISTED]),
        other_architectures=len(architectures[_LISTED:]),
        datasets=dict(datasets[:_LISTED_DATASETS]),
        other_datasets=len(datasets[_LISTED_DATASETS:]),
        results=tuple(
            ResultSummary(key, len(values), float(values.min()), float(values.mean()), float(values.max()))
            for key in zoo.result_names
            if len(values := zoo.index[key].dropna())
        ),
        licences=licence_counts(zoo),
        skipped=len(skips.read_bytes().splitlines()) if skips.is_file() else 0,
        settings=zoo.settings,
    )


def architecture_counts(zoo: Zoo) -> list[ArchitectureCount]:
    """Counts the models of each architecture, the most frequent first."""
    counts: dict[tuple[str, int | None], int] = {}
    names = _names(zoo)
    # Of a reference zoo, the layers would have to be fetched from the models' repositories.
    architectures = {} if zoo.reference else zoo.architectures
    for header, models in zoo.index["header"].value_counts(sort=False).items():
        architecture = architectures.get(str(header))
        name = names.get(str(header)) or (f"{len(architecture.layers)} layers" if architecture else "not named")
        key = (name, architecture.numel if architecture else None)
        counts[key] = counts.get(key, 0) + int(models)
    found = [ArchitectureCount(name, weights, models) for (name, weights), models in counts.items()]
    return sorted(found, key=lambda one: (-one.models, one.name, one.weights or 0))


def licence_counts(zoo: Zoo) -> tuple[LicenceCount, ...]:
    """Counts the models under each licence, the most frequent first."""
    counts: dict[tuple[str | None, bool], int] = {}
    for entry in zoo.entries():
        key = (entry.licence, is_own(entry.ref.location, entry.licence))
        counts[key] = counts.get(key, 0) + 1
    found = [LicenceCount(licence, models, own) for (licence, own), models in counts.items()]
    return tuple(sorted(found, key=lambda one: (-one.models, one.licence or "")))


def architecture_name(config: Mapping[str, Any]) -> str | None:
    """Names an architecture by what its config says: its class, family or type."""
    classes = config.get("architectures")
    names = [*(classes if isinstance(classes, list) else ()), config.get("family"), config.get("model_type")]
    return next((name for name in names if isinstance(name, str) and name), None)


def _names(zoo: Zoo) -> Mapping[str, str]:
    """Names headers by the config of the first model that has one."""
    first = zoo.index.dropna(subset=["config"]).drop_duplicates("header")
    names = {}
    for header, text in zip(first["header"], first["config"], strict=True):
        with suppress(ValueError, RecursionError):
            config = json.loads(str(text))
            if isinstance(config, dict) and (name := architecture_name(config)):
                names[str(header)] = name
    return names
