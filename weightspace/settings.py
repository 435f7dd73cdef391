"""Settings as dataclasses: strict reading from mappings and YAML files.

An unknown key, a wrong type and an impossible value are errors that name the key, the value and the mend, so that no
setting is ever read by nobody.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from weightspace.errors import SettingsError

T = TypeVar("T")


def settings_from_mapping(cls: type[T], values: Any, *, where: str = "settings") -> T:
    """Builds the dataclass ``cls`` from ``values``; nested dataclasses are built from nested mappings.

    Args:
        cls: a dataclass whose fields are annotated with types.
        values: a mapping whose keys are field names.
        where: what the values come from; named in errors.

    Raises:
        SettingsError: an unknown key, a missing key, a wrong type, or whatever ``cls.__post_init__`` refuses.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where}: expected keys and values, got {values!r}; write `key: value` lines")
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    unknown = [key for key in values if key not in known]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), known, n=1)
        mend = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        raise SettingsError(f"{where}: unknown key {unknown[0]!r}; {mend}")
    arguments = {key: _converted(value, known[key], f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except TypeError as error:
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


def _converted(value: Any, hint: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        for option in options:
            try:
                return _converted(value, option, where)
            except SettingsError:
                continue
        raise _mistyped(where, value, hint)
    if origin is typing.Literal:
        if value not in options:
            raise SettingsError(f"{where}: {value!r} is not one of {', '.join(map(repr, options))}")
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
