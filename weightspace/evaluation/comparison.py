"""Compares sampled models with baselines and with the zoo's own models: accuracy, novelty, and fidelity to requests.

Each number is measured for each dataset, and a row holds the mean over datasets with a 95 % interval from the Bayesian
bootstrap over them (Rubin, 1981). Models of one sampler, dataset and request are one `ModelSet`. Only requested against
obtained accuracy covers all of them; everything else, those with the highest requested test accuracy of each dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.data.images import load_images
from weightspace.errors import SettingsError
from weightspace.evaluation.accuracy import FineTuning, ModelSet, accuracies, fine_tune, predictions
from weightspace.evaluation.baselines import (
    RESULT,
    average,
    best_model,
    closest_in_results,
    from_scratch,
    noisy_copies,
)
from weightspace.evaluation.novelty import (
    KnownModels,
    Nearest,
    disagreement,
    error_overlap,
    of_partner_pairs,
    of_partners,
    partners,
)
from weightspace.evaluation.reference import ReferenceModels
from weightspace.settings import PositiveInt, Settings
from weightspace.stats.measures import spearman
from weightspace.stats.resampling import mean_estimate
from weightspace.zoo.dataset import Zoo

Group = Literal["seen", "unseen"]
SAMPLES = "samples"
SCRATCH = "from scratch"
REFINED_SCRATCH = "from scratch, refined alike"
ZOO = "zoo models of the condition"
BEST = "best model of the nearest dataset"
NOISE = "noise on the nearest checkpoint"
AVERAGE = "average of checkpoints"
ALIGNED_AVERAGE = "average of aligned checkpoints"
HELD_OUT = "held-out zoo models"
INDEPENDENT = "independent zoo models with as many errors"
ANY = "any zoo model of the dataset"

ACCURACY = "accuracy after "
DISTANCE = "nearest-training distance"
RELATIVE_DISTANCE = "nearest-training distance / norm"
OVERLAP = "overlap of errors"
DISAGREEMENT = "disagreement"
SPEARMAN = "requested-obtained Spearman"
ERROR = "requested-obtained MAE"


def accuracy_after(epochs: int) -> str:
    """Names the measure of test accuracy after this many epochs of training."""
    return f"{ACCURACY}{epochs} {'epoch' if epochs == 1 else 'epochs'}"


@dataclass(frozen=True)
class ComparisonSettings(Settings):
    """How samples are compared.

    Attributes:
        fine_tuning: budgets and optimizer of the training after sampling.
        checkpoints: zoo models of a condition that are averaged, and that stand for it.
        seed: draws everything random.
        device: where to train.
    """

    fine_tuning: FineTuning = field(default_factory=FineTuning)
    checkpoints: PositiveInt = 8
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class ComparisonRow:
    """One number about a sampler's models, or about models that they are compared with.

    Attributes:
        sampler: the sampler's name.
        datasets: whether the training models include models of the datasets.
        measure: ``accuracy_after(epochs)``; ``DISTANCE`` (L2 after alignment) and its share of the norm; ``OVERLAP``,
            the highest IoU of wrong predictions with a training model; ``DISAGREEMENT``, the share of images for which
            two models predict differently; ``SPEARMAN`` and ``ERROR`` (mean absolute).
        subject: the measured models: the samples, a baseline, or the zoo's own models.
        value: mean over the datasets.
        low: lower end of its 95 % interval; None for a single dataset.
        high: upper end.
        values: ``(dataset, value)`` of each dataset.
    """

    sampler: str
    datasets: Group
    measure: str
    subject: str
    value: float
    low: float | None
    high: float | None
    values: tuple[tuple[str, float], ...]

    @classmethod
    def over_datasets(
        cls,
        key: tuple[str, Group, str, str],
        values: Mapping[str, Sequence[float]],
        generator: np.random.Generator,
    ) -> ComparisonRow:
        """Averages values over datasets; ``key`` holds the first four fields."""
        means = {dataset: float(np.mean(own)) for dataset, own in values.items()}
        mean = mean_estimate(np.array(list(means.values())), generator)
        low, high = (mean.low, mean.high) if len(means) > 1 else (None, None)
        return cls(*key, mean.value, low, high, tuple(means.items()))

    def minus(self, other: ComparisonRow, *, share: float = 1.0, seed: int = 0) -> ComparisonRow:
        """Subtracts another row's numbers dataset by dataset, where both have a number.

        Args:
            other: a row with the same measure.
            share: of ``other`` that is subtracted.
            seed: of the interval.

        Raises:
            SettingsError: the rows have no dataset in common.
        """
        theirs = dict(other.values)
        values = {dataset: [value - share * theirs[dataset]] for dataset, value in self.values if dataset in theirs}
        if not values:
            raise SettingsError(
                f"{self.subject} and {other.subject} have no dataset in common; compare rows of one run"
            )
        part = "" if share == 1 else f"{100 * share:g} % of "
        key = (self.sampler, self.datasets, self.measure, f"{self.subject} - {part}{other.subject}")
        return ComparisonRow.over_datasets(key, values, np.random.default_rng(seed))


_Number = tuple[str, str, str, str, float]
"""Sampler, dataset, measure, subject, value."""


def compare(
    samples: Mapping[str, Sequence[ModelSet]],
    zoo: Zoo,
    training_rows: Int[np.ndarray, "rows"],
    settings: ComparisonSettings | None = None,
    nearest: Mapping[str, str] | None = None,
) -> list[ComparisonRow]:
    """Measures the models of every sampler; see the notes of this module.

    Subjects whose number does not exist are left out, e.g. the overlap of errors where no zoo model makes about as
    many of them.

    Args:
        samples: the models by the sampler's name.
        zoo: the zoo that the samplers were trained on.
        training_rows: the rows they were trained on; all other models count as held out.
        settings: see `ComparisonSettings`.
        nearest: the training dataset that is nearest to each dataset without training models, see
            `weightspace.evaluation.baselines.nearest_datasets`.

    Returns:
        Rows sampler by sampler, the seen datasets first, measure by measure.

    Raises:
        SettingsError: a dataset has no training models and no nearest dataset that has some, or the images do not fit
            the models.
    """
    settings = settings or ComparisonSettings()
    reference = ReferenceModels(zoo, training_rows, nearest or {})
    tops = [(sampler, top) for sampler, sets in samples.items() for top in _highest_requested(sets)]
    found: dict[tuple[str, Group, str, str], dict[str, list[float]]] = {}
    numbers = (
        *_accuracies(reference, tops, settings),
        *_novelties(reference, tops, settings),
        *_obtained(reference, samples),
    )
    for sampler, dataset, measure, subject, value in numbers:
        if np.isfinite(value):
            group: Group = "seen" if reference.seen(dataset) else "unseen"
            found.setdefault((sampler, group, measure, subject), {}).setdefault(dataset, []).append(value)
    generator = np.random.default_rng(settings.seed)
    order = list(samples)
    # The sort is stable: within a sampler's group, measures and subjects stay in their order.
    keys = sorted(found, key=lambda key: (order.index(key[0]), key[1]))
    return [ComparisonRow.over_datasets(key, found[key], generator) for key in keys]


def condition_seed(models: ModelSet, seed: int) -> int:
    """Derives a seed from that of a comparison for each condition, so that no two of them share their draws."""
    text = f"{seed}/{models.dataset}/{models.config}/{sorted(models.requested.items())}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def _highest_requested(sets: Sequence[ModelSet]) -> list[ModelSet]:
    """Of each dataset, the samples with the highest requested test accuracy."""
    highest: dict[str, float] = {}
    for models in sets:
        highest[models.dataset] = max(models.requested.get(RESULT, -np.inf), highest.get(models.dataset, -np.inf))
    return [models for models in sets if models.requested.get(RESULT, -np.inf) == highest[models.dataset]]


def _condition(models: ModelSet) -> tuple[object, ...]:
    """What samplers share: for equal conditions the zoo's side is worked out once."""
    return models.dataset, models.architecture.tensors, tuple(sorted(models.requested.items()))


