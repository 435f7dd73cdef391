"""Samplers by name, made of trained models on disk or on the Hub.

A name is a base, optionally followed by what becomes of its samples, in this order: ``flow``, ``codes`` and ``kde`` are
the bases, ``+bootstrapped`` (of ``kde``) or ``+selected`` keeps the best of many samples, and ``+refined`` improves
them by gradients. For example ``kde+bootstrapped+refined``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from weightspace.encoder import Encoder, load_encoder, saved_folder
from weightspace.errors import SettingsError, WeightspaceError
from weightspace.io.folders import LocalFolder
from weightspace.io.header import shown
from weightspace.io.hub import HubOptions
from weightspace.sampling.codes import CodeSampler, CodeSettings
from weightspace.sampling.flow import FlowSampler, FlowSettings
from weightspace.sampling.kde import KdeSampler, KdeSettings
from weightspace.sampling.refining import RefinedSampler, RefinementSettings
from weightspace.sampling.samplers import Sampler
from weightspace.sampling.selecting import BootstrappedSampler, SelectionSettings, SubsampledSampler
from weightspace.training.run import read_training
from weightspace.zoo.dataset import Zoo

KDE, SELECTED, BOOTSTRAPPED, REFINED = "kde", "selected", "bootstrapped", "refined"

_PRIORS = {"flow": "weight_prior", "codes": "weight_code_prior"}
_PriorSampler = FlowSampler | CodeSampler


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of every part of a sampler; those that its name does not call for count for nothing."""

    flow: FlowSettings = field(default_factory=FlowSettings)
    codes: CodeSettings = field(default_factory=CodeSettings)
    kde: KdeSettings = field(default_factory=KdeSettings)
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    refinement: RefinementSettings = field(default_factory=RefinementSettings)


@dataclass(frozen=True, eq=False)
class Sources:
    """What samplers are made of; a sampler that needs what is missing is refused.

    Attributes:
        joint: the joint model that datasets and results are embedded with.
        priors: folders of trained priors, or ``org/name`` on the Hub; ``flow`` and ``codes`` need one of their kind.
        zoo: models to sample around; ``kde`` needs it.
        encoder: autoencoder whose latents ``kde`` samples; that of the first prior if left out.
        options: how the Hub is reached.
    """

    joint: Encoder
    priors: tuple[str, ...] = ()
    zoo: Zoo | None = None
    encoder: str | None = None
    options: HubOptions | None = None


@dataclass(frozen=True, eq=False)
class OpenedSampler:
    """A sampler that is ready.

    Attributes:
        name: as it was asked for.
        sampler: the sampler.
        base: the part of it that samples; the others choose or improve.
        sources: names of what it was made of, by their role.
        settings: of each of its parts, by the part's name.
    """

    name: str
    sampler: Sampler
    base: Sampler
    sources: Mapping[str, str]
    settings: Mapping[str, Any]


def open_sampler(name: str, sources: Sources, settings: SamplerSettings | None = None) -> OpenedSampler:
    """Makes the sampler of a name; see the notes of this module.

    Raises:
        SettingsError: there is no such sampler, or what it is made of is missing or does not fit.
        WeightspaceError: a model cannot be loaded.
    """
    settings = settings or SamplerSettings()
    base, *steps = name.split("+")
    if base not in (*_PRIORS, KDE):
        raise SettingsError(f"sampler {shown(name)}: {shown(base)} is none; choose of {', '.join((*_PRIORS, KDE))}")
    _check_steps(name, base, steps)
    sampler, names = _kde(name, sources, settings) if base == KDE else _of_prior(name, base, sources, settings)
    used = {"joint model": _named(sources.joint.name, sources.joint.path), **names}
    recorded: dict[str, Any] = {base: asdict(sampler.settings)}
    whole: Sampler = sampler
    for step in steps:
        whole = _stepped(step, whole, settings)
        recorded[step] = asdict(settings.refinement if step == REFINED else settings.selection)
    return OpenedSampler(name, whole, sampler, used, recorded)


def training_rows(zoo: Zoo, joint: Encoder) -> Int[np.ndarray, "rows"]:
    """Returns the rows of a zoo that a joint model, and whatever was trained with it, has seen in training.

    Raises:
        SettingsError: the joint model was trained on another zoo.
    """
    record = read_training(joint.path)
    if record is None or record.zoo_digest != zoo.digest:
        known = "of which nothing is recorded" if record is None else f"of digest {record.zoo_digest}"
        raise SettingsError(
            f"{zoo.location}: a zoo of digest {zoo.digest}, but the joint model {joint.name} was trained on one "
            f"{known}; give that zoo, or the joint model of this one"
        )
    unseen = zoo.index["run_id"].isin([*record.test_runs, *record.validation_runs])
    unseen |= zoo.index["dataset"].isin(held_out_datasets(joint))
    return np.flatnonzero(~unseen.to_numpy())


