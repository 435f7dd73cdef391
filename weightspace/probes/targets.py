"""Targets of probes, read from a zoo: numbers, categories, and the classes that models were trained on.

``TARGETS`` names those that are computed; another one is added to it, from anywhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from weightspace.data.images import load_images, parse_dataset_id, variant_of
from weightspace.errors import SettingsError, WeightspaceError, ZooError
from weightspace.io.header import shown
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.splits import MIN_RUNS

CLASSES = "classes"
LOG = "log10:"
_DESCRIPTIVE = ("dataset", "base_model", "licence", "task")
_VARIATIONS = ("rotation", "polarity")
_NAMED = 20  # names in an error, at most


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of models, each predicted like a number from a column of zeros and ones.

    Attributes:
        names: of the labels.
        values: 1 where a model has the label, 0 where it has not, NaN in the whole row of a model that is not known.
        exclusive: whether a model has exactly one of them.
        note: what a reader has to know of them, or empty.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, "_models _labels"]
    exclusive: bool
    note: str = ""

    def members(self, truth: Float[np.ndarray, "test labels"]) -> Bool[np.ndarray, "test groups"]:
        """Tells the groups that balanced accuracy weighs alike: who has each category; who has and lacks each label."""
        has = truth == 1
        return has if self.exclusive else np.hstack([has, ~has])

    def answers(
        self, predicted: Float[np.ndarray, "test labels"], shares: Float[np.ndarray, " labels"]
    ) -> Bool[np.ndarray, "test groups"]:
        """Decides in which groups each model belongs, by a probe.

        A prediction estimates the probability of a label. The answer is the category whose probability is the largest
        multiple of its share among the training models, and "yes" to a label that is more probable than its share: by
        Bayes' rule the decisions with the greatest balanced accuracy.

        Args:
            predicted: one column a label.
            shares: how many of the training models have each label.
        """
        if not self.exclusive:
            yes = predicted > shares
            return np.hstack([yes, ~yes])
        multiple = np.divide(predicted, shares, out=np.full_like(predicted, -np.inf), where=shares > 0)
        answers: np.ndarray = multiple.argmax(axis=1)[:, None] == np.arange(len(self.names))
        return answers

    def chance(self, truth: Float[np.ndarray, "test labels"]) -> float:
        """Computes the balanced accuracy of one answer to every question, which is that of the commonest, too."""
        return 1 / int((truth == 1).any(axis=0).sum()) if self.exclusive else 0.5


Targets = Float[np.ndarray, "models"] | Labels


def read_target(zoo: Zoo, name: str) -> Targets:
    """Reads from a zoo what a probe is to predict of every model.

    Args:
        zoo: the zoo.
        name: a result, e.g. ``"test_accuracy"``; a hyper-parameter; ``dataset``, ``base_model``, ``licence`` or
            ``task``; ``rotation`` or ``polarity`` of the dataset; or one of ``TARGETS``: ``"classes"``, the classes
            that a model was trained on. With ``log10:`` before it, the logarithm of a number, which suits those that
            span orders of magnitude: models where it is zero or less are left out.

    Returns:
        Numbers, NaN where they are missing, if at least half of the known values are numbers. Categories otherwise;
        models of those that fewer than ten runs have are left out.

    Raises:
        SettingsError: the zoo knows nothing of that name, or nothing that differs between models.
        ZooError: no dataset can be opened to learn its classes.
    """
    if name in TARGETS:
        return TARGETS[name](zoo)
    values = _known_of(zoo, name.removeprefix(LOG))
    numbers = np.array([_number(value) for value in values])
    known = sum(value is not None for value in values)
    if name.startswith(LOG):
        numbers = np.log10(numbers, out=np.full_like(numbers, np.nan), where=numbers > 0)
        if not np.isfinite(numbers).any():
            raise SettingsError(
                f"target {name!r}: no model of {zoo.location} has a positive number there; leave {LOG} out"
            )
        return numbers
    if not known:
        raise SettingsError(f"target {name!r}: nothing of that name in {zoo.location}; there are {_names(zoo)}")
    return numbers if 2 * np.isfinite(numbers).sum() >= known else _categories(zoo, name, values)


def class_membership(zoo: Zoo) -> Labels:
    """Finds the classes that each model was trained on, by the datasets that can be opened.

    A class is known by its name, in whatever dataset it stands. A name that is only a number means nothing beyond its
    dataset, so it is taken with the base of the dataset: ``digits:3``. A class that all datasets have asks nothing of a
    probe and is left out. Classes that the same datasets have, and classes that exactly the others have, ask one
    question and are one label: ``"cat+dog or eel"`` is 1 where there are cats and dogs, and 0 where there are eels.

    Raises:
        ZooError: no dataset can be opened.
        SettingsError: all datasets have the same classes.
    """
    datasets = zoo.index["dataset"].tolist()
    known = sorted({name for name in datasets if isinstance(name, str)})
    classes: dict[str, frozenset[str]] = {}
    left_out: dict[str, str] = {}
    for name in tqdm(known, desc="classes of datasets", leave=False, disable=len(known) < 2):
        try:
            base = parse_dataset_id(name).source.base
            named = load_images(name).names
            classes[name] = frozenset(f"{base}:{one}" if math.isfinite(_number(one)) else one for one in named)
        except WeightspaceError as error:
            left_out[name] = str(error)
    if not classes:
        reason = next(iter(left_out.values()), "no model names one")
        raise ZooError(
            f"target {CLASSES!r}: no dataset of {zoo.location} can be opened ({reason}); choose another target"
        )
    sides = _questions(classes)
    if not sides:
        raise SettingsError(
            f"target {CLASSES!r}: all {len(classes)} datasets of {zoo.location} that can be opened have the same "
            "classes; choose another target, or add models of other classes"
        )
    has = {
        name: np.array(owned, dtype=np.float64) for name, owned in zip(classes, zip(*sides, strict=True), strict=True)
    }
    unknown = np.full(len(sides), np.nan)
    return Labels(
        tuple(_presentable(" or ".join("+".join(side) for side in pair if side)) for pair in sides.values()),
        np.stack([has.get(name, unknown) for name in datasets]),
        exclusive=False,
        note=_membership_note(list(sides.values()), left_out, datasets),
    )


def _questions(classes: Mapping[str, frozenset[str]]) -> dict[tuple[bool, ...], tuple[list[str], list[str]]]:
    """Groups classes by the datasets that have them: those with them, in order, and those of exactly the others."""
    sides: dict[tuple[bool, ...], tuple[list[str], list[str]]] = {}
    for one in sorted(frozenset().union(*classes.values())):
        owners = tuple(one in owned for owned in classes.values())
        others = tuple(not owns for owns in owners)
        if others in sides:
            sides[others][1].append(one)
        elif not all(owners):
            sides.setdefault(owners, ([], []))[0].append(one)
    return sides


def _membership_note(
    sides: Sequence[tuple[list[str], list[str]]], left_out: Mapping[str, str], datasets: Sequence[Any]
) -> str:
    notes = []
    classes = sum(len(having) + len(lacking) for having, lacking in sides)
    if classes > len(sides):
        notes.append(
            f"{classes} classes ask {len(sides)} questions: those that always go together or never are one label"
        )
    if left_out:
        models = sum(name in left_out for name in datasets)
        first, reason = next(iter(left_out.items()))
        notes.append(
            f"models whose dataset cannot be opened are left out ({models}, of {len(left_out)} datasets, e.g. "
            f"{shown(first)}: {_presentable(reason)})"
        )
    return "; ".join(notes)


def _categories(zoo: Zoo, name: str, values: Sequence[Any]) -> Labels:
    runs = zoo.index["run_id"].astype(str)
    texts = [None if value is None else str(value) for value in values]
    counted = Counter(
        text for text, _ in {(text, run) for text, run in zip(texts, runs, strict=True)} if text is not None
    )
    kept = sorted(text for text, count in counted.items() if count >= MIN_RUNS)
    if len(kept) < 2:
        found = ", ".join(_presentable(text) for text in sorted(counted)[:_NAMED])
        raise SettingsError(
            f"target {name!r}: {len(kept)} of its values are those of at least {MIN_RUNS} runs, where a probe needs 2; "
            f"choose another target (there are {found})"
        )
    rare = len(counted) - len(kept)
    note = f"categories that fewer than {MIN_RUNS} runs have are left out ({rare})" if rare else ""
    place = {text: number for number, text in enumerate(kept)}
    known = np.array([-1 if text is None else place.get(text, -1) for text in texts])
    indicators = (known[:, None] == np.arange(len(kept))).astype(np.float64)
    indicators[known < 0] = np.nan
    return Labels(tuple(map(_presentable, kept)), indicators, exclusive=True, note=note)


def _known_of(zoo: Zoo, name: str) -> list[Any]:
    """Looks a name up; what is not known is None."""
    if name in zoo.result_names or name in _DESCRIPTIVE:
        return [None if value != value else value for value in zoo.index[name].tolist()]  # noqa: PLR0124 - NaN
    given = [entry.hyperparameters.get(name) for entry in zoo.entries()]
    found = [value if isinstance(value, str | int | float) else None for value in given]
    if name not in _VARIATIONS or any(value is not None for value in found):
        return found
    variants = [variant_of(dataset) if isinstance(dataset, str) else None for dataset in zoo.index["dataset"]]
    # A text, for an angle is no number on a line.
    unit = " degrees" if name == "rotation" else ""
    return [None if variant is None else f"{getattr(variant, name)}{unit}" for variant in variants]


def _number(value: Any) -> float:
    """Reads a finite number; NaN for everything else, truth values among it."""
    if value is None or isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _names(zoo: Zoo) -> str:
    results = [name for name in zoo.result_names if zoo.index[name].notna().any()]
    others = {name for entry in zoo.entries() for name in entry.hyperparameters}
    return ", ".join([*results, *map(_presentable, sorted(others)[:_NAMED]), CLASSES])


def _presentable(text: str) -> str:
    return text if text.isprintable() and len(text) <= 100 else shown(text)


TARGETS: dict[str, Callable[[Zoo], Targets]] = {CLASSES: class_membership}
