"""Proves a sampler: what its models are worth and whether they are new, beside controls and the zoo's own models.

Each number is measured for each dataset, and a row holds the mean over datasets with a 95 % interval from the Bayesian
bootstrap over them (Rubin, 1981). Models of one sampler, dataset and request are one `Sampled`. Only requested against
obtained looks at all of them; everything else, at those with the highest test accuracy requested of each dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from weightspace.data.images import load_images
from weightspace.errors import SettingsError
from weightspace.evaluation.bench import Bench
from weightspace.evaluation.controls import (
    average,
    best_model,
    closest_in_results,
    from_scratch,
    noisy_copies,
    refined_from_scratch,
)
from weightspace.evaluation.finetuning import FineTuning, Trial, accuracy, fine_tune, predictions
from weightspace.evaluation.judging import Task
from weightspace.evaluation.novelty import (
    KnownModels,
    Nearest,
    disagreement,
    error_overlap,
    of_partner_pairs,
    of_partners,
    partners,
)
from weightspace.sampling.refining import RefinementSettings
from weightspace.search.queries import WantedResult
from weightspace.zoo.dataset import Zoo

_RESULT = "test_accuracy"
_REPLICATES = 2000
_LEVELS = (2.5, 97.5)

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

DISTANCE = "nearest-training distance"
RELATIVE_DISTANCE = "nearest-training distance / norm"
OVERLAP = "overlap of errors"
DISAGREEMENT = "disagreement"
SPEARMAN = "requested-obtained Spearman"
ERROR = "requested-obtained MAE"


def accuracy_after(epochs: int) -> str:
    """Names the measure of test accuracy after this many epochs of training."""
    return f"accuracy after {epochs} {'epoch' if epochs == 1 else 'epochs'}"


@dataclass(frozen=True, eq=False)
class Sampled(Trial):
    """What a sampler made for one condition: models of one config, meant for one dataset.

    Attributes:
        requested: the results that were asked for by name; empty if only the dataset was given.
    """

    requested: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ProofSettings:
    """How samples are judged.

    Attributes:
        fine_tuning: budgets and optimizer of the training after sampling.
        checkpoints: zoo models of a condition that are averaged, and that stand for it.
        refined_learning_rate: of the control of refined samplers, untrained weights with their steps and images; the
            default is the best of .003, .01, .03 and .1 on the digits of the demo.
        seed: draws everything random.
        device: where to train.
    """

    fine_tuning: FineTuning = field(default_factory=FineTuning)
    checkpoints: int = 8
    refined_learning_rate: float = 0.03
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuses a condition of no checkpoints, and steps that go nowhere."""
        if self.checkpoints < 1:
            raise SettingsError(f"checkpoints: {self.checkpoints} is too small, give 1 or more")
        if self.refined_learning_rate <= 0:
            raise SettingsError(
                f"refined_learning_rate: {self.refined_learning_rate} is not positive; give more than 0"
            )


