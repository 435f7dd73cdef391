from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightspace import settings as settings_module
from weightspace.errors import SettingsError
from weightspace.settings import (
    FractionBelowOne,
    NonEmpty,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Requirement,
    read_settings,
    settings_from_mapping,
)


@dataclass(frozen=True)
class Inner:
    steps: int = 10
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SettingsError(f"steps is {self.steps}; take 1 or more")


@dataclass(frozen=True)
class Settings:
    name: str
    flag: bool = False
    kind: Literal["mlp", "cnn"] = "mlp"
    shape: tuple[int, int] = (1, 2)
    widths: tuple[float, ...] = ()
    limit: int | None = None
    either: int | str = 0
    loose: Any = None
    inner: Inner = field(default_factory=Inner)
    table: Mapping[str, float] = field(default_factory=dict)
    derived: int = field(default=0, init=False)


EVERYTHING = {
    "name": "a",
    "flag": True,
    "kind": "cnn",
    "shape": [3, 4],
    "widths": [1, 2.5],
    "limit": 5,
    "either": "x",
    "loose": [{"anything": None}],
    "inner": {"steps": 7, "rate": 1},
    "table": {"b": 2},
}


def test_every_kind_of_value_is_read() -> None:
    settings = settings_from_mapping(Settings, EVERYTHING)
    assert settings == Settings(
        "a", True, "cnn", (3, 4), (1.0, 2.5), 5, "x", [{"anything": None}], Inner(7, 1.0), {"b": 2.0}
    )
    assert all(type(width) is float for width in settings.widths)
    assert settings_from_mapping(Settings, {"name": "a", "limit": None}) == Settings("a")
    assert settings_from_mapping(Settings, {"name": "a", "inner": Inner(3)}).inner == Inner(3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "a"}, r"zoo\.yaml: unknown key 'nam'; did you mean 'name'\?"),
        ({"zzz": 1}, r"zoo\.yaml: unknown key 'zzz'; known keys: name, flag"),
        ({"name": "a", "derived": 1}, "unknown key 'derived'"),
        ({}, r"zoo\.yaml: .*'name'"),
        ({"name": 3}, r"zoo\.yaml: name: expected str, got 3 \(int\)"),
        ({"name": "a", "flag": 1}, r"flag: expected bool, got 1 \(int\)"),
        ({"name": "a", "kind": "rnn"}, "kind: 'rnn' is not one of 'mlp', 'cnn'"),
        ({"name": "a", "shape": [1]}, r"shape: expected .*tuple\[int, int\], got \[1\]"),
        ({"name": "a", "shape": 1}, r"shape: expected .*tuple\[int, int\], got 1"),
        ({"name": "a", "shape": [1, True]}, r"shape: expected int, got True \(bool\)"),
        ({"name": "a", "widths": "12"}, "widths: expected"),
        ({"name": "a", "widths": [True]}, "widths: expected float, got True"),
        ({"name": "a", "limit": "5"}, r"limit: expected int \| None, got '5' \(str\)"),
        ({"name": "a", "either": 1.5}, r"either: expected int \| str, got 1\.5"),
        ({"name": "a", "inner": 5}, "inner: expected keys and values, got 5"),
        ({"name": "a", "inner": {"stps": 5}}, "inner: unknown key 'stps'; did you mean 'steps'"),
        ({"name": "a", "inner": {"steps": 0}}, "steps is 0; take 1 or more"),
        ({"name": "a", "table": 5}, "table: expected"),
        ({"name": "a", "table": {"b": "c"}}, r"table\.b: expected float, got 'c'"),
        ([1, 2], r"expected keys and values, got \[1, 2\]"),
        ("text", "expected keys and values, got 'text'"),
    ],
)
def test_refusals_name_the_key_and_the_mend(values: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings_from_mapping(Settings, values, where="zoo.yaml")


def test_a_file_that_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "zoo.yaml"
    path.write_text("name: ü\nwidths: [1, 2]\n", encoding="utf-8")
    assert read_settings(Settings, path) == Settings("ü", widths=(1.0, 2.0))
    path.write_text("", encoding="utf-8")
    assert read_settings(Inner, path) == Inner()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: no such settings file"):
        read_settings(Inner, tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="cannot read the settings file"):
        read_settings(Inner, tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"steps: \xff")
    with pytest.raises(SettingsError, match=r"bytes\.yaml: cannot read"):
        read_settings(Inner, tmp_path / "bytes.yaml")
    (tmp_path / "bad.yaml").write_text("steps: [1\nrate: 2")
    with pytest.raises(SettingsError, match=r"bad\.yaml: not valid YAML") as caught:
        read_settings(Inner, tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "python.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(SettingsError, match="not valid YAML"):
        read_settings(Inner, tmp_path / "python.yaml")


@given(
    st.builds(
        Settings,
        name=st.text(),
        flag=st.booleans(),
        kind=st.sampled_from(["mlp", "cnn"]),
        shape=st.tuples(st.integers(), st.integers()),
        widths=st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
        limit=st.none() | st.integers(),
        either=st.integers() | st.text(),
        inner=st.builds(Inner, steps=st.integers(min_value=1), rate=st.floats(0, 1)),
        table=st.dictionaries(st.text(), st.floats(0, 1)),
    )
)
def test_what_is_written_as_json_reads_back(settings: Settings) -> None:
    values = {key: value for key, value in asdict(settings).items() if key != "derived"}
    assert settings_from_mapping(Settings, json.loads(json.dumps(values))) == settings


@dataclass(frozen=True)
class Checked(settings_module.Settings):
    steps: PositiveInt = 1
    drop: FractionBelowOne = 0.0
    rate: PositiveFloat | None = None
    decay: NonNegativeFloat = 0.0
    share: PositiveFraction = 1.0
    solver: Literal["euler", "heun"] = "euler"
    widths: NonEmpty[PositiveInt] = (1,)
    pair: tuple[Annotated[int, Requirement(lambda n: n > 1, "is too small, give 2 or more")], str] = (2, "")
    either: int | str = 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: 0 is too small, give 1 or more"),
        ({"drop": 1.0}, "drop: 1.0 is out of range, give 0 to below 1"),
        ({"drop": float("nan")}, "drop: nan is out of range, give 0 to below 1"),
        ({"rate": 0.0}, "rate: 0.0 is not positive; give more than 0"),
        ({"decay": -1.0}, "decay: -1.0 is negative; give 0 or more"),
        ({"share": 0.0}, "share: 0.0 is out of range, give more than 0 and at most 1"),
        ({"solver": "rk4"}, "solver: 'rk4' is not one of 'euler', 'heun'"),
        ({"widths": ()}, "widths: () is empty, give at least one value"),
        ({"widths": (3, 0)}, "widths: 0 is too small, give 1 or more"),
        ({"pair": (1, "a")}, "pair: 1 is too small, give 2 or more"),
    ],
)
def test_requirements_of_annotations_hold_in_code_and_in_files(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        Checked(**changes)
    with pytest.raises(SettingsError, match=re.escape(f"settings: {message}")):
        settings_from_mapping(Checked, changes)


def test_values_that_meet_their_requirements_are_kept() -> None:
    assert Checked(steps=3, rate=0.5, widths=(1, 2), either="x").widths == (1, 2)
