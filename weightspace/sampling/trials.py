"""Asks samplers for the models of a zoo's datasets and results, and proves what they give."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from weightspace.data.features import DatasetFeatures
from weightspace.data.images import load_images
from weightspace.encoder import Encoder, embed_dataset
from weightspace.errors import SettingsError, ZooError
from weightspace.evaluation.controls import nearest_datasets
from weightspace.evaluation.finetuning import fits
from weightspace.evaluation.proof import ProofRow, ProofSettings, Sampled, prove
from weightspace.io.hub import HubOptions
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.networks.families import FamilyConfig
from weightspace.sampling.conditions import Blueprint, Condition, blueprint_of
from weightspace.sampling.opening import held_out_datasets, training_rows
from weightspace.sampling.refining import RefinedSampler
from weightspace.sampling.samplers import Sampler, sample
from weightspace.search.queries import UNNAMED, WantedResult, dataset_for
from weightspace.zoo.dataset import Zoo


@dataclass(frozen=True)
class EvaluationSettings:
    """What samplers are asked for.

    Attributes:
        datasets: seen datasets, at most, and as many unseen ones.
        count: models of each dataset, architecture, request and seed.
        requests: test accuracies to ask for; if there are none, the middles of ``bins`` of the joint model's bins, the
            top one among them.
        bins: how many; they lie evenly among the bins, which hold equally many models each.
        activations: of each family, at most, the most frequent first.
        seeds: of the samples.
        unseen: also ask for the datasets that the joint model held out.
        proof: how the models are judged.
    """

    datasets: int = 8
    count: int = 16
    requests: tuple[float, ...] = ()
    bins: int = 4
    activations: int = 8
    seeds: tuple[int, ...] = (0,)
    unseen: bool = False
    proof: ProofSettings = field(default_factory=ProofSettings)

    def __post_init__(self) -> None:
        """Refuses amounts of nothing."""
        for name in ("datasets", "count", "bins", "activations"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}: {getattr(self, name)} is too small, give 1 or more")
        if not self.seeds:
            raise SettingsError("seeds: none are given, give 1 or more")


@dataclass(frozen=True, eq=False)
class Trials:
    """What samplers are asked for: every combination of a dataset's architectures with the requests.

    Attributes:
        datasets: as the joint model sees them.
        blueprints: of each dataset, by its id.
        requests: test accuracies; none asks for the dataset alone.
        nearest: the training dataset that is nearest to each unseen one.
    """

    datasets: tuple[DatasetFeatures, ...]
    blueprints: Mapping[str, tuple[Blueprint, ...]]
    requests: tuple[float, ...]
    nearest: Mapping[str, str]


def evaluate_samplers(
    samplers: Mapping[str, Sampler],
    zoo: Zoo,
    joint: Encoder,
    settings: EvaluationSettings | None = None,
    options: HubOptions | None = None,
    *,
    allow_pickle: bool = False,
) -> list[ProofRow]:
    """Samples with every sampler for the same conditions and proves what they give.

    Args:
        samplers: by the names that the rows have.
        zoo: the zoo that the joint model and the samplers were trained on.
        joint: the joint model.
        settings: see `EvaluationSettings`.
        options: how the Hub is reached for the image encoder.
        allow_pickle: read plain tensors from a pickle where the image encoder has no safetensors file.

    Raises:
        SettingsError: the zoo is another one, the library can run none of its models, no dataset is unseen, or a
            sampler cannot do what is asked for.
    """
    settings = settings or EvaluationSettings()
    trials = plan_trials(zoo, joint, settings, options, allow_pickle=allow_pickle)
    return prove_trials(samplers, trials, zoo, joint, settings)


def prove_trials(
    samplers: Mapping[str, Sampler], trials: Trials, zoo: Zoo, joint: Encoder, settings: EvaluationSettings
) -> list[ProofRow]:
    """Does what `evaluate_samplers` does, for conditions of the caller's choice; of the settings the rest counts."""
    for dataset in trials.datasets:
        load_images(dataset.dataset_id)  # a dataset without images is missed before minutes of sampling
    sampled = {
        name: [one for seed in settings.seeds for one in sample_trials(sampler, trials, settings.count, seed)]
        for name, sampler in samplers.items()
    }
    refined = {name: one.settings for name, one in samplers.items() if isinstance(one, RefinedSampler)}
    return prove(sampled, zoo, training_rows(zoo, joint), settings.proof, trials.nearest, refined)