def _accuracies(
    reference: ReferenceModels, tops: Sequence[tuple[str, ModelSet]], settings: ComparisonSettings
) -> Iterator[_Number]:
    """Accuracies after every budget; all models of one config train together."""
    shared: dict[tuple[object, ...], dict[str, ModelSet]] = {}
    sets: list[tuple[str, str, ModelSet]] = []
    for sampler, top in tops:
        condition = (*_condition(top), top.config, len(top.flat))
        if condition not in shared:
            shared[condition] = _baselines(reference, top, settings)
        subjects = {SAMPLES: top, **shared[condition], **_noise(reference, top, settings), **top.baselines}
        sets += [(sampler, subject, models) for subject, models in subjects.items()]
    distinct = list(dict.fromkeys(models for _, _, models in sets))
    tuned = fine_tune(distinct, settings.fine_tuning, seed=settings.seed, device=settings.device)
    reached = dict(zip(distinct, tuned, strict=True))
    for budget, epochs in enumerate(settings.fine_tuning.epochs):
        for sampler, subject, models in sets:
            yield sampler, models.dataset, accuracy_after(epochs), subject, float(reached[models][budget].mean())


def _baselines(reference: ReferenceModels, samples: ModelSet, settings: ComparisonSettings) -> dict[str, ModelSet]:
    """The baselines that do not depend on the samples, and the zoo's own models of the condition."""
    dataset, config, architecture = samples.dataset, samples.config, samples.architecture
    seed = condition_seed(samples, settings.seed)
    drawn = from_scratch(config, architecture, len(samples.flat), torch.Generator().manual_seed(seed))
    found = {SCRATCH: ModelSet(dataset, config, architecture, drawn)}

    def closest(rows: Int[np.ndarray, "_rows"]) -> Int[np.ndarray, "_closest"]:
        generator = np.random.default_rng(seed)
        return closest_in_results(reference.zoo, rows, samples.requested, settings.checkpoints, generator)

    if len(own := reference.rows(dataset, config=config, architecture=architecture)):
        found[ZOO] = reference.models(closest(own), dataset)
    known = reference.rows(reference.source(dataset), training=True)
    if len(runnable := reference.runnable(known, dataset)):
        found[BEST] = reference.models(np.array([best_model(reference.zoo, runnable)]), dataset)
    if len(checkpoints := _checkpoints(reference, samples)):
        flat = reference.flat(closest(checkpoints))
        for subject, aligned in ((AVERAGE, False), (ALIGNED_AVERAGE, True)):
            found[subject] = ModelSet(dataset, config, architecture, average(flat, architecture, aligned=aligned))
    return found


