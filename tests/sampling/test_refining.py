from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from weightspace.errors import SettingsError
from weightspace.evaluation.judging import Task, task_of
from weightspace.sampling.conditions import Blueprint, Condition
from weightspace.sampling.kde import KdeSampler
from weightspace.sampling.refining import Decode, RefinedSampler, RefinementSettings, refine
from weightspace.sampling.samplers import sample
from weightspace.search.queries import parse_results

SETTINGS = RefinementSettings(steps=20, images=64, held_back=128, learning_rate=0.3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decoding(sampler: KdeSampler, task: Task) -> Decode:
    return partial(sampler.codec.decode, architecture=task.architecture)


@pytest.fixture
def start(tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint) -> torch.Tensor:
    return tiny_kde.latents(tiny_condition, tiny_blueprint, 5, seeded())


def test_lowers_the_loss_on_other_images(
    start: torch.Tensor, tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint
) -> None:
    task = task_of(replace(tiny_condition, wanted=()), tiny_blueprint)
    kept = refine(start, task, decoding(tiny_kde, task), SETTINGS, seeded())
    images = task.draw(1, 10_000, seeded(1)).expand(5, -1)
    with torch.no_grad():
        before, after = (
            task.judge(tiny_kde.codec.decode(latents, task.architecture), images).loss for latents in (start, kept)
        )
    assert (after < before).all()
    assert not kept.requires_grad


def test_each_sample_is_refined_by_itself(
    start: torch.Tensor, tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint
) -> None:
    """Adam in a plain loop over the models, each with the images that it has in the batch."""
    task = task_of(replace(tiny_condition, wanted=()), tiny_blueprint)
    settings, codec = replace(SETTINGS, steps=4), tiny_kde.codec
    together = refine(start, task, decoding(tiny_kde, task), settings, seeded())
    drawn = task.draw(len(start), settings.images + settings.held_back, seeded())
    assert len(drawn.sort(1).values.unique(dim=0)) == len(start)
    for number, images in enumerate(drawn):
        own, held_back = images[None, : settings.images], images[None, settings.images :]
        latents = start[number : number + 1].clone().requires_grad_()
        adam, path = torch.optim.Adam([latents], lr=settings.learning_rate), []
        for step in range(settings.steps + 1):
            flat = codec.decode(latents, task.architecture)
            path.append((float(task.judge(flat.detach(), held_back).loss), latents.detach().clone()[0]))
            if step < settings.steps:
                adam.zero_grad()
                task.loss(task.logits(flat, own), own).sum().backward()
                adam.step()
        expected = min(path, key=lambda one: one[0])[1]
        torch.testing.assert_close(together[number], expected, rtol=1e-3, atol=1e-3)
    codec.model.zero_grad()


def test_stops_where_the_accuracy_is_nearest_to_the_wanted_one(
    start: torch.Tensor, tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint
) -> None:
    reached = {}
    for wanted in ("0.35", ">=0.9"):
        condition = replace(tiny_condition, wanted=parse_results(wanted))
        task = task_of(condition, tiny_blueprint)
        kept = refine(start, task, decoding(tiny_kde, task), replace(SETTINGS, steps=40), seeded())
        images = task.draw(1, 10_000, seeded(1)).expand(5, -1)
        with torch.no_grad():
            logits = task.logits(tiny_kde.codec.decode(kept, task.architecture), images)
        accuracy = (logits.argmax(-1) == task.dataset.train_labels[images]).float().mean(1)
        reached[wanted] = float(accuracy.mean())
    assert reached["0.35"] == pytest.approx(0.35, abs=0.1)
    assert reached[">=0.9"] > reached["0.35"] + 0.1


def test_the_autoencoder_collects_no_gradients(
    tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint
) -> None:
    model = tiny_kde.codec.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sampler = RefinedSampler(tiny_kde, replace(SETTINGS, steps=2))
    first, again, other = (sample(sampler, tiny_condition, tiny_blueprint, 2, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, sample(tiny_kde, tiny_condition, tiny_blueprint, 2, seeded()))
    assert all(value.grad is None for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TestRefusals:
    def test_no_images_to_hold_back(
        self, tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint
    ) -> None:
        sampler = RefinedSampler(tiny_kde, replace(SETTINGS, images=10_000))
        with pytest.raises(SettingsError, match=r"images: 10000 of \d+ training images of digits.*give fewer"):
            sampler.latents(tiny_condition, tiny_blueprint, 1, seeded())

    def test_no_dataset(self, tiny_kde: KdeSampler, tiny_condition: Condition, tiny_blueprint: Blueprint) -> None:
        with pytest.raises(SettingsError, match="no dataset to judge samples by; give one"):
            RefinedSampler(tiny_kde).latents(replace(tiny_condition, dataset=None), tiny_blueprint, 1, seeded())

    @pytest.mark.parametrize(("name", "value"), [("steps", 0), ("images", 0), ("held_back", 0), ("learning_rate", 0.0)])
    def test_settings_that_go_nowhere(self, name: str, value: Any) -> None:
        with pytest.raises(SettingsError, match=f"{name}: {value} is .*give"):
            RefinementSettings(**{name: value})
