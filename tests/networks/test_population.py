from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from weightspace.errors import SettingsError
from weightspace.networks import population
from weightspace.networks.families import CNNConfig, FamilyConfig, MLPConfig, Network
from weightspace.networks.population import Recipe, Snapshot, train_population
from weightspace.schema import ImageDataset

CLASSES = 3
MLP, CNN = MLPConfig((1, 4, 4), CLASSES, (5,)), CNNConfig((1, 4, 4), CLASSES, (3, 4), activation="tanh")
WIDE = MLPConfig((1, 4, 4), CLASSES, (32,), "gelu")


def dataset(name: str, seed: int, count: int = 30) -> ImageDataset:
    """Noise in which one pixel of the second row shines, and whose first pixel names the class to the tests."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, count, 1, 4, 4, generator=generator)
    labels = torch.arange(2 * count).view(2, count) % CLASSES
    images[:, :, 0, 0, 0] = labels / CLASSES
    images[:, :, 0, 1, :CLASSES] += 3 * F.one_hot(labels, CLASSES)
    return ImageDataset(name, images[0], labels[0], images[1], labels[1], CLASSES)


DATASETS = {"one": dataset("one", 0), "two": dataset("two", 1, 20)}


def recipe(number: int = 0, config: FamilyConfig = MLP, **changes: Any) -> Recipe:
    plain = Recipe("one", config, 0.01, 0.1, 12, 6, f"run-{number}")
    return replace(plain, **changes)


def train(
    *recipes: Recipe, checkpoints: tuple[float, ...] = (1.0,), batch_size: int = 8, seed: int = 0
) -> list[Snapshot]:
    return list(train_population(recipes, DATASETS, checkpoints=checkpoints, batch_size=batch_size, seed=seed))


def weights(snapshots: list[Snapshot]) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """Parameters by (member, step)."""
    return {
        (member, step): {name: value[place] for name, value in snapshot.parameters.items()}
        for snapshot in snapshots
        for place, (member, step) in enumerate(zip(snapshot.members, snapshot.steps, strict=True))
    }


@pytest.mark.parametrize("config", [MLP, CNN], ids=["mlp", "cnn"])
def test_models_trained_together_are_models_trained_alone(
    config: FamilyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [
        recipe(0, config, learning_rate=0.03, weight_decay=0.0, steps=4),
        recipe(1, config, learning_rate=0.003, weight_decay=1.0, steps=9, initialization="xavier_normal"),
        recipe(2, config, dataset="two", train_size=20, steps=7),
    ]
    batches: list[torch.Tensor] = []
    initial: dict[str, torch.Tensor] = {}
    forward = population.stacked_forward

    def recording(config: FamilyConfig, parameters: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            initial.update({} if initial else {n: value.detach().clone() for n, value in parameters.items()})
            batches.append(images)
        return forward(config, parameters, images)

    monkeypatch.setattr(population, "stacked_forward", recording)
    found = weights(train(*recipes))
    assert sorted(found) == [(0, 4), (1, 9), (2, 7)]
    assert [len(images) for images in batches] == [3] * 4 + [2] * 3 + [1] * 2  # finished runs cost nothing
    for number, one in enumerate(recipes):
        module = Network(config)
        module.load_state_dict({name: value[number] for name, value in initial.items()})
        named = dict(module.named_parameters())
        groups = [
            {"params": [p for n, p in named.items() if n.endswith("weight")], "weight_decay": one.weight_decay},
            {"params": [p for n, p in named.items() if n.endswith("bias")], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=one.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, one.steps)
        for step in range(one.steps):
            images = batches[step][sum(before.steps > step for before in recipes[:number])]
            labels = (images[:, 0, 0, 0] * CLASSES).round().long()
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()
            schedule.step()
        for name, value in found[number, one.steps].items():
            torch.testing.assert_close(value, named[name].detach(), rtol=1e-4, atol=1e-5, msg=f"{number} {name}")


class TestResults:
    def test_are_those_of_the_module_on_its_own_images(self) -> None:
        recipes = [recipe(0, CNN, steps=3), recipe(1, CNN, dataset="two", train_size=20, steps=3)]
        (snapshot,) = train(*recipes)
        for place, one in enumerate(recipes):
            module = Network(CNN)
            module.load_state_dict({name: value[place] for name, value in snapshot.parameters.items()})
            images = DATASETS[one.dataset]
            logits = module(images.test_images)
            correct = (logits.argmax(1) == images.test_labels).float().mean()
            loss = F.cross_entropy(logits, images.test_labels)
            torch.testing.assert_close(snapshot.results["test_accuracy"][place], correct)
            torch.testing.assert_close(snapshot.results["test_loss"][place], loss.detach())
            if one.train_size == len(images.train_images):
                loss = F.cross_entropy(module(images.train_images), images.train_labels)
                torch.testing.assert_close(snapshot.results["train_loss"][place], loss.detach())

    def test_training_scores_are_on_the_noisy_labels_that_were_learned(self) -> None:
        (snapshot,) = train(recipe(config=WIDE, learning_rate=0.03, label_noise=1.0, steps=150))
        assert snapshot.results["train_accuracy"] > 0.9 > 0.6 > snapshot.results["test_accuracy"]

    def test_training_helps(self) -> None:
        snapshots = train(recipe(config=WIDE, learning_rate=0.03, train_size=30, steps=100), checkpoints=(0.01, 1.0))
        first, last = (float(snapshot.results["test_accuracy"]) for snapshot in snapshots)
        assert last > 0.8 > first


class TestCheckpoints:
    def test_are_shares_of_each_runs_own_steps(self) -> None:
        found = weights(train(recipe(0, steps=4), recipe(1, steps=10), checkpoints=(0.5, 1.0)))
        assert sorted(found) == [(0, 2), (0, 4), (1, 5), (1, 10)]

    def test_a_step_is_kept_once_and_never_before_the_first(self) -> None:
        assert sorted(weights(train(recipe(steps=3), checkpoints=(0.01, 0.1, 0.3, 1.0)))) == [(0, 1), (0, 3)]

    def test_earlier_ones_are_not_overwritten_by_later_training(self) -> None:
        early = weights(train(recipe(), checkpoints=(0.5,)))
        kept = weights(train(recipe(), checkpoints=(0.5, 1.0)))
        for name, value in early[0, 3].items():
            assert torch.equal(kept[0, 3][name], value)
            assert not torch.equal(kept[0, 6][name], value)


class TestRecipe:
    CHANGES: dict[str, Any] = {  # noqa: RUF012
        "dataset": "two",
        "config": replace(MLP, activation="tanh"),
        "learning_rate": 0.02,
        "weight_decay": 0.2,
        "initialization": "xavier_normal",
        "label_noise": 0.9,
        "train_size": 13,
        "steps": 7,
    }

    def test_is_tried_whole(self) -> None:
        assert {field.name for field in fields(Recipe)} == {"run_id", *self.CHANGES}

    @pytest.mark.parametrize("name", CHANGES)
    def test_everything_in_it_changes_the_model(self, name: str) -> None:
        (plain,) = train(recipe())
        (changed,) = train(recipe(**{name: self.CHANGES[name]}))
        assert not torch.equal(changed.parameters["head.weight"], plain.parameters["head.weight"])

    def test_hyperparameters_are_what_a_probe_may_predict(self) -> None:
        assert recipe(config=CNN).hyperparameters() == {
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "initialization": "kaiming_uniform",
            "label_noise": 0.0,
            "steps": 6,
            "family": "cnn",
            "activation": "tanh",
        }


def test_the_seed_decides_everything() -> None:
    (one,), (same,), (other,) = train(recipe()), train(recipe()), train(recipe(), seed=1)
    for name, value in one.parameters.items():
        assert torch.equal(value, same.parameters[name])
        assert not torch.equal(value, other.parameters[name])


def test_runs_of_one_population_are_drawn_apart() -> None:
    found = weights(train(recipe(0), recipe(1)))
    assert not torch.equal(found[0, 6]["head.weight"], found[1, 6]["head.weight"])


def test_label_noise_replaces_its_share_of_labels() -> None:
    labels = torch.zeros(4000, dtype=torch.int64)
    one = ImageDataset("one", torch.zeros(4000, 1, 4, 4), labels, torch.zeros(1, 1, 4, 4), labels[:1], CLASSES)
    recipes = [recipe(label_noise=share, train_size=4000) for share in (0.0, 0.3)]
    train, _ = population._examples(recipes, [one], CLASSES, torch.Generator().manual_seed(0))
    # A label is drawn among all classes, so that a third of the replaced ones stays what it was.
    assert (train.labels != 0).float().mean(1).tolist() == pytest.approx([0.0, 0.2], abs=0.02)


class TestGivenWeights:
    def given(self, models: int = 1) -> dict[str, torch.Tensor]:
        return population.initialize(MLP, ["xavier_normal"] * models, torch.Generator().manual_seed(7))

    def trained(self, initial: dict[str, torch.Tensor], *recipes: Recipe, **options: Any) -> Snapshot:
        (snapshot,) = train_population(
            recipes, DATASETS, checkpoints=(1.0,), batch_size=8, seed=0, initial=initial, **options
        )
        return snapshot

    def test_are_where_training_starts(self) -> None:
        initial = self.given()
        still = self.trained(initial, recipe(learning_rate=1e-12))
        for name, value in still.parameters.items():
            torch.testing.assert_close(value, initial[name])

    def test_are_not_changed(self) -> None:
        initial = self.given(2)
        kept = {name: value.clone() for name, value in initial.items()}
        found = self.trained(initial, recipe(0), recipe(1))
        for name, value in kept.items():
            assert torch.equal(initial[name], value)
            assert not torch.equal(found.parameters[name], value)

    def test_decide_what_the_scheme_would(self) -> None:
        one, other = (
            self.trained(self.given(), recipe(initialization=scheme)) for scheme in ("xavier_normal", "kaiming_uniform")
        )
        assert torch.equal(one.parameters["head.weight"], other.parameters["head.weight"])

    def test_of_another_architecture_are_refused(self) -> None:
        with pytest.raises(SettingsError, match=r"initial weights have the shapes .*; the recipes need"):
            self.trained(self.given(2), recipe())


def test_passes_see_every_image_once_before_any_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    forward = population.stacked_forward

    def recording(config: FamilyConfig, parameters: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(images[:, :, 0, 3, 3])
        return forward(config, parameters, images)

    monkeypatch.setattr(population, "stacked_forward", recording)
    recipes = [recipe(0, train_size=30, steps=15), recipe(1, dataset="two", train_size=20, steps=15)]
    list(train_population(recipes, DATASETS, checkpoints=(1.0,), batch_size=8, seed=0, in_passes=True))
    for order, one in zip(torch.cat(seen, dim=1), recipes, strict=True):
        images = DATASETS[one.dataset].train_images[:, 0, 3, 3].sort().values
        passes = order[: len(order) // one.train_size * one.train_size].view(-1, one.train_size)
        assert len(passes) >= 4
        assert all(torch.equal(one_pass.sort().values, images) for one_pass in passes)
        assert not torch.equal(passes[0], passes[1])


def test_recipes_of_two_architectures_are_refused() -> None:
    with pytest.raises(SettingsError, match="one architecture"):
        train(recipe(0, MLP), recipe(1, CNN))


def test_more_training_images_than_there_are_is_refused() -> None:
    with pytest.raises(SettingsError, match="train_size 21 exceeds its 20"):
        train(recipe(dataset="two", train_size=21))