def _noise(reference: ReferenceModels, samples: ModelSet, settings: ComparisonSettings) -> dict[str, ModelSet]:
    """Each sample's nearest checkpoint, moved at random by as much as the sample is away from it."""
    checkpoints = _checkpoints(reference, samples)
    if not len(checkpoints):
        return {}
    near = KnownModels(reference.flat(checkpoints), samples.architecture).nearest(samples.flat)
    generator = torch.Generator().manual_seed(condition_seed(samples, settings.seed))
    moved = noisy_copies(near.aligned, near.distance, generator)
    return {NOISE: ModelSet(samples.dataset, samples.config, samples.architecture, moved)}


def _checkpoints(reference: ReferenceModels, samples: ModelSet) -> Int[np.ndarray, "checkpoints"]:
    """Training models of the samples' config, of their dataset or the nearest one."""
    source = reference.source(samples.dataset)
    return reference.rows(source, training=True, config=samples.config, architecture=samples.architecture)


def _novelties(
    reference: ReferenceModels, tops: Sequence[tuple[str, ModelSet]], settings: ComparisonSettings
) -> Iterator[_Number]:
    """Distances to training models, overlap of errors and disagreement, each beside its reference."""
    held_out: dict[tuple[object, ...], Nearest | None] = {}
    for sampler, top in tops:
        if (condition := _condition(top)) not in held_out:
            held_out[condition] = _held_out(reference, top, settings)
        known = reference.known(top.architecture)
        own = known.nearest(top.flat) if known else None
        for measure, name in ((DISTANCE, "distance"), (RELATIVE_DISTANCE, "relative")):
            for subject, near in ((SAMPLES, own), (HELD_OUT, held_out[condition])):
                if near is not None:
                    yield sampler, top.dataset, measure, subject, float(getattr(near, name).mean())
        for measure, subject, value in _errors(reference, top):
            yield sampler, top.dataset, measure, subject, value


