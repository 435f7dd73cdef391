"""What commands share: their options, how options override a settings file, and how results are printed."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from weightspace.errors import SettingsError
from weightspace.printing import emit, emit_json
from weightspace.settings import read_settings

T = TypeVar("T")
Result = tuple[Any, Iterable[str]] | tuple[Any, Iterable[str], int]
"""What a command returns: the record that ``--json`` prints, the lines that people read, and perhaps an exit code."""

USER_ERROR = 2
"""Exit code of everything that the user can mend."""

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)


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


def _option(*names: str, **attributes: Any) -> click.Option:
    return click.Option(names, **attributes)


_JSON = _option("--json", "as_json", is_flag=True, help="Print JSON.")
_TOKEN = _option("--token", show_default="that of `hf auth login` or HF_TOKEN", help="Token for the Hub.")
_CONFIG = _option("--config", type=PATH, help="Settings as YAML or JSON; the options below override it.")
_SETTING = "from the settings"
_SHARED = {
    "token": [_TOKEN],
    "hub": [_TOKEN, _option("--local-files-only", is_flag=True, help="Take models of the Hub from the cache only.")],
    "pickle": [
        _option(
            "--allow-pickle", is_flag=True, help="Read plain tensors from pickles where there is no safetensors file."
        )
    ],
    "config": [_CONFIG],
    "training": [
        _CONFIG,
        _option("--steps", "loop__steps", type=int, show_default=_SETTING, help="Optimizer steps."),
        _option("--seed", "loop__seed", type=int, show_default=_SETTING, help="Seed of weights, views and order."),
        _option(
            *("--mixed-precision", "loop__mixed_precision"),
            type=click.Choice(["auto", "no", "bf16", "fp16"]),
            show_default=_SETTING,
        ),
    ],
}

encoder_option = click.option("--encoder", required=True, help="Folder of a trained encoder, or org/name on the Hub.")
joint_option = click.option(
    "--model", "--joint", "joint", required=True, help="Joint model: a folder, or org/name of the Hub."
)
temperature_option = click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    show_default="from the sampler",
    help="Of the sampler codes: 1 samples what it says, 0 takes what is expected.",
)


def output_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the option ``--output``, which is required."""
    return click.option("--output", type=PATH, required=True, help=text)


def command(*shared: str, group: click.Group | None = None) -> Callable[[Callable[..., Result]], click.Command]:
    """Makes a command of a function with click's options that returns its result.

    Args:
        shared: names of groups of shared options, which come last; ``token`` and ``hub`` become the argument
            ``options``, a `HubOptions`.
        group: what the command is a part of.
    """

    def decorate(function: Callable[..., Result]) -> click.Command:
        @functools.wraps(function, updated=())
        def run(*, as_json: bool, **values: Any) -> None:
            if "token" in values:
                from weightspace.io.hub import HubOptions

                local = values.pop("local_files_only", False)
                values["options"] = HubOptions(token=values.pop("token"), local_files_only=local)
            record, lines, *code = function(**values)
            if as_json:
                emit_json(record)
            else:
                emit(lines)
            if any(code):
                raise click.exceptions.Exit(code[0])

        own = reversed(getattr(function, "__click_params__", ()))
        parameters = [*own, *(option for name in shared for option in _SHARED[name]), _JSON]
        return (group.command if group else click.command)(params=parameters)(run)

    return decorate


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


def settings_from(cls: type[T], config: Path | None, overrides: Mapping[str, Any]) -> T:
    """Builds settings from a file (or the defaults) and the options that were given.

    Args:
        cls: dataclass of the settings.
        config: file of settings, or None for the defaults.
        overrides: field names, with a dot or two underscores between those of nested dataclasses; None is an option
            that was not given.

    Raises:
        SettingsError: the file does not fit ``cls``, or a value is refused.
    """
    settings = cls() if config is None else read_settings(cls, config)
    for name, value in overrides.items():
        if value is not None:
            settings = _replaced(settings, name.replace("__", ".").split("."), value)
    return settings


def _replaced(settings: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    if rest:
        value = _replaced(getattr(settings, name), rest, value)
    try:
        return dataclasses.replace(settings, **{name: value})
    except SettingsError as error:
        raise SettingsError(f"--{name.replace('_', '-')}: {error}") from error