def held_out_datasets(joint: Encoder) -> tuple[str, ...]:
    """Returns the datasets that a joint model was not trained on although its zoo has models of them."""
    record = read_training(joint.path)
    return () if record is None else record.held_out_datasets


def _named(name: str, folder: Path) -> str:
    """Names a model as others may read it: without where it lies on this machine."""
    record = read_training(folder)
    if not Path(name).is_absolute():
        return name
    return f"{folder.resolve().name} ({record.identity})" if record is not None else folder.resolve().name


def _check_steps(name: str, base: str, steps: list[str]) -> None:
    known = (SELECTED, BOOTSTRAPPED, REFINED)
    unknown = next((step for step in steps if step not in known), None)
    if unknown is not None:
        raise SettingsError(f"sampler {shown(name)}: {shown(unknown)} is no step; choose of {', '.join(known)}")
    if len(set(steps)) != len(steps) or REFINED in steps[:-1] or {SELECTED, BOOTSTRAPPED} <= set(steps):
        raise SettingsError(f"sampler {name}: select once, then refine, e.g. {base}+{SELECTED}+{REFINED}")
    if BOOTSTRAPPED in steps and base != KDE:
        raise SettingsError(f"sampler {name}: only kde can be bootstrapped; write {base}+{SELECTED}")


def prior_kind(location: str, options: HubOptions | None = None) -> str:
    """Returns the name of the sampler that a prior is for.

    Raises:
        WeightspaceError: there is no prior.
    """
    folder, _ = saved_folder(location, options, kind="prior")
    kind = (LocalFolder(folder).read_json("config.json") or {}).get("model_type")
    name = next((name for name, own in _PRIORS.items() if own == kind), None)
    if name is None:
        raise SettingsError(f"prior {location}: holds a model of type {shown(kind)}; give what `train prior` wrote")
    return name


def _of_prior(
    name: str, base: str, sources: Sources, settings: SamplerSettings
) -> tuple[_PriorSampler, dict[str, str]]:
    location = next((one for one in sources.priors if prior_kind(one, sources.options) == base), None)
    if location is None:
        raise SettingsError(f"sampler {name}: needs a trained {_PRIORS[base]} (weightspace train prior); give one")
    folder, named = saved_folder(location, sources.options, kind="prior")
    try:
        sampler: _PriorSampler
        if base == "flow":
            sampler = FlowSampler.load(folder, sources.joint, settings.flow)
        else:
            sampler = CodeSampler.load(folder, sources.joint, settings.codes)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WeightspaceError(f"{location}: the prior cannot be loaded: {reason}; train it again") from error
    return sampler, {"prior": _named(named, folder)}


def _kde(name: str, sources: Sources, settings: SamplerSettings) -> tuple[KdeSampler, dict[str, str]]:
    zoo = sources.zoo
    if zoo is None:
        raise SettingsError(f"sampler {name}: needs a zoo of models to sample around; give one")
    if sources.encoder is not None:
        encoder = load_encoder(sources.encoder, sources.options)
        codec = encoder.codec
        used = {"autoencoder": _named(encoder.name, encoder.path)}
    elif sources.priors:
        sampler, used = _of_prior(name, prior_kind(sources.priors[0], sources.options), sources, settings)
        codec = sampler.codec
    else:
        raise SettingsError(
            f"sampler {name}: needs a trained autoencoder (weightspace train autoencoder) or a prior, which comes with "
            "one; give either (--encoder, --prior)"
        )
    rows = training_rows(zoo, sources.joint)
    named = zoo.location if zoo.repo else f"{zoo.path.resolve().name} ({zoo.digest})"
    return KdeSampler(zoo, rows, codec, sources.joint, settings.kde), {"zoo": named, **used}


def _stepped(step: str, sampler: Sampler, settings: SamplerSettings) -> Sampler:
    if step == REFINED:
        return RefinedSampler(sampler, settings.refinement)
    if step == SELECTED:
        return SubsampledSampler(sampler, settings.selection)
    assert isinstance(sampler, KdeSampler)
    return BootstrappedSampler(sampler, settings.selection)