def _held_out(reference: ReferenceModels, samples: ModelSet, settings: ComparisonSettings) -> Nearest | None:
    """Nearest training models of held-out models of the condition."""
    known = reference.known(samples.architecture)
    rows = reference.rows(samples.dataset, training=False, architecture=samples.architecture)
    if known is None or not len(rows):
        return None
    generator = np.random.default_rng(condition_seed(samples, settings.seed))
    chosen = closest_in_results(reference.zoo, rows, samples.requested, settings.checkpoints, generator)
    return known.nearest(reference.flat(chosen))


def _errors(reference: ReferenceModels, samples: ModelSet) -> Iterator[tuple[str, str, float]]:
    """What the samples get wrong, beside the zoo's own models of the dataset and architecture."""
    dataset, labels = samples.dataset, load_images(samples.dataset).test_labels
    predicted = predictions(samples)
    pool, pool_predicted = reference.predictions(dataset, reference.rows(reference.source(dataset), training=True))
    own, own_predicted = reference.predictions(dataset, reference.rows(dataset, architecture=samples.architecture))
    wrong, pool_wrong, own_wrong = (each != labels for each in (predicted, pool_predicted, own_predicted))
    runs = torch.from_numpy(reference.runs)
    weights = partners(wrong.sum(1), own_wrong.sum(1))
    if len(pool):
        independent = runs[own].unsqueeze(1) != runs[pool]
        theirs = (error_overlap(own_wrong, pool_wrong) * independent).amax(1)
        yield from _compared(OVERLAP, error_overlap(wrong, pool_wrong).amax(1), of_partners(weights, theirs))
    first, second = torch.triu_indices(len(predicted), len(predicted), offset=1)
    ours = disagreement(predicted, predicted)[first, second]
    theirs = of_partner_pairs(weights, disagreement(own_predicted, own_predicted), runs[own])[first, second]
    yield from _compared(DISAGREEMENT, ours, theirs)


def _compared(
    measure: str, ours: Float[Tensor, " values"], theirs: Float[Tensor, " values"]
) -> Iterator[tuple[str, str, float]]:
    """Means over what has a reference; where nothing has one, the samples stand alone."""
    known = theirs.isfinite()
    yield measure, SAMPLES, float((ours[known] if known.any() else ours).mean())
    yield measure, INDEPENDENT, float(theirs[known].mean())


def _obtained(reference: ReferenceModels, samples: Mapping[str, Sequence[ModelSet]]) -> Iterator[_Number]:
    """Requested against obtained test accuracy within each dataset."""
    for sampler, sets in samples.items():
        by_dataset: dict[str, list[ModelSet]] = {}
        for models in sets:
            if RESULT in models.requested:
                by_dataset.setdefault(models.dataset, []).append(models)
        for dataset, own in by_dataset.items():
            requested = np.concatenate([np.full(len(models.flat), models.requested[RESULT]) for models in own])
            obtained = {SAMPLES: np.concatenate([accuracies(models) for models in own])}
            for name in own[0].baselines:
                obtained[name] = np.concatenate([accuracies(models.baselines[name]) for models in own])
            for subject, reached in obtained.items():
                yield sampler, dataset, SPEARMAN, subject, spearman(requested, reached)
            for subject, reached in obtained.items():
                yield sampler, dataset, ERROR, subject, float(np.abs(requested - reached).mean())
            known = reference.zoo.index[RESULT].to_numpy(dtype=np.float64)[reference.rows(dataset)]
            if (known := known[np.isfinite(known)]).size:
                yield sampler, dataset, ERROR, ANY, float(np.abs(requested[:, None] - known).mean())
