"""Samples models for the datasets and results of a zoo, and compares them with baselines and with the zoo's own."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from weightspace.data.images import load_images
from weightspace.encoder import Encoder, embed_dataset
from weightspace.errors import SettingsError, ZooError
from weightspace.evaluation.accuracy import ModelSet
from weightspace.evaluation.baselines import nearest_datasets
from weightspace.evaluation.comparison import (
    REFINED_SCRATCH,
    ComparisonRow,
    ComparisonSettings,
    compare,
    condition_seed,
)
from weightspace.io.hub import HubOptions
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.networks.families import FamilyConfig
from weightspace.sampling.base import Condition, Sampler, held_out_datasets, sample, training_rows
from weightspace.sampling.steps import Objective, RefinedSampler, refined_from_scratch
from weightspace.search.queries import UNNAMED, WantedResult, dataset_for
from weightspace.settings import NonEmpty, PositiveFloat, PositiveInt, Settings
from weightspace.zoo.dataset import Zoo


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """What samplers are evaluated on.

    Attributes:
        datasets: seen datasets, at most, and as many unseen ones.
        count: models of each dataset, architecture, request and seed.
        requests: test accuracies to request; if there are none, the middles of ``bins`` of the joint model's bins, the
            top one among them.
        bins: number of these bins; they lie evenly among the bins, which hold equally many models each.
        activations: of each family, at most, the most frequent first.
        seeds: of the samples.
        unseen: also sample for the datasets that the joint model held out.
        refined_learning_rate: of the baseline of refined samplers, untrained weights with their steps and images; the
            default is the best of .003, .01, .03 and .1 on the digits of the demo.
        comparison: how the models are compared.
    """

    datasets: PositiveInt = 8
    count: PositiveInt = 16
    requests: tuple[float, ...] = ()
    bins: PositiveInt = 4
    activations: PositiveInt = 8
    seeds: NonEmpty[int] = (0,)
    unseen: bool = False
    refined_learning_rate: PositiveFloat = 0.03
    comparison: ComparisonSettings = field(default_factory=ComparisonSettings)


@dataclass(frozen=True)
class EvaluationPlan:
    """What samplers are evaluated on.

    Attributes:
        conditions: networks that the library can run, of a dataset each.
        nearest: the training dataset that is nearest to each dataset without training models.
        left_out: datasets of the zoo that cannot be opened or that none of their models fits, and why.
    """

    conditions: Sequence[Condition]
    nearest: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def evaluate_samplers(
    samplers: Mapping[str, Sampler],
    zoo: Zoo,
    joint: Encoder,
    settings: EvaluationSettings | None = None,
    plan: EvaluationPlan | None = None,
) -> list[ComparisonRow]:
    """Samples with every sampler for the same conditions and compares the samples.

    Args:
        samplers: by the names that the rows have.
        zoo: the zoo that the joint model and the samplers were trained on.
        joint: the joint model.
        settings: see `EvaluationSettings`; those that choose conditions are ignored where there is a plan.
        plan: the conditions; `plan_evaluation` makes it if it is left out.

    Raises:
        WeightspaceError: the zoo is another one, the library can run none of its models, no dataset is unseen, a
            dataset of the plan has no images, or a sampler cannot sample for the conditions.
    """
    settings = settings or EvaluationSettings()
    plan = plan or plan_evaluation(zoo, joint, settings)
    for name in dict.fromkeys(condition.dataset.dataset_id for condition in plan.conditions if condition.dataset):
        load_images(name)  # a dataset without images is refused before minutes of sampling
    baselines: dict[tuple[object, ...], ModelSet] = {}
    samples = {name: _sampled(sampler, plan.conditions, settings, baselines) for name, sampler in samplers.items()}
    return compare(samples, zoo, training_rows(zoo, joint), settings.comparison, plan.nearest)


def plan_evaluation(
    zoo: Zoo,
    joint: Encoder,
    settings: EvaluationSettings,
    options: HubOptions | None = None,
    *,
    allow_pickle: bool = False,
) -> EvaluationPlan:
    """Chooses datasets, architectures and requests; see `EvaluationSettings` and `evaluate_samplers`.

    Datasets lie evenly in the order of their ids. Of each family of networks, a dataset has the architecture that most
    of its models have, with each activation of theirs.

    Args:
        zoo: see `evaluate_samplers`.
        joint: see `evaluate_samplers`.
        settings: see `EvaluationSettings`.
        options: how the Hub is reached for the image encoder.
        allow_pickle: read plain tensors from a pickle where the image encoder has no safetensors file.

    Returns:
        Every combination of a dataset's architectures with the requests, dataset by dataset, the unseen ones last.

    Raises:
        SettingsError: see `evaluate_samplers`.
    """
    left_out: dict[str, str] = {}
    known = sorted(set(zoo.index["dataset"].iloc[training_rows(zoo, joint)].dropna()))
    seen = _runnable(zoo, known, settings, left_out)
    if not seen:
        why = f" ({reason})" if (reason := next(iter(left_out.values()), "")) else ""
        raise SettingsError(f"{zoo.location}: none of its models can be run on their datasets{why}; give another zoo")
    open_dataset = functools.cache(functools.partial(dataset_for, joint, options=options, allow_pickle=allow_pickle))
    configs = {name: seen[name] for name in _spread(list(seen), settings.datasets)}
    nearest: dict[str, str] = {}
    if settings.unseen:
        unseen = _runnable(zoo, held_out_datasets(joint), settings, left_out)
        if not unseen:
            raise SettingsError(
                f"joint model {joint.name}: held out no dataset that models of {zoo.location} can be run on; train one "
                "with held_out_datasets, or evaluate seen datasets only"
            )
        unseen = {name: unseen[name] for name in _spread(list(unseen), settings.datasets)}
        configs |= unseen
        queries = [
            {name: embed_dataset(joint.joint, open_dataset(name))[0] for name in part} for part in (unseen, seen)
        ]
        nearest = nearest_datasets(*queries)
    results: list[tuple[WantedResult, ...]] = [
        (WantedResult(UNNAMED, value, value),) for value in settings.requests or bin_middles(joint, settings.bins)
    ] or [()]
    make = functools.cache(lambda config: Condition.from_config(config.to_dict()))
    conditions = [
        replace(make(config), dataset=open_dataset(name), results=wanted)
        for name, own in configs.items()
        for config in own
        for wanted in results
    ]
    return EvaluationPlan(conditions, nearest, left_out)


def bin_middles(joint: Encoder, count: int) -> tuple[float, ...]:
    """Returns test accuracies in the middle of bins of the joint model, ascending, the last one in the top bin.

    Empty if the joint model does not know test accuracies.
    """
    assert isinstance(joint.model, JointModel)
    tower = joint.model.result_model
    names = list(tower.config.results)
    if UNNAMED not in names:
        return ()
    edges = tower.edges[names.index(UNNAMED)].double()
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    count = min(count, len(middles))
    chosen = (np.arange(1, count + 1) * len(middles)) // count - 1
    return tuple(sorted({round(middles[number], 4) for number in chosen}))


def _sampled(
    sampler: Sampler,
    conditions: Sequence[Condition],
    settings: EvaluationSettings,
    baselines: dict[tuple[object, ...], ModelSet],
) -> list[ModelSet]:
    """Samples for every condition and seed; equal seeds draw equal noise for equal conditions."""
    sets = []
    for seed in settings.seeds:
        for condition in conditions:
            assert condition.family is not None and condition.dataset is not None
            name, family, requested = condition.dataset.dataset_id, condition.family, condition.requested
            generator = _generator(seed, name, family, requested.get(UNNAMED))
            flat = sample(sampler, condition, settings.count, generator)
            models = ModelSet(name, family, condition.architecture, flat, requested)
            if isinstance(sampler, RefinedSampler):
                key = (sampler.settings, condition)
                if key not in baselines:
                    baselines[key] = _refined_from_scratch(condition, models, sampler, settings)
                models = replace(models, baselines={REFINED_SCRATCH: baselines[key]})
            sets.append(models)
    return sets


def _refined_from_scratch(
    condition: Condition, models: ModelSet, sampler: RefinedSampler, settings: EvaluationSettings
) -> ModelSet:
    refinement = replace(sampler.settings, learning_rate=settings.refined_learning_rate)
    generator = torch.Generator().manual_seed(condition_seed(models, settings.comparison.seed))
    return replace(models, flat=refined_from_scratch(Objective.of(condition), len(models.flat), refinement, generator))


def _runnable(
    zoo: Zoo, datasets: Sequence[str], settings: EvaluationSettings, left_out: dict[str, str]
) -> dict[str, list[FamilyConfig]]:
    """Configs that each dataset is sampled with; ``left_out`` gets the datasets that have none, and why."""
    own: dict[str, Counter[FamilyConfig]] = {name: Counter() for name in datasets}
    for name, config in zip(zoo.index["dataset"], zoo.families, strict=True):
        if config is not None and name in own:
            own[name][config] += 1
    found = {}
    for name, configs in own.items():
        try:
            images = load_images(name)
        except ZooError as error:
            left_out[name] = str(error)
            continue
        fitting = Counter({config: models for config, models in configs.items() if config.fits(images)})
        if fitting:
            found[name] = _usual(fitting, settings.activations)
        else:
            left_out[name] = f"{name}: no model of it is of a family of this library that takes its images"
    return found


def _usual(configs: Counter[FamilyConfig], activations: int) -> list[FamilyConfig]:
    """Of each family, the configs of the most frequent layout: one for each of its most frequent activations."""
    layouts: dict[str, Counter[str]] = {}
    for config, models in configs.items():
        layouts.setdefault(config.family, Counter())[_layout(config)] += models
    usual: list[FamilyConfig] = []
    for counted in layouts.values():
        [(layout, _)] = counted.most_common(1)
        alike = [config for config, _ in configs.most_common() if _layout(config) == layout]
        usual += alike[:activations]
    return sorted(usual, key=repr)


def _layout(config: FamilyConfig) -> str:
    return repr({name: value for name, value in config.to_dict().items() if name != "activation"})


def _spread(names: list[str], count: int) -> list[str]:
    return [names[round(place)] for place in np.linspace(0, len(names) - 1, min(count, len(names)))]


def _generator(seed: int, dataset: str, config: FamilyConfig, request: float | None) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{dataset}/{config}/{request}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6]))