def plan_trials(
    zoo: Zoo,
    joint: Encoder,
    settings: EvaluationSettings,
    options: HubOptions | None = None,
    *,
    allow_pickle: bool = False,
) -> Trials:
    """Chooses datasets, architectures and requests; see `EvaluationSettings` and `evaluate_samplers`.

    Datasets lie evenly in the order of their ids. Of each family of networks, a dataset has the architecture that most
    of its models have, with each activation of theirs.

    Raises:
        SettingsError: see `evaluate_samplers`.
    """
    seen = _runnable(zoo, sorted(set(zoo.index["dataset"].iloc[training_rows(zoo, joint)].dropna())), settings)
    if not seen:
        raise SettingsError(f"{zoo.location}: none of its models can be run on their datasets; give another zoo")
    see = functools.partial(dataset_for, joint, options=options, allow_pickle=allow_pickle)
    chosen, known = _spread(list(seen), settings.datasets), {}
    unseen: dict[str, list[FamilyConfig]] = {}
    if settings.unseen:
        unseen = _runnable(zoo, held_out_datasets(joint), settings)
        if not unseen:
            raise SettingsError(
                f"joint model {joint.name}: held out no dataset that models of {zoo.location} can be run on; train one "
                "with held_out_datasets, or evaluate seen datasets only"
            )
        unseen = {name: unseen[name] for name in _spread(list(unseen), settings.datasets)}
        known = {name: see(name) for name in seen}
    datasets = [known.get(name) or see(name) for name in (*chosen, *unseen)]
    nearest: dict[str, str] = {}
    if unseen:
        wanted = {one.dataset_id: embed_dataset(joint.joint, one)[0] for one in datasets if one.dataset_id in unseen}
        nearest = nearest_datasets(wanted, {name: embed_dataset(joint.joint, one)[0] for name, one in known.items()})
    configs = {name: (seen | unseen)[name] for name in (*chosen, *unseen)}
    every = {config for own in configs.values() for config in own}
    made = {config: blueprint_of(config.to_dict()) for config in every}
    blueprints = {name: tuple(made[config] for config in own) for name, own in configs.items()}
    return Trials(tuple(datasets), blueprints, settings.requests or bin_middles(joint, settings.bins), nearest)


def sample_trials(sampler: Sampler, trials: Trials, count: int, seed: int) -> list[Sampled]:
    """Samples models for every condition; equal seeds draw equal noise for equal conditions.

    Raises:
        SettingsError: the sampler cannot do what is asked for.
    """
    sampled = []
    for dataset in trials.datasets:
        for blueprint in trials.blueprints[dataset.dataset_id]:
            for request in trials.requests or (None,):
                wanted = () if request is None else (WantedResult(UNNAMED, request, request),)
                generator = _generator(seed, dataset.dataset_id, blueprint.family, request)
                flat = sample(sampler, Condition(dataset, wanted), blueprint, count, generator)
                assert blueprint.family is not None
                requested = {} if request is None else {UNNAMED: request}
                sampled.append(
                    Sampled(dataset.dataset_id, blueprint.family, blueprint.architecture, flat, requested=requested)
                )
    return sampled


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
    places = (np.arange(1, count + 1) * len(middles)) // count - 1
    return tuple(sorted({round(middles[place], 4) for place in places}))


def _runnable(zoo: Zoo, datasets: Sequence[str], settings: EvaluationSettings) -> dict[str, list[FamilyConfig]]:
    """Configs that each dataset is sampled with; what cannot be opened, or be run on by its models, is left out."""
    own: dict[str, Counter[FamilyConfig]] = {name: Counter() for name in datasets}
    for name, config in zip(zoo.index["dataset"], zoo.families, strict=True):
        if config is not None and name in own:
            own[name][config] += 1
    found = {}
    for name, configs in own.items():
        try:
            images = load_images(name)
        except ZooError:
            continue
        fitting = Counter({config: models for config, models in configs.items() if fits(config, images)})
        if fitting:
            found[name] = _usual(fitting, settings.activations)
    return found


def _usual(configs: Counter[FamilyConfig], activations: int) -> list[FamilyConfig]:
    """Of each family, the configs of the most frequent layout: one for each of its most frequent activations."""
    layouts: dict[str, Counter[str]] = {}
    for config, models in configs.items():
        layouts.setdefault(config.family, Counter())[_layout(config)] += models
    usual: list[FamilyConfig] = []
    for counted in layouts.values():
        layout, _ = counted.most_common(1)[0]
        usual += [config for config, _ in configs.most_common() if _layout(config) == layout][:activations]
    return sorted(usual, key=repr)


def _layout(config: FamilyConfig) -> str:
    return repr({name: value for name, value in config.to_dict().items() if name != "activation"})


def _spread(names: list[str], count: int) -> list[str]:
    places = np.linspace(0, len(names) - 1, min(count, len(names)))
    return [names[round(place)] for place in places]


def _generator(seed: int, dataset: str, config: FamilyConfig | None, request: float | None) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{dataset}/{config}/{request}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6]))
