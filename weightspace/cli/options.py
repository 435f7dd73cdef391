"""Options that several commands share, and how options override a settings file."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from weightspace.errors import SettingsError
from weightspace.settings import read_settings

T = TypeVar("T")


class Amount(click.ParamType):
    """A whole number, with a unit if need be: ``50M`` is fifty million, ``64MB`` so many bytes, ``1GiB`` 2**30."""

    name = "amount"

    def __init__(self, unit: str = "") -> None:
        """Takes ``unit``, which may be left out, behind the prefix."""
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads the text of an option."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*([kmgtKMGT]?)(i?){self._unit}?", value, re.IGNORECASE)
        if match is None or (match[3] and not match[2]):
            self.fail(f"{value!r} is no amount; write e.g. 50M{self._unit}", param, ctx)
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
config_option = click.option(
    "--config", type=click.Path(path_type=Path), help="Settings as YAML or JSON; the options below override it."
)

_HUB_OPTIONS = (
    click.option("--token", show_default="that of `hf auth login` or HF_TOKEN", help="Token for the Hub."),
    click.option("--local-files-only", is_flag=True, help="Take models of the Hub from the cache only."),
)
pickle_option = click.option(
    "--allow-pickle", is_flag=True, help="Read plain tensors from pickles where there is no safetensors file."
)

temperature_option = click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    show_default="from the sampler",
    help="Of the sampler codes: 1 samples what it says, 0 takes what is expected.",
)


def ensure_codes(temperature: float | None, samplers: Sequence[str]) -> None:
    """Refuses a temperature that no sampler has a use for.

    Raises:
        SettingsError: none of the samplers draws codes.
    """
    if temperature is not None and not any(name.split("+")[0] == "codes" for name in samplers):
        raise SettingsError(
            f"--temperature: {temperature:g} is for the sampler codes and not for {', '.join(samplers)}; "
            "leave it out, or give a prior of codes (weightspace train prior --codes)"
        )


def hub_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say how the Hub is reached; the command gets them as ``options``, a `HubOptions`."""

    @functools.wraps(command)
    def with_options(*arguments: Any, token: str | None, local_files_only: bool, **values: Any) -> Any:
        from weightspace.io.hub import HubOptions

        return command(*arguments, options=HubOptions(token=token, local_files_only=local_files_only), **values)

    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(_HUB_OPTIONS), with_options)


def settings_from(cls: type[T], config: Path | None, overrides: Mapping[str, Any]) -> T:
    """Builds settings from a file (or the defaults) and the options that were given.

    Args:
        cls: dataclass of the settings.
        config: file of settings, or None for the defaults.
        overrides: field names, dotted for nested dataclasses; None is an option that was not given.

    Raises:
        SettingsError: the file does not fit ``cls``, or a value is refused.
    """
    settings = cls() if config is None else read_settings(cls, config)
    for name, value in overrides.items():
        if value is not None:
            settings = _replaced(settings, name.split("."), value)
    return settings


def _replaced(settings: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    if rest:
        value = _replaced(getattr(settings, name), rest, value)
    try:
        return dataclasses.replace(settings, **{name: value})
    except SettingsError as error:
        raise SettingsError(f"--{name.replace('_', '-')}: {error}") from error
