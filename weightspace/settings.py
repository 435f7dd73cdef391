"""Settings as dataclasses: requirements that annotations declare, and strict reading from mappings and YAML files.

An unknown key, a wrong type and an impossible value are errors that name the key, the value and the fix, so that no
setting is ever ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml

from weightspace.errors import SettingsError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What a value must satisfy, as metadata of its annotation.

    Attributes:
        holds: whether a value satisfies it.
        otherwise: ends the error of a value that does not, e.g. ``"is too small, give 1 or more"``.
    """

    holds: Callable[[Any], bool]
    otherwise: str


_NOT_NEGATIVE = Requirement(lambda value: value >= 0, "is negative; give 0 or more")

PositiveInt = Annotated[int, Requirement(lambda value: value >= 1, "is too small, give 1 or more")]
NonNegativeInt = Annotated[int, _NOT_NEGATIVE]
PositiveFloat = Annotated[float, Requirement(lambda value: value > 0, "is not positive; give more than 0")]
NonNegativeFloat = Annotated[float, _NOT_NEGATIVE]
Fraction = Annotated[float, Requirement(lambda value: 0 <= value <= 1, "is out of range, give 0 to 1")]
FractionBelowOne = Annotated[float, Requirement(lambda value: 0 <= value < 1, "is out of range, give 0 to below 1")]
PositiveFraction = Annotated[
    float, Requirement(lambda value: 0 < value <= 1, "is out of range, give more than 0 and at most 1")
]
NonEmpty = Annotated[tuple[T, ...], Requirement(lambda values: len(values) > 0, "is empty, give at least one value")]
"""``NonEmpty[PositiveInt]`` is a tuple of one or more positive integers."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base class of settings whose annotations are checked however they are built: requirements and literals.

    A requirement is part of the annotation, as in ``steps: PositiveInt = 1000``. A subclass with further checks calls
    ``super().__post_init__()`` first.
    """

    def __post_init__(self) -> None:
        """Checks all fields.

        Raises:
            SettingsError: naming the first setting that fails, its value and the fix.
        """
        for name, hint in _annotations(type(self)).items():  # type: ignore[arg-type]
            _check(getattr(self, name), hint, name)


def settings_from_mapping(cls: type[T], values: Any, *, where: str = "settings") -> T:
    """Builds the dataclass ``cls`` from ``values``; nested dataclasses are built from nested mappings.

    Args:
        cls: a dataclass whose fields are annotated with types.
        values: a mapping whose keys are field names.
        where: what the values come from; named in errors.

    Raises:
        SettingsError: an unknown key, a missing key, a wrong type, or a value that ``cls`` refuses.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where}: expected keys and values, got {values!r}; write `key: value` lines")
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    unknown = [key for key in values if key not in known]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        raise SettingsError(f"{where}: unknown key {unknown[0]!r}; {fix}")
    arguments = {key: _converted(value, known[key], f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except (TypeError, SettingsError) as error:
        raise SettingsError(f"{where}: {error}") from error


def read_settings(cls: type[T], path: str | Path) -> T:
    """Reads the dataclass ``cls`` from a YAML (or JSON) file.

    Raises:
        SettingsError: the file is missing or unreadable, or its content does not fit ``cls``.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such settings file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot read the settings file: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return settings_from_mapping(cls, values or {}, where=str(path))


@lru_cache(maxsize=256)
def _annotations(cls: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check(value: Any, hint: Any, where: str) -> None:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        for requirement in hint.__metadata__:
            if isinstance(requirement, Requirement) and not requirement.holds(value):
                raise SettingsError(f"{where}: {value!r} {requirement.otherwise}")
        _check(value, options[0], where)
    elif origin in (Union, types.UnionType):
        alternatives = [option for option in options if option is not types.NoneType]
        if value is not None and len(alternatives) == 1:
            _check(value, alternatives[0], where)
    elif origin is Literal and value not in options:
        raise SettingsError(f"{where}: {value!r} is not one of {', '.join(map(repr, options))}")
    elif origin is tuple and isinstance(value, tuple):
        item_hints = options[:1] * len(value) if options[-1] is Ellipsis else options
        for item, item_hint in zip(value, item_hints, strict=False):
            _check(item, item_hint, where)


def _converted(value: Any, hint: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        for option in options:
            try:
                return _converted(value, option, where)
            except SettingsError:
                continue
        raise _mistyped(where, value, hint)
    if origin is Literal:
        _check(value, hint, where)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _mistyped(where, value, hint)
        if len(options) == 2 and options[1] is Ellipsis:
            return tuple(_converted(item, options[0], where) for item in value)
        if len(value) != len(options):
            raise _mistyped(where, value, hint)
        return tuple(_converted(item, option, where) for item, option in zip(value, options, strict=True))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _mistyped(where, value, hint)
        return {key: _converted(item, options[1], f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else settings_from_mapping(hint, value, where=where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint in (int, float) and isinstance(value, bool)):
        return value
    raise _mistyped(where, value, hint)


def _mistyped(where: str, value: Any, hint: Any) -> SettingsError:
    expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return SettingsError(f"{where}: expected {expected}, got {value!r} ({type(value).__name__})")
