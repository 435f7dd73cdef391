from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from weightspace.cli.options import settings_from
from weightspace.errors import SettingsError


@dataclass(frozen=True)
class Inner:
    steps: int = 5


@dataclass(frozen=True)
class Outer:
    seed: int = 0
    name: str = "zoo"
    training: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise SettingsError(f"seed is {self.seed}; take 0 or more")


def test_defaults_then_file_then_options(tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text("seed: 3\nname: mine\ntraining: {steps: 7}\n")
    nothing = {"seed": None, "training.steps": None}
    assert settings_from(Outer, None, nothing) == Outer()
    assert settings_from(Outer, tmp_path / "zoo.yaml", nothing) == Outer(3, "mine", Inner(7))
    given = {"seed": 4, "training.steps": 9}
    assert settings_from(Outer, tmp_path / "zoo.yaml", given) == Outer(4, "mine", Inner(9))


def test_a_refused_option_is_named() -> None:
    with pytest.raises(SettingsError, match="--seed: seed is -1"):
        settings_from(Outer, None, {"seed": -1})


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text("seeds: 3\n")
    with pytest.raises(SettingsError, match="'seeds'; did you mean 'seed'"):
        settings_from(Outer, tmp_path / "zoo.yaml", {})