@dataclass(frozen=True)
class ProofRow:
    """One number about a sampler's models, or about what they are compared with.

    Attributes:
        sampler: the sampler's name.
        datasets: whether the training models have seen the datasets.
        measure: what is measured: ``accuracy_after(epochs)``; ``DISTANCE`` (L2 after alignment) and its share of the
            norm; ``OVERLAP``, the highest IoU of wrong predictions with a training model; ``DISAGREEMENT``, the share
            of images for which two models predict differently; ``SPEARMAN`` and ``ERROR`` (mean absolute).
        subject: what is measured: the samples, a control, or the zoo's own models.
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


def prove(
    samplers: Mapping[str, Sequence[Sampled]],
    zoo: Zoo,
    training_rows: Int[np.ndarray, "rows"],
    settings: ProofSettings | None = None,
    nearest: Mapping[str, str] | None = None,
    refined: Mapping[str, RefinementSettings] | None = None,
) -> list[ProofRow]:
    """Measures the models of every sampler; see the notes of this module.

    Subjects whose number does not exist are left out, e.g. the overlap of errors where no zoo model makes about as
    many of them.

    Args:
        samplers: the models by the sampler's name.
        zoo: the zoo that the samplers were fitted on.
        training_rows: its models that they have seen; all others count as held out.
        settings: see `ProofSettings`.
        nearest: the training dataset that is nearest to each dataset without training models, see
            `weightspace.evaluation.controls.nearest_datasets`.
        refined: how refined samplers refine, by the sampler's name; they stand beside untrained weights that are
            refined alike.

    Returns:
        Rows sampler by sampler, the seen datasets first, measure by measure.

    Raises:
        SettingsError: a dataset has no training models and no nearest dataset that has some, or the images do not fit
            the models.
    """
    settings = settings or ProofSettings()
    bench = Bench(zoo, training_rows, nearest or {})
    tops = [(sampler, top) for sampler, samples in samplers.items() for top in _best_requested(samples)]
    alike = _refined_alike(samplers, refined or {}, settings)
    found: dict[tuple[str, Group, str, str], dict[str, list[float]]] = {}
    numbers = (
        *_accuracies(bench, tops, alike, settings),
        *_novelties(bench, tops, settings),
        *_obtained(bench, samplers, alike),
    )
    for number in numbers:
        if np.isfinite(number.value):
            group: Group = "seen" if bench.seen(number.dataset) else "unseen"
            values = found.setdefault((number.sampler, group, number.measure, number.subject), {})
            values.setdefault(number.dataset, []).append(number.value)
    generator = np.random.default_rng(settings.seed)
    places = list(samplers)
    # The sort is stable: within a sampler's group, measures and subjects stay in their order.
    keys = sorted(found, key=lambda key: (places.index(key[0]), key[1]))
    return [_row(*key, found[key], generator) for key in keys]


@dataclass(frozen=True)
class _Number:
    sampler: str
    dataset: str
    measure: str
    subject: str
    value: float


def _best_requested(samples: Sequence[Sampled]) -> list[Sampled]:
    """Of each dataset, the samples for which the highest test accuracy was asked."""
    highest: dict[str, float] = {}
    for sampled in samples:
        asked = sampled.requested.get(_RESULT, -np.inf)
        highest[sampled.dataset] = max(asked, highest.get(sampled.dataset, -np.inf))
    return [s for s in samples if s.requested.get(_RESULT, -np.inf) == highest[s.dataset]]


def _condition(sampled: Sampled) -> tuple[object, ...]:
    """What samplers share: for equal conditions the zoo's side is worked out once."""
    return sampled.dataset, sampled.architecture.tensors, tuple(sorted(sampled.requested.items()))


_Alike = Mapping[tuple[str, Sampled], Sampled]
"""A refined sampler's name and what it made -> untrained weights for the same condition, refined alike."""


def _refined_alike(
    samplers: Mapping[str, Sequence[Sampled]], refined: Mapping[str, RefinementSettings], settings: ProofSettings
) -> _Alike:
    made: dict[tuple[object, ...], Sampled] = {}
    alike = {}
    for sampler, own in refined.items():
        refinement = replace(own, learning_rate=settings.refined_learning_rate)
        for sampled in samplers[sampler]:
            condition = (refinement, *_condition(sampled), sampled.config, len(sampled.flat))
            if condition not in made:
                made[condition] = _from_scratch_for(sampled, refinement, settings)
            alike[sampler, sampled] = made[condition]
    return alike


def _from_scratch_for(sampled: Sampled, refinement: RefinementSettings, settings: ProofSettings) -> Sampled:
    asked = sampled.requested.get(_RESULT)
    wanted = None if asked is None else WantedResult(_RESULT, asked, asked)
    task = Task(load_images(sampled.dataset), sampled.config, sampled.architecture, wanted)
    generator = torch.Generator().manual_seed(_seed(settings, sampled))
    return replace(sampled, flat=refined_from_scratch(task, len(sampled.flat), refinement, generator))


def _accuracies(
    bench: Bench, tops: Sequence[tuple[str, Sampled]], alike: _Alike, settings: ProofSettings
) -> Iterator[_Number]:
    """Accuracies after every budget; all models of one config train together."""
    controls: dict[tuple[object, ...], dict[str, Trial]] = {}
    trials: list[tuple[str, str, Trial]] = []
    for sampler, top in tops:
        condition = (*_condition(top), top.config, len(top.flat))
        if condition not in controls:
            controls[condition] = _controls(bench, top, settings)
        subjects = {SAMPLES: top, **controls[condition], **_noise(bench, top, settings)}
        if (sampler, top) in alike:
            subjects[REFINED_SCRATCH] = alike[sampler, top]
        trials += [(sampler, subject, trial) for subject, trial in subjects.items()]
    distinct = list(dict.fromkeys(trial for _, _, trial in trials))
    tuned = fine_tune(distinct, settings.fine_tuning, seed=settings.seed, device=settings.device)
    accuracies = dict(zip(distinct, tuned, strict=True))
    for budget, epochs in enumerate(settings.fine_tuning.epochs):
        measure = accuracy_after(epochs)
        for sampler, subject, trial in trials:
            yield _Number(sampler, trial.dataset, measure, subject, float(accuracies[trial][budget].mean()))


