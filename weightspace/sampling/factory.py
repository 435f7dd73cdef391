"""Samplers by name, built from trained models on disk or on the Hub.

A name is a base, optionally followed by steps, in this order: ``flow``, ``codes`` and ``kde`` are the bases,
``+bootstrapped`` (of ``kde``) or ``+selected`` keeps the best of many samples, and ``+refined`` improves them by
gradients. For example ``kde+bootstrapped+refined``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from weightspace.errors import SettingsError
from weightspace.io.header import shown
from weightspace.io.hub import HubOptions
from weightspace.sampling.base import Sampler, Sources, public_name
from weightspace.sampling.kde import KdeSampler
from weightspace.sampling.priors import CodeSampler, FlowSampler, sampler_of_prior
from weightspace.sampling.steps import BootstrappedSampler, RefinedSampler, SelectedSampler

KDE, SELECTED, BOOTSTRAPPED, REFINED = "kde", "selected", "bootstrapped", "refined"

SAMPLERS: dict[str, Any] = {"flow": FlowSampler, "codes": CodeSampler, KDE: KdeSampler}
"""Classes of samplers by the name of the base; another one is added to it, from anywhere.

A class is a `Sampler` with a dataclass of settings, ``settings_class``, and a class method ``from_sources(name,
sources, settings)`` that returns the sampler and the names of what it was built from, by their role.
"""

STEPS: dict[str, Any] = {
    SELECTED: SelectedSampler,
    BOOTSTRAPPED: BootstrappedSampler,
    REFINED: RefinedSampler,
}
"""Classes of steps, `SamplerStep` with settings, by name; likewise."""


@dataclass(frozen=True, eq=False)
class OpenedSampler:
    """A sampler and where it comes from.

    Attributes:
        name: its name.
        sampler: the sampler.
        sources: names of the models and zoos that it was built from, by their role.
        settings: of each of its parts, by the part's name.
    """

    name: str
    sampler: Sampler
    sources: Mapping[str, str]
    settings: Mapping[str, Any]


def open_sampler(name: str, sources: Sources, settings: Mapping[str, Mapping[str, Any]] | None = None) -> OpenedSampler:
    """Builds a sampler; see the notes of this module.

    Args:
        name: of the sampler.
        sources: what it is built from.
        settings: values that replace the defaults, by name, of parts, by name. None is a default, and parts that the
            sampler lacks are ignored.

    Raises:
        SettingsError: there is no such sampler, or what it is built from is missing or does not fit.
        WeightspaceError: a model cannot be loaded.
    """
    settings = settings or {}
    base, *steps = name.split("+")
    _check_name(name, base, steps)
    parts = {}
    for part in (base, *steps):
        given = {key: value for key, value in settings.get(part, {}).items() if value is not None}
        parts[part] = (STEPS | SAMPLERS)[part].settings_class(**given)
    sampler, used = SAMPLERS[base].from_sources(name, sources, parts[base])
    for step in steps:
        sampler = STEPS[step](sampler, parts[step])
    used = {"joint model": public_name(sources.joint.name, sources.joint.path), **used}
    return OpenedSampler(name, sampler, used, {part: asdict(own) for part, own in parts.items()})


def default_sampler(prior: str, options: HubOptions | None = None) -> str:
    """Returns the name of the sampler that a prior is for.

    Raises:
        WeightspaceError: there is no prior, or no sampler of its type is registered.
    """
    sampler = sampler_of_prior(prior, options)
    return next(name for name, own in SAMPLERS.items() if own is sampler)


def _check_name(name: str, base: str, steps: list[str]) -> None:
    if base not in SAMPLERS:
        raise SettingsError(f"sampler {shown(name)}: {shown(base)} is none; choose of {', '.join(SAMPLERS)}")
    unknown = next((step for step in steps if step not in STEPS), None)
    if unknown is not None:
        raise SettingsError(f"sampler {shown(name)}: {shown(unknown)} is no step; choose of {', '.join(STEPS)}")
    if len(set(steps)) != len(steps) or REFINED in steps[:-1] or {SELECTED, BOOTSTRAPPED} <= set(steps):
        raise SettingsError(f"sampler {name}: select once, then refine, e.g. {base}+{SELECTED}+{REFINED}")
    if BOOTSTRAPPED in steps and base != KDE:
        raise SettingsError(f"sampler {name}: only kde can be bootstrapped; write {base}+{SELECTED}")
