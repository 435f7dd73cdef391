from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from weightspace.encoder import Encoder
from weightspace.errors import SettingsError, ZooError
from weightspace.sampling.base import Condition, Sampler, sample
from weightspace.sampling.kde import KdeSampler
from weightspace.sampling.steps import (
    BootstrappedSampler,
    Objective,
    RefinedSampler,
    SelectedSampler,
    SelectionSettings,
    is_better,
    ranking,
    refitted,
)
from weightspace.search.queries import described_dataset, parse_results

ALL = SelectionSettings(candidates=6, images=10_000)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_training_images(flat: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """Accuracy and cross-entropy of each model on all training images."""
    objective = Objective.of(condition)
    images = objective.draw(1, 10_000, seeded()).expand(len(flat), -1)
    logits = objective.logits(flat, images)
    accuracy = (logits.argmax(-1) == objective.images.train_labels[images]).float().mean(1)
    return accuracy, objective.loss(logits, images)


class TestSubsampled:
    def test_keeps_the_lowest_losses_in_their_order(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        condition = replace(tiny_condition, results=())
        found = sample(SelectedSampler(tiny_kde, ALL), condition, 3, seeded())
        _, losses = on_training_images(found, condition)
        Objective.of(condition).draw(1, 10_000, generator := seeded())
        candidates = sample(tiny_kde, condition, 18, generator)
        _, expected = on_training_images(candidates, condition)
        torch.testing.assert_close(losses, expected.sort().values[:3], rtol=1e-4, atol=1e-5)
        assert losses[0] < expected[:3].min()

    @pytest.mark.parametrize("wanted", ["0.25", "0.26..0.4", ">=0.3"])
    def test_comes_closer_to_the_accuracy_that_is_wanted(
        self, wanted: str, tiny_kde: KdeSampler, tiny_condition: Condition
    ) -> None:
        (one,) = parse_results(wanted)
        condition = replace(tiny_condition, results=(one,))

        def apart(sampler: Sampler) -> float:
            # The density is the same for every wish, so that only the selection differs.
            found = sample(sampler, condition, 4, seeded())
            accuracy, _ = on_training_images(found, condition)
            return float(((one.low - accuracy).clamp_min(0) + (accuracy - one.high).clamp_min(0)).mean())

        assert apart(SelectedSampler(tiny_kde, ALL)) < apart(tiny_kde)

    def test_a_generator_gives_the_same_samples_again(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        sampler = SelectedSampler(tiny_kde, SelectionSettings(candidates=2, images=8))
        first, again, other = (sampler.latents(tiny_condition, 2, seeded(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestBootstrapped:
    def test_more_rounds_are_never_worse(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        condition, losses = replace(tiny_condition, results=()), []
        for sampler in (
            SelectedSampler(tiny_kde, ALL),
            BootstrappedSampler(tiny_kde, replace(ALL, rounds=1)),
            BootstrappedSampler(tiny_kde, replace(ALL, rounds=4)),
        ):
            found = sample(sampler, condition, 3, seeded())
            losses.append(float(on_training_images(found, condition)[1].mean()))
        assert losses[0] > losses[1] > losses[2]

    def test_a_refitted_density_lies_where_the_best_are(self, tiny_kde: KdeSampler) -> None:
        elite = torch.randn(6, 5, 2, generator=seeded()) + 7
        settings = replace(tiny_kde.settings, bandwidth=0.0)
        found = refitted(elite, 50, settings, seeded())
        assert found.shape == (50, 5, 2)
        assert (found <= elite.amax(0) + 1e-5).all()
        assert (found >= elite.amin(0) - 1e-5).all()
        assert len(found.unique(dim=0)) == 50


def test_scores_are_ordered_by_distance_and_then_by_loss() -> None:
    scores = torch.tensor([[0.1, 0.0, 0.1, 0.0], [0.2, 0.9, 0.1, 0.5]]).T
    assert ranking(scores).tolist() == [3, 1, 2, 0]
    others = torch.tensor([[0.1, 0.1, 0.0, 0.0], [0.3, 0.1, 0.9, 0.5]]).T
    assert is_better(scores, others).tolist() == [True, True, False, False]


def test_models_that_give_nan_come_last(tiny_condition: Condition) -> None:
    objective = Objective.of(replace(tiny_condition, results=()))
    flat = torch.zeros(3, tiny_condition.architecture.numel)
    flat[0] = torch.nan
    assert ranking(objective.score(flat, objective.draw(3, 8, seeded())))[-1] == 0


class TestRefusals:
    @pytest.mark.parametrize("kind", [SelectedSampler, BootstrappedSampler])
    def test_nothing_to_judge_by(
        self,
        kind: type[SelectedSampler] | type[BootstrappedSampler],
        tiny_kde: KdeSampler,
        tiny_condition: Condition,
    ) -> None:
        sampler = kind(tiny_kde, ALL)
        with pytest.raises(SettingsError, match="no dataset to judge samples by; give one"):
            sampler.latents(replace(tiny_condition, dataset=None), 1, seeded())
        with pytest.raises(SettingsError, match=r"comes with no config of a family .* \(mlp, cnn\); give one"):
            sampler.latents(replace(tiny_condition, config=None), 1, seeded())

    def test_a_description_has_no_images(
        self, tiny_kde: KdeSampler, tiny_joint: Encoder, tiny_condition: Condition
    ) -> None:
        described = replace(tiny_condition, dataset=described_dataset(tiny_joint, ["a zero", "a one"]))
        refused = r"a zero; a one: is neither a folder nor .*; write digits.*\(a description of classes has no images\)"
        for sampler in (SelectedSampler(tiny_kde), RefinedSampler(tiny_kde)):
            with pytest.raises(ZooError, match=refused):
                sampler.latents(described, 1, seeded())

    def test_images_that_do_not_fit(self, tiny_condition: Condition) -> None:
        assert tiny_condition.dataset is not None
        other = replace(tiny_condition, dataset=replace(tiny_condition.dataset, dataset_id="digits"))
        with pytest.raises(
            SettingsError, match=r"digits: images of shape \(1, 8, 8\) in 10 classes do not fit the architecture"
        ):
            Objective.of(other)

    @pytest.mark.parametrize(("name", "value"), [("candidates", 0), ("images", 0), ("rounds", 0), ("share", 1.5)])
    def test_settings_that_choose_nothing(self, name: str, value: Any) -> None:
        with pytest.raises(SettingsError, match=f"{name}: {value} is .*give"):
            SelectionSettings(**{name: value})
