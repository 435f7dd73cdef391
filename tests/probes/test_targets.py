from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from weightspace.errors import SettingsError, ZooError
from weightspace.io.writing import checkpoint_bytes
from weightspace.probes.targets import TARGETS, Labels, class_membership, read_target
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.importing import import_folder

RUNS = 48
HOSTILE = "relu\x1b[31m" + "u" * 200


def make_zoo(folder: Path, rows: list[dict]) -> Zoo:
    """Imports one small model a row; equal ``run`` values are one run."""
    (folder / "models").mkdir(parents=True)
    for number in range(len(rows)):
        file = folder / "models" / f"{number}.safetensors"
        file.write_bytes(checkpoint_bytes({"w": torch.full((2, 2), float(number))}))
    lines = [json.dumps({"file": f"{number}.safetensors", **row}) for number, row in enumerate(rows)]
    (folder / "models" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    import_folder(folder / "models", folder / "zoo", on_problem="error")
    return load_zoo(folder / "zoo")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    def row(number: int) -> dict:
        optimizer = ("adam", "sgd", HOSTILE, "rare")[3 if number < 3 else number % 3]
        return {
            "run": f"run{number}",
            "dataset": f"digits?rotation={90 * (number % 4)}" if number else None,
            "test_accuracy": number / RUNS,
            "hyperparameters": {
                "optimizer": optimizer,
                "learning_rate": 10.0 ** -(number % 4) if number else "auto",
                "weight_decay": [0, 0.1, 0.01][number % 3],
                "amsgrad": number % 2 == 0,
                "rare": f"{number}x",
                "same": "x",
                "nested": {"a": 1},
                "negative": -1,
            },
        }

    return make_zoo(tmp_path_factory.mktemp("targets"), [row(number) for number in range(RUNS)])


class TestNumbers:
    def test_are_results_and_hyperparameters(self, zoo: Zoo) -> None:
        np.testing.assert_array_equal(read_target(zoo, "test_accuracy"), np.arange(RUNS) / RUNS)
        rates = read_target(zoo, "learning_rate")
        assert isinstance(rates, np.ndarray)
        assert np.isnan(rates[0]) and rates[1] == 0.1 and rates[3] == 0.001

    def test_may_be_asked_for_on_a_logarithmic_scale(self, zoo: Zoo) -> None:
        np.testing.assert_allclose(read_target(zoo, "log10:learning_rate"), [np.nan, *(-(np.arange(1, RUNS) % 4))])
        np.testing.assert_allclose(read_target(zoo, "log10:weight_decay"), np.resize([np.nan, -1, -2], RUNS))
        for name in ("negative", "optimizer", "unknown"):
            with pytest.raises(SettingsError, match=f"target 'log10:{name}': no model of .* has a positive number"):
                read_target(zoo, f"log10:{name}")


class TestOtherTargets:
    def test_are_added_by_their_name(self, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(TARGETS, "row", lambda zoo: np.arange(len(zoo)) / 2)
        np.testing.assert_array_equal(read_target(zoo, "row"), np.arange(RUNS) / 2)


class TestCategories:
    def test_are_hyperparameters_that_are_no_numbers(self, zoo: Zoo) -> None:
        found = read_target(zoo, "optimizer")
        assert isinstance(found, Labels) and found.exclusive
        assert found.names[0] == "adam" and found.names[2] == "sgd" and "10 runs have are left out (1)" in found.note
        assert "\x1b" not in found.names[1] and len(found.names[1]) <= 100
        assert np.isnan(found.values[:3]).all()
        np.testing.assert_array_equal(found.values[3:6], [[1, 0, 0], [0, 0, 1], [0, 1, 0]])
        truth = read_target(zoo, "amsgrad")
        assert isinstance(truth, Labels) and truth.names == ("False", "True") and not truth.note

    def test_are_what_is_known_of_the_dataset(self, zoo: Zoo) -> None:
        rotation = read_target(zoo, "rotation")
        assert isinstance(rotation, Labels)
        assert rotation.names == ("0 degrees", "180 degrees", "270 degrees", "90 degrees")
        assert np.isnan(rotation.values[0]).all() and rotation.values[1].tolist() == [0, 0, 0, 1]
        own = read_target(zoo, "dataset")
        assert isinstance(own, Labels) and own.names[0] == "digits?rotation=0" and len(own.names) == 4

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("same", r"target 'same': 1 of its values .* at least 10 runs, where a probe needs 2; .*\(there are x\)"),
            ("rare", r"target 'rare': 0 of its .*\(there are 0x, 10x"),
            ("polarity", r"target 'polarity': 1 of its .*\(there are normal\)"),
            (
                "nested",
                r"target 'nested': nothing of that name in .*; there are test_accuracy.*learning_rate.*, classes",
            ),
            ("unknown", "target 'unknown': nothing of that name"),
            ("base_model", "target 'base_model': nothing of that name"),
        ],
    )
    def test_that_no_probe_can_tell_apart_are_refused(self, name: str, words: str, zoo: Zoo) -> None:
        with pytest.raises(SettingsError, match=words):
            read_target(zoo, name)


