"""What a zoo holds, counted from its index, and which of its models may be published again.

The rule for publishing is cautious, and not legal advice. A copy may contain the publisher's own models and models
whose licence is in the list below: licences that let everyone pass on unchanged copies without asking or accepting
terms first. Left out are models from elsewhere without a known licence, licences called ``other`` or ``unknown``,
licences against derivatives (a zoo changes the form of what it holds), and community licences that ask whoever passes a
copy on to add an agreement, a notice or a name (``llama3``, ``gemma``, ...).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from weightspace.cards.facts import ArchitectureCount, LicenceCount, ResultSummary, TrainingZoo, ZooFacts
from weightspace.io.locations import is_repo_id
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.storage import read_skips

OWN = "the publisher's own"
_LISTED, _LISTED_DATASETS = 20, 50
_REDISTRIBUTABLE = re.compile(
    r"""
      apache-2\.0 | mit | isc | zlib | ncsa | unlicense | wtfpl | postgresql | ms-pl | bsl-1\.0 | ecl-2\.0
    | bsd(-[23]-clause(-clear)?)? | afl-3\.0 | artistic-2\.0 | osl-3\.0
    | (a|l)?gpl(-[23](\.[01])?)? | mpl-2\.0 | epl-[12]\.0 | eupl-1\.[12] | cecill-[bc]? | ofl-1\.1
    | cc0-1\.0 | cc-by(-nc)?(-sa)?-[234]\.[05] | pddl | odc-by | odbl | c-uda | openmdw-1\.0
    | cdla-permissive-[12]\.0 | cdla-sharing-1\.0 | etalab-2\.0
    | openrail(\+\+)? | (bigscience|creativeml|bigcode)-openrail-m | bigscience-bloom-rail-1\.0
    """,
    re.VERBOSE,
)


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
    """Describes a zoo for its own card; see `ZooFacts`."""
    architectures = architecture_counts(zoo)
    counted = Counter(zoo.index["dataset"].dropna())
    datasets = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
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
        skipped=len(read_skips(zoo.path)),
        settings=zoo.settings,
    )


def architecture_counts(zoo: Zoo) -> list[ArchitectureCount]:
    """Counts the models of each architecture, the most frequent first."""
    counts: Counter[tuple[str, int | None]] = Counter()
    named = zoo.index.dropna(subset=["config"]).drop_duplicates("header")
    configs = dict(zip(named["header"], named["config"], strict=True))
    # The architectures of a reference zoo would have to be fetched.
    architectures = {} if zoo.reference else zoo.architectures
    for header, models in zoo.index["header"].value_counts(sort=False).items():
        architecture, name = architectures.get(str(header)), None
        with suppress(ValueError, RecursionError):
            name = architecture_name(json.loads(configs.get(header, "null")))
        name = name or (f"{len(architecture.layers)} layers" if architecture else "not named")
        counts[name, architecture.numel if architecture else None] += int(models)
    found = [ArchitectureCount(name, weights, models) for (name, weights), models in counts.items()]
    return sorted(found, key=lambda one: (-one.models, one.name, one.weights or 0))


def licence_counts(zoo: Zoo) -> tuple[LicenceCount, ...]:
    """Counts the models under each licence, the most frequent first."""
    counts = Counter((entry.licence, is_own(entry.ref.location, entry.licence)) for entry in zoo.entries())
    found = [LicenceCount(licence, models, own) for (licence, own), models in counts.items()]
    return tuple(sorted(found, key=lambda one: (-one.models, one.licence or "")))


def architecture_name(config: Any) -> str | None:
    """Names an architecture by what its config says: its class, family or type."""
    if not isinstance(config, Mapping):
        return None
    classes = config.get("architectures")
    names = [*(classes if isinstance(classes, list) else ()), config.get("family"), config.get("model_type")]
    return next((name for name in names if isinstance(name, str) and name), None)


def is_own(location: str, licence: str | None) -> bool:
    """Whether a model counts as the publisher's own: it came from no repository, and no licence of others is known."""
    return licence is None and not is_repo_id(location)


def obstacle(location: str, licence: str | None) -> str | None:
    """Says why a model cannot be published again, or returns None if it can.

    Args:
        location: repository or path that the weights came from.
        licence: id of their licence as the Hub writes it, or None if unknown.
    """
    if is_own(location, licence):
        return None
    if licence is None:
        return "no licence known"
    if _REDISTRIBUTABLE.fullmatch(licence.strip().lower()):
        return None
    return f"licence {licence!r} is not known to let everyone pass on copies"
