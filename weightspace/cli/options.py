"""Options that several commands share, and how options override a settings file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from weightspace.errors import SettingsError
from weightspace.settings import read_settings

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
config_option = click.option(
    "--config", type=click.Path(path_type=Path), help="Settings as YAML or JSON; the options below override it."
)


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
