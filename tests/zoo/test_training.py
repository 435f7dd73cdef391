from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from weightspace.data.images import load_images
from weightspace.errors import SettingsError, ZooError
from weightspace.networks.families import Network, family_config
from weightspace.settings import settings_from_mapping
from weightspace.zoo import training
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.training import ZooSettings, draw_recipes, train_zoo

SMALL = ZooSettings(
    runs=6,
    architectures=({"family": "mlp", "hidden": [4]}, {"family": "cnn", "channels": [3]}),
    activations=("relu",),
    train_sizes=(30, 40),
    steps=(2, 4),
    checkpoints=(0.5, 1.0),
    batch_size=8,
    device="cpu",
)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestZoo:
    def test_holds_every_checkpoint_of_every_run(self, tiny_zoo: Zoo, tiny_zoo_settings: ZooSettings) -> None:
        index = tiny_zoo.index
        assert len(tiny_zoo) == 48
        assert index["run_id"].value_counts().to_dict() == {f"run-{number:06d}": 2 for number in range(24)}
        for recipe in draw_recipes(tiny_zoo_settings):
            rows = index[index["run_id"] == recipe.run_id]
            assert sorted(rows["step"]) == [recipe.steps / 2, recipe.steps]
            assert set(rows["dataset"]) == {recipe.dataset}
            assert set(rows["train_size"]) == {recipe.train_size}
            stored = {json.dumps(json.loads(text), sort_keys=True) for text in rows["hyperparameters"]}
            assert stored == {json.dumps(recipe.hyperparameters(), sort_keys=True)}

    def test_models_do_what_the_index_says(self, tiny_zoo: Zoo) -> None:
        for row in (0, 17, 31, 47):
            entry, checkpoint = tiny_zoo.entry(row), tiny_zoo.checkpoint(row)
            assert entry.config is not None
            assert entry.dataset is not None
            module, images = Network(family_config(entry.config)), load_images(entry.dataset)
            assert module is not None
            module.load_state_dict(checkpoint.tensors())
            correct = (module(images.test_images).argmax(1) == images.test_labels).float().mean()
            assert entry.results["test_accuracy"] == pytest.approx(float(correct), abs=0.01)

    def test_symmetries_of_the_models_are_known(self, tiny_zoo: Zoo) -> None:
        sizes = [[group.size for group in one.groups] for one in tiny_zoo.architectures.values()]
        assert sorted(sizes) == [[3, 4], [6]]


class TestRecipes:
    def test_architectures_and_datasets_are_dealt_evenly(self) -> None:
        recipes = draw_recipes(replace(SMALL, runs=64))
        assert set(Counter((r.dataset, r.config.family) for r in recipes).values()) == {1}
        assert len({r.dataset for r in recipes}) == 4 * 4 * 2

    def test_every_value_of_a_grid_is_drawn(self) -> None:
        settings = ZooSettings(runs=150)
        recipes = draw_recipes(settings)
        for name, drawn in (
            ("learning_rates", {r.learning_rate for r in recipes}),
            ("weight_decays", {r.weight_decay for r in recipes}),
            ("initializations", {r.initialization for r in recipes}),
            ("label_noise", {r.label_noise for r in recipes}),
            ("train_sizes", {r.train_size for r in recipes}),
            ("steps", {r.steps for r in recipes}),
            ("activations", {r.config.activation for r in recipes}),
        ):
            assert drawn == set(getattr(settings, name)), name

    def test_the_seed_decides(self) -> None:
        assert draw_recipes(SMALL) == draw_recipes(SMALL) != draw_recipes(replace(SMALL, seed=1))


