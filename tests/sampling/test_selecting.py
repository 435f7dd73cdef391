from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from weightspace.encoder import Encoder
from weightspace.errors import SettingsError, ZooError
from weightspace.evaluation.judging import Judgement, task_of
from weightspace.sampling.conditions import Blueprint, Condition
from weightspace.sampling.kde import KdeSampler
from weightspace.sampling.refining import RefinedSampler
from weightspace.sampling.samplers import Sampler, sample
from weightspace.sampling.selecting import BootstrappedSampler, SelectionSettings, SubsampledSampler, refitted
from weightspace.search.queries import described_dataset, parse_results

ALL = SelectionSettings(candidates=6, images=10_000)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_training_images(flat: Tensor, condition: Condition, blueprint: Blueprint) -> tuple[Tensor, Tensor]:
    """Accuracy and cross-entropy of each model on all training images."""
    task = task_of(condition, blueprint)
    images = task.draw(1, 10_000, seeded()).expand(len(flat), -1)
    logits = task.logits(flat, images)
    accuracy = (logits.argmax(-1) == task.dataset.train_labels[images]).float().mean(1)
    return accuracy, task.loss(logits, images)


class TestSubsampled:
    def test_keeps_the_lowest_losses_in_their_order(
        self, tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint
    ) -> None:
        condition = replace(tiny_condition, wanted=())
        found = sample(SubsampledSampler(tiny_kde, ALL), condition, tiny_blueprint, 3, seeded())
        _, losses = on_training_images(found, condition, tiny_blueprint)
        task_of(condition, tiny_blueprint).draw(1, 10_000, generator := seeded())
        candidates = sample(tiny_kde, condition, tiny_blueprint, 18, generator)
        _, expected = on_training_images(candidates, condition, tiny_blueprint)
        torch.testing.assert_close(losses, expected.sort().values[:3], rtol=1e-4, atol=1e-5)
        assert losses[0] < expected[:3].min()

    @pytest.mark.parametrize("wanted", ["0.25", "0.26..0.4", ">=0.3"])
    def test_comes_closer_to_the_accuracy_that_is_wanted(
        self, wanted: str, tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint
    ) -> None:
        (one,) = parse_results(wanted)
        condition = replace(tiny_condition, wanted=(one,))

        def apart(sampler: Sampler) -> float:
            # The density is the same for every wish, so that only the selection differs.
            found = sample(sampler, condition, tiny_blueprint, 4, seeded())
            accuracy, _ = on_training_images(found, condition, tiny_blueprint)
            return float(((one.low - accuracy).clamp_min(0) + (accuracy - one.high).clamp_min(0)).mean())

        assert apart(SubsampledSampler(tiny_kde, ALL)) < apart(tiny_kde)

    def test_a_generator_gives_the_same_samples_again(
        self, tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint
    ) -> None:
        sampler = SubsampledSampler(tiny_kde, SelectionSettings(candidates=2, images=8))
        first, again, other = (sampler.latents(tiny_condition, tiny_blueprint, 2, seeded(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestBootstrapped:
    def test_more_rounds_are_never_worse(
        self, tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint
    ) -> None:
        condition, losses = replace(tiny_condition, wanted=()), []
        for sampler in (
            SubsampledSampler(tiny_kde, ALL),
            BootstrappedSampler(tiny_kde, replace(ALL, rounds=1)),
            BootstrappedSampler(tiny_kde, replace(ALL, rounds=4)),
        ):
            found = sample(sampler, condition, tiny_blueprint, 3, seeded())
            losses.append(float(on_training_images(found, condition, tiny_blueprint)[1].mean()))
        assert losses[0] > losses[1] > losses[2]

    def test_a_refitted_density_lies_where_the_best_are(self, tiny_kde: KdeSampler) -> None:
        elite = torch.randn(6, 5, 2, generator=seeded()) + 7
        settings = replace(tiny_kde.settings, bandwidth=0.0)
        found = refitted(elite, 50, settings, seeded())
        assert found.shape == (50, 5, 2)
        assert (found <= elite.amax(0) + 1e-5).all()
        assert (found >= elite.amin(0) - 1e-5).all()
        assert len(found.unique(dim=0)) == 50


def test_judgements_are_ordered_by_distance_and_then_by_loss() -> None:
    judged = Judgement(torch.tensor([0.1, 0.0, 0.1, 0.0]), torch.tensor([0.2, 0.9, 0.1, 0.5]))
    assert judged.order().tolist() == [3, 1, 2, 0]
    other = Judgement(torch.tensor([0.1, 0.1, 0.0, 0.0]), torch.tensor([0.3, 0.1, 0.9, 0.5]))
    better = judged.better_than(other)
    assert better.tolist() == [True, True, False, False]
    merged = other.replaced(judged, better)
    assert merged.loss.tolist() == pytest.approx([0.2, 0.9, 0.9, 0.5])


def test_models_that_give_nan_come_last(tiny_condition: Condition, tiny_blueprint: Blueprint) -> None:
    task = task_of(replace(tiny_condition, wanted=()), tiny_blueprint)
    flat = torch.zeros(3, tiny_blueprint.architecture.numel)
    flat[0] = torch.nan
    assert task.judge(flat, task.draw(3, 8, seeded())).order()[-1] == 0


class TestRefusals:
    @pytest.mark.parametrize("kind", [SubsampledSampler, BootstrappedSampler])
    def test_nothing_to_judge_by(
        self,
        kind: type[SubsampledSampler] | type[BootstrappedSampler],
        tiny_kde: KdeSampler,
        tiny_condition: Condition,
        tiny_blueprint: Blueprint,
    ) -> None:
        sampler = kind(tiny_kde, ALL)
        with pytest.raises(SettingsError, match="no dataset to judge samples by; give one"):
            sampler.latents(replace(tiny_condition, dataset=None), tiny_blueprint, 1, seeded())
        with pytest.raises(SettingsError, match=r"comes with no config of a family .* \(mlp, cnn\); give one"):
            sampler.latents(tiny_condition, replace(tiny_blueprint, config=None), 1, seeded())

    def test_a_description_has_no_images(
        self, tiny_kde: KdeSampler, tiny_joint: Encoder, tiny_condition: Condition, tiny_blueprint: Blueprint
    ) -> None:
        described = replace(tiny_condition, dataset=described_dataset(tiny_joint, ["a zero", "a one"]))
        refused = r"a zero; a one: is neither a folder nor .*; write digits.*\(a description of classes has no images\)"
        for sampler in (SubsampledSampler(tiny_kde), RefinedSampler(tiny_kde)):
            with pytest.raises(ZooError, match=refused):
                sampler.latents(described, tiny_blueprint, 1, seeded())

    def test_images_that_do_not_fit(self, tiny_condition: Condition, tiny_blueprint: Blueprint) -> None:
        assert tiny_condition.dataset is not None
        other = Condition(replace(tiny_condition.dataset, dataset_id="digits"))
        with pytest.raises(
            SettingsError, match=r"digits: images of shape \(1, 8, 8\) in 10 classes do not fit .*'mlp'"
        ):
            task_of(other, tiny_blueprint)

    @pytest.mark.parametrize(("name", "value"), [("candidates", 0), ("images", 0), ("rounds", 0), ("share", 1.5)])
    def test_settings_that_choose_nothing(self, name: str, value: Any) -> None:
        with pytest.raises(SettingsError, match=f"{name}: {value} is .*give"):
            SelectionSettings(**{name: value})