def _controls(bench: Bench, sampled: Sampled, settings: ProofSettings) -> dict[str, Trial]:
    """The controls that do not look at the samples, and the zoo's own models of the condition."""
    dataset, config, architecture = sampled.dataset, sampled.config, sampled.architecture
    seed = _seed(settings, sampled)
    drawn = from_scratch(config, architecture, len(sampled.flat), torch.Generator().manual_seed(seed))
    trials = {SCRATCH: Trial(dataset, config, architecture, drawn)}

    def closest(rows: Int[np.ndarray, "_rows"]) -> Int[np.ndarray, "_closest"]:
        generator = np.random.default_rng(seed)
        return closest_in_results(bench.zoo, rows, sampled.requested, settings.checkpoints, generator)

    if len(own := bench.rows(dataset, config=config, architecture=architecture)):
        trials[ZOO] = bench.trial(closest(own), dataset)
    known = bench.rows(bench.source(dataset), training=True)
    if len(runnable := bench.runnable(known, dataset)):
        trials[BEST] = bench.trial(np.array([best_model(bench.zoo, runnable)]), dataset)
    if len(checkpoints := _checkpoints(bench, sampled)):
        flat = bench.flat(closest(checkpoints))
        for subject, aligned in ((AVERAGE, False), (ALIGNED_AVERAGE, True)):
            trials[subject] = Trial(dataset, config, architecture, average(flat, architecture, aligned=aligned))
    return trials


def _noise(bench: Bench, sampled: Sampled, settings: ProofSettings) -> dict[str, Trial]:
    """Each sample's nearest checkpoint, moved at random by as much as the sample is away from it."""
    checkpoints = _checkpoints(bench, sampled)
    if not len(checkpoints):
        return {}
    near = KnownModels(bench.flat(checkpoints), sampled.architecture).nearest(sampled.flat)
    generator = torch.Generator().manual_seed(_seed(settings, sampled))
    moved = noisy_copies(near.aligned, near.distance, generator)
    return {NOISE: Trial(sampled.dataset, sampled.config, sampled.architecture, moved)}


def _checkpoints(bench: Bench, sampled: Sampled) -> Int[np.ndarray, "checkpoints"]:
    """Training models of the samples' config, of their dataset or the nearest one."""
    source = bench.source(sampled.dataset)
    return bench.rows(source, training=True, config=sampled.config, architecture=sampled.architecture)


def _novelties(bench: Bench, tops: Sequence[tuple[str, Sampled]], settings: ProofSettings) -> Iterator[_Number]:
    """Distances to training models, overlap of errors and disagreement, each beside its reference."""
    reference: dict[tuple[object, ...], Nearest | None] = {}
    for sampler, top in tops:
        if (condition := _condition(top)) not in reference:
            reference[condition] = _held_out(bench, top, settings)
        known = bench.known(top.architecture)
        own = known.nearest(top.flat) if known else None
        for measure, name in ((DISTANCE, "distance"), (RELATIVE_DISTANCE, "relative")):
            for subject, near in ((SAMPLES, own), (HELD_OUT, reference[condition])):
                if near is not None:
                    yield _Number(sampler, top.dataset, measure, subject, float(getattr(near, name).mean()))
        for measure, subject, value in _errors(bench, top):
            yield _Number(sampler, top.dataset, measure, subject, value)


def _held_out(bench: Bench, sampled: Sampled, settings: ProofSettings) -> Nearest | None:
    """Nearest training models of the models of the condition that are none."""
    known = bench.known(sampled.architecture)
    rows = bench.rows(sampled.dataset, training=False, architecture=sampled.architecture)
    if known is None or not len(rows):
        return None
    generator = np.random.default_rng(_seed(settings, sampled))
    chosen = closest_in_results(bench.zoo, rows, sampled.requested, settings.checkpoints, generator)
    return known.nearest(bench.flat(chosen))


def _errors(bench: Bench, sampled: Sampled) -> Iterator[tuple[str, str, float]]:
    """What the samples get wrong, beside the zoo's own models of the dataset and architecture."""
    predicted = predictions(sampled)
    wrong = predicted != load_images(sampled.dataset).test_labels
    judged, runs = bench.judged(sampled.dataset), torch.from_numpy(bench.runs)
    pool = judged[bench.rows(bench.source(sampled.dataset), training=True)]
    own = judged[bench.rows(sampled.dataset, architecture=sampled.architecture)]
    weights = partners(wrong.sum(1), own.wrong.sum(1))
    if len(pool.rows):
        independent = runs[own.rows].unsqueeze(1) != runs[pool.rows]
        theirs = (error_overlap(own.wrong, pool.wrong) * independent).amax(1)
        yield from _compared(OVERLAP, error_overlap(wrong, pool.wrong).amax(1), of_partners(weights, theirs))
    first, second = torch.triu_indices(len(predicted), len(predicted), offset=1)
    ours = disagreement(predicted, predicted)[first, second]
    theirs = of_partner_pairs(weights, disagreement(own.predicted, own.predicted), runs[own.rows])[first, second]
    yield from _compared(DISAGREEMENT, ours, theirs)


