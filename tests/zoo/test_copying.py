from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from weightspace.errors import ZooError
from weightspace.schema import ModelRef
from weightspace.zoo import writer
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.transfer import copy_zoo, without_folders


@pytest.mark.parametrize("size", [1, 5000, 2**28])
def test_chosen_models_keep_their_bytes_and_facts(
    tiny_zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(writer, "SHARD_MODELS", 7)
    monkeypatch.setattr(writer, "SHARD_BYTES", size)
    rows = np.arange(1, 48, 3)
    copy = copy_zoo(tiny_zoo, rows, tmp_path / "copy", settings={"copy": 1})
    assert [copy.blob(row) for row in range(len(copy))] == [tiny_zoo.blob(row) for row in rows]
    assert list(copy.entries()) == [tiny_zoo.entry(row) for row in rows]
    assert copy.result_names == tiny_zoo.result_names and copy.settings == {"copy": 1}


def test_the_same_settings_give_the_same_digest(tiny_zoo: Zoo, tmp_path: Path) -> None:
    assert copy_zoo(tiny_zoo, range(48), tmp_path / "copy", settings=tiny_zoo.settings).digest == tiny_zoo.digest


def test_a_copy_of_nothing_is_refused(tiny_zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no model to make a zoo of"):
        copy_zoo(tiny_zoo, [], tmp_path / "copy", settings={})


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("/home/me/models/a/model.safetensors", "./a/model.safetensors"),
        ("/model.safetensors", "./model.safetensors"),
        ("~/a/b", "./a/b"),
        ("./a/b/c", "./a/b/c"),
        ("org/name", "org/name"),
    ],
)
def test_only_places_on_this_machine_are_cut(place: str, kept: str) -> None:
    ref = ModelRef(place, "main", "x")
    assert without_folders(ref) == ModelRef(kept, "main", "x")