class TestRepeatability:
    def test_the_same_settings_give_the_same_bytes(self, tmp_path: Path) -> None:
        for name, settings in (("a", SMALL), ("b", SMALL), ("c", replace(SMALL, seed=1))):
            train_zoo(settings, tmp_path / name)
        assert content(tmp_path / "a") == content(tmp_path / "b")
        assert not set(Zoo(tmp_path / "c").flat([0])[0].tolist()) <= set(Zoo(tmp_path / "a").flat([0])[0].tolist())

    @pytest.mark.parametrize("survived", [0, 1])
    def test_a_kill_between_shards_costs_one_shard(
        self, survived: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train_zoo(SMALL, tmp_path / "whole")
        started: list[int] = []
        train_shard = training._train_shard

        def dying(number: int, *rest: Any) -> Any:
            started.append(number)
            if len(started) == survived + 1:
                raise KeyboardInterrupt
            return train_shard(number, *rest)

        monkeypatch.setattr(training, "_train_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            train_zoo(SMALL, tmp_path / "killed")
        with pytest.raises(ZooError, match="incomplete"):
            Zoo(tmp_path / "killed")
        train_zoo(SMALL, tmp_path / "killed")
        shards = [0, 1]
        assert started == shards[: survived + 1] + shards[survived:]
        assert content(tmp_path / "killed") == content(tmp_path / "whole")

    def test_a_complete_zoo_is_left_as_it_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train_zoo(SMALL, tmp_path / "zoo")
        before = content(tmp_path / "zoo")
        monkeypatch.setattr(training, "train_population", None)
        # Where a zoo is trained is not part of what it is.
        assert len(train_zoo(replace(SMALL, device="auto"), tmp_path / "zoo")) == 12
        assert content(tmp_path / "zoo") == before

    def test_a_folder_holds_the_zoo_of_one_settings(self, tmp_path: Path) -> None:
        train_zoo(SMALL, tmp_path / "zoo")
        with pytest.raises(ZooError, match="zoo"):
            train_zoo(replace(SMALL, batch_size=9), tmp_path / "zoo")


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            *(({field.name: []}, field.name) for field in fields(ZooSettings) if isinstance(field.default, tuple)),
            ({"runs": 0}, "runs"),
            ({"batch_size": 0}, "batch_size"),
            ({"train_sizes": [10, 0]}, "train_sizes"),
            ({"steps": [0]}, "steps"),
            ({"checkpoints": [0.0]}, "checkpoints"),
            ({"checkpoints": [1.5]}, "checkpoints"),
            ({"label_noise": [-0.1]}, "label_noise"),
            ({"learning_rates": [0.0]}, "learning_rates"),
            ({"weight_decays": [-1.0]}, "weight_decays"),
            ({"class_subsets": [[0, 1], [0, 1, 2]]}, "class_subsets"),
            ({"polarities": ["negative"]}, "polarities"),
            ({"activations": ["sine"]}, "activations"),
            ({"learning_rate": [0.1]}, "did you mean 'learning_rates'"),
            ({"runs": "many"}, "runs"),
        ],
    )
    def test_name_the_key(self, change: dict[str, Any], named: str) -> None:
        with pytest.raises(SettingsError, match=named):
            settings_from_mapping(ZooSettings, change)

    @pytest.mark.parametrize(
        ("change", "error", "named"),
        [
            ({"architectures": ({"family": "rnn"},)}, SettingsError, "rnn"),
            ({"architectures": ({"family": "mlp", "classes": 3},)}, SettingsError, "classes comes from the dataset"),
            ({"architectures": ({"family": "mlp", "hiden": [3]},)}, SettingsError, "did you mean 'hidden'"),
            ({"train_sizes": (10**6,)}, SettingsError, "train_size 1000000"),
            ({"rotations": (45,)}, ZooError, "rotation=45"),
            ({"class_subsets": ((0, 11),)}, ZooError, "11"),
            ({"dataset": "no/such/folder"}, ZooError, "no/such/folder"),
        ],
    )
    def test_of_what_does_not_fit_the_dataset(
        self, change: dict[str, Any], error: type[Exception], named: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error, match=named):
            train_zoo(replace(SMALL, **change), tmp_path / "zoo")


def test_training_goes_where_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    train_population = training.train_population
    monkeypatch.setattr(
        training, "train_population", lambda *a, **k: asked.append(k["device"]) or train_population(*a, **k)
    )
    train_zoo(replace(SMALL, device="auto"), tmp_path / "zoo")
    assert set(asked) == {"cuda" if torch.cuda.is_available() else "cpu"}