def _compared(
    measure: str, ours: Float[Tensor, " values"], theirs: Float[Tensor, " values"]
) -> Iterator[tuple[str, str, float]]:
    """Means over what has a reference; where nothing has one, the samples stand alone."""
    known = theirs.isfinite()
    yield measure, SAMPLES, float((ours[known] if known.any() else ours).mean())
    yield measure, INDEPENDENT, float(theirs[known].mean())


def _obtained(bench: Bench, samplers: Mapping[str, Sequence[Sampled]], alike: _Alike) -> Iterator[_Number]:
    """Requested against obtained test accuracy within each dataset."""
    for sampler, samples in samplers.items():
        asked = [sampled for sampled in samples if _RESULT in sampled.requested]
        for dataset in dict.fromkeys(sampled.dataset for sampled in asked):
            own = [sampled for sampled in asked if sampled.dataset == dataset]
            control = [alike[sampler, sampled] for sampled in own if (sampler, sampled) in alike]
            requested = np.concatenate([np.full(len(s.flat), s.requested[_RESULT]) for s in own])
            obtained = {
                subject: np.concatenate([accuracy(predictions(s), load_images(dataset)) for s in models])
                for subject, models in ((SAMPLES, own), (REFINED_SCRATCH, control))
                if models
            }
            for subject, reached in obtained.items():
                yield _Number(sampler, dataset, SPEARMAN, subject, rank_correlation(requested, reached))
            for subject, reached in obtained.items():
                yield _Number(sampler, dataset, ERROR, subject, float(np.abs(requested - reached).mean()))
            known = bench.zoo.index[_RESULT].to_numpy(dtype=np.float64)[bench.rows(dataset)]
            if (known := known[np.isfinite(known)]).size:
                apart = np.abs(requested[:, None] - known).mean()
                yield _Number(sampler, dataset, ERROR, ANY, float(apart))


def difference(one: ProofRow, other: ProofRow, *, share: float = 1.0, seed: int = 0) -> ProofRow:
    """Subtracts one row's numbers from another's, dataset by dataset: ``one`` - ``other`` where both have a number.

    Args:
        one: a row.
        other: a row with the same measure.
        share: of ``other`` that is subtracted.
        seed: of the interval.

    Raises:
        SettingsError: the rows have no dataset in common.
    """
    theirs = dict(other.values)
    values = {dataset: [value - share * theirs[dataset]] for dataset, value in one.values if dataset in theirs}
    if not values:
        raise SettingsError(f"{one.subject} and {other.subject} have no dataset in common; compare rows of one proof")
    part = "" if share == 1 else f"{100 * share:g} % of "
    subject = f"{one.subject} - {part}{other.subject}"
    return _row(one.sampler, one.datasets, one.measure, subject, values, np.random.default_rng(seed))


def rank_correlation(requested: Float[np.ndarray, "models"], obtained: Float[np.ndarray, "models"]) -> float:
    """Computes Spearman's correlation; NaN if only one value was requested, 0 if only one was obtained."""
    if np.ptp(requested) == 0:
        return float("nan")
    if np.ptp(obtained) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(requested), rankdata(obtained))[0, 1])


def _row(
    sampler: str,
    group: Group,
    measure: str,
    subject: str,
    values: Mapping[str, Sequence[float]],
    generator: np.random.Generator,
) -> ProofRow:
    means = {dataset: float(np.mean(own)) for dataset, own in values.items()}
    each = np.array(list(means.values()))
    low = high = None
    if len(each) > 1:
        weights = generator.exponential(size=(_REPLICATES, len(each)))
        low, high = map(float, np.percentile(weights @ each / weights.sum(1), _LEVELS))
    return ProofRow(sampler, group, measure, subject, float(each.mean()), low, high, tuple(means.items()))


def _seed(settings: ProofSettings, sampled: Sampled) -> int:
    """A seed for each condition, so that no two of them share their draws."""
    text = f"{settings.seed}/{sampled.dataset}/{sampled.config}/{sorted(sampled.requested.items())}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