def save_images(folder: Path, names: list[str]) -> str:
    """Saves a dataset of two images a class that `datasets.load_dataset` opens."""
    labels = [number for number in range(len(names)) for _ in range(2)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [Image.new("L", (4, 4), number) for number in labels]
    folder.mkdir()
    part = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    for split in ("train", "test"):
        part.to_parquet(folder / f"{split}.parquet")
    return str(folder)


class TestClasses:
    def test_are_the_original_ones_whatever_their_order_in_a_variant(self, tmp_path: Path) -> None:
        variants = ["digits?classes=3-1", "digits?classes=1-3&rotation=90", "digits?classes=3-8-0"]
        found = read_target(make_zoo(tmp_path, [{"dataset": name} for name in variants]), "classes")
        assert isinstance(found, Labels) and not found.exclusive
        assert found.names == ("digits:0+digits:8 or digits:1",)
        np.testing.assert_array_equal(found.values, [[0], [0], [1]])
        assert found.note.startswith("3 classes ask 1 questions")

    def test_have_their_names_in_every_dataset_and_numbers_only_in_one(self, tmp_path: Path) -> None:
        pets = save_images(tmp_path / "pets", ["cat", "dog"])
        animals = save_images(tmp_path / "animals", ["eel", "cat", "0"])
        digits = "digits?classes=0-1"
        found = class_membership(make_zoo(tmp_path / "z", [{"dataset": name} for name in (pets, animals, digits)]))
        have = {name: column.tolist() for name, column in zip(found.names, found.values.T, strict=True)}
        own = next(name for name in have if name.endswith("eel"))
        assert own == f"{animals}:0+eel" or "..." in own
        assert have == {own: [0, 1, 0], "cat or digits:0+digits:1": [1, 1, 0], "dog": [1, 0, 0]}

    def test_of_datasets_that_cannot_be_opened_are_not_known_and_named(self, tmp_path: Path) -> None:
        names = ["digits?classes=0-1", "digits?classes=1-2", str(tmp_path / "gone"), None, str(tmp_path / "gone")]
        found = class_membership(make_zoo(tmp_path / "z", [{"dataset": name} for name in names]))
        assert np.isfinite(found.values).all(axis=1).tolist() == [True, True, False, False, False]
        assert "cannot be opened are left out (2, of 1 datasets" in found.note and "no such folder" in found.note

    def test_that_are_the_same_everywhere_are_refused(self, tmp_path: Path, zoo: Zoo) -> None:
        with pytest.raises(SettingsError, match=r"target 'classes': all 4 datasets of .* have the same classes"):
            class_membership(zoo)
        gone = make_zoo(tmp_path, [{"dataset": str(tmp_path / "gone")}])
        with pytest.raises(ZooError, match=r"target 'classes': no dataset of .* can be opened .*no such folder"):
            class_membership(gone)


def test_decisions_weigh_what_is_rare_in_training() -> None:
    kinds = Labels(("rare", r"common", "absent"), np.eye(3), exclusive=True)
    predicted, shares = np.array([[0.2, 0.8, 0.9], [0.05, 0.95, 0.9]]), np.array([0.1, 0.9, 0.0])
    np.testing.assert_array_equal(kinds.answers(predicted, shares), np.eye(3, dtype=bool)[[0, 1]])
    both = Labels(("a", "b"), np.eye(2), exclusive=False)
    np.testing.assert_array_equal(
        both.answers(np.array([[0.2, 0.2]]), np.array([0.1, 0.5])), [[True, False, False, True]]
    )
    np.testing.assert_array_equal(both.members(np.array([[1.0, 0.0]])), [[True, False, False, True]])
