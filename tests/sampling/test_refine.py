from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from weightspace.data.images import load_images
from weightspace.errors import SettingsError
from weightspace.evaluation.baselines import from_scratch
from weightspace.sampling.base import Condition, sample
from weightspace.sampling.kde import KdeSampler
from weightspace.sampling.steps import (
    Decode,
    Objective,
    RefinedSampler,
    RefinementSettings,
    refine,
    refined_from_scratch,
)
from weightspace.search.queries import parse_results
from weightspace.zoo.dataset import Zoo

SETTINGS = RefinementSettings(steps=20, images=64, held_back=128, learning_rate=0.3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decoding(sampler: KdeSampler, objective: Objective) -> Decode:
    return partial(sampler.codec.decode, architecture=objective.architecture)


@pytest.fixture
def start(tiny_kde: KdeSampler, tiny_condition: Condition) -> torch.Tensor:
    return tiny_kde.latents(tiny_condition, 5, seeded())


def test_lowers_the_loss_on_other_images(start: torch.Tensor, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
    objective = Objective.of(replace(tiny_condition, results=()))
    kept = refine(start, objective, decoding(tiny_kde, objective), SETTINGS, seeded())
    images = objective.draw(1, 10_000, seeded(1)).expand(5, -1)
    with torch.no_grad():
        before, after = (
            objective.score(tiny_kde.codec.decode(latents, objective.architecture), images)[:, 1]
            for latents in (start, kept)
        )
    assert (after < before).all()
    assert not kept.requires_grad


def test_each_sample_is_refined_by_itself(start: torch.Tensor, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
    """Adam in a plain loop over the models, each with the images that it has in the batch."""
    objective = Objective.of(replace(tiny_condition, results=()))
    settings, codec = replace(SETTINGS, steps=4), tiny_kde.codec
    together = refine(start, objective, decoding(tiny_kde, objective), settings, seeded())
    drawn = objective.draw(len(start), settings.images + settings.held_back, seeded())
    assert len(drawn.sort(1).values.unique(dim=0)) == len(start)
    for number, images in enumerate(drawn):
        own, held_back = images[None, : settings.images], images[None, settings.images :]
        latents = start[number : number + 1].clone().requires_grad_()
        adam, path = torch.optim.Adam([latents], lr=settings.learning_rate), []
        for step in range(settings.steps + 1):
            flat = codec.decode(latents, objective.architecture)
            path.append((float(objective.score(flat.detach(), held_back)[0, 1]), latents.detach().clone()[0]))
            if step < settings.steps:
                adam.zero_grad()
                objective.loss(objective.logits(flat, own), own).sum().backward()
                adam.step()
        expected = min(path, key=lambda one: one[0])[1]
        torch.testing.assert_close(together[number], expected, rtol=1e-3, atol=1e-3)
    codec.model.zero_grad()


def test_stops_where_the_accuracy_is_nearest_to_the_wanted_one(
    start: torch.Tensor, tiny_kde: KdeSampler, tiny_condition: Condition
) -> None:
    reached = {}
    for wanted in ("0.35", ">=0.9"):
        condition = replace(tiny_condition, results=parse_results(wanted))
        objective = Objective.of(condition)
        kept = refine(start, objective, decoding(tiny_kde, objective), replace(SETTINGS, steps=40), seeded())
        images = objective.draw(1, 10_000, seeded(1)).expand(5, -1)
        with torch.no_grad():
            logits = objective.logits(tiny_kde.codec.decode(kept, objective.architecture), images)
        accuracy = (logits.argmax(-1) == objective.images.train_labels[images]).float().mean(1)
        reached[wanted] = float(accuracy.mean())
    assert reached["0.35"] == pytest.approx(0.35, abs=0.1)
    assert reached[">=0.9"] > reached["0.35"] + 0.1


def test_the_autoencoder_collects_no_gradients(tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
    model = tiny_kde.codec.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sampler = RefinedSampler(tiny_kde, replace(SETTINGS, steps=2))
    first, again, other = (sample(sampler, tiny_condition, 2, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, sample(tiny_kde, tiny_condition, 2, seeded()))
    assert all(value.grad is None for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _Counted(Objective):
    """Notes which images each model learns from and is scored on."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        object.__setattr__(self, "learned", [])
        object.__setattr__(self, "scored", [])

    def loss(self, logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        if logits.requires_grad:
            self.learned.append(images)  # type: ignore[attr-defined]
        return super().loss(logits, images)

    def score(self, flat: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        self.scored.append(images)  # type: ignore[attr-defined]
        return super().score(flat, images)


class TestRefinedFromScratch:
    SETTINGS = RefinementSettings(steps=4, images=16, held_back=32, learning_rate=0.03)

    @pytest.fixture
    def objective(self, tiny_zoo: Zoo) -> _Counted:
        batch = next(tiny_zoo.batches())
        config = tiny_zoo.families[batch.rows[0]]
        assert config is not None
        return _Counted(load_images(tiny_zoo.index["dataset"][batch.rows[0]]), config, batch.architecture, None)

    def refined(self, objective: Objective, seed: int = 0, **changes: Any) -> torch.Tensor:
        return refined_from_scratch(objective, 3, replace(self.SETTINGS, **changes), seeded(seed))

    def test_takes_as_many_steps_and_images(self, objective: Any) -> None:
        self.refined(objective)
        assert [tuple(images.shape) for images in objective.learned] == [(3, 16)] * 4
        assert [tuple(images.shape) for images in objective.scored] == [(3, 32)] * 5
        own, held_back = objective.learned[0], objective.scored[0]
        assert all(torch.equal(images, own) for images in objective.learned)
        assert not any(set(a.tolist()) & set(b.tolist()) for a, b in zip(own, held_back, strict=True))

    def test_starts_from_untrained_weights_and_improves_them(self, objective: Objective) -> None:
        start = from_scratch(objective.family, objective.architecture, 3, torch.Generator().manual_seed(0))
        assert torch.equal(self.refined(objective, learning_rate=1e-30), start)
        images = objective.draw(1, 10_000, torch.Generator().manual_seed(1)).expand(3, -1)
        assert (objective.score(self.refined(objective), images) < objective.score(start, images))[:, 1].all()

    def test_is_decided_by_the_generator(self, objective: Objective) -> None:
        assert torch.equal(self.refined(objective), self.refined(objective))
        assert not torch.equal(self.refined(objective), self.refined(objective, seed=1))

    def test_needs_images_to_hold_back(self, objective: Objective) -> None:
        with pytest.raises(SettingsError, match=r"images: 10000 of \d+ training images of digits.*give fewer"):
            self.refined(objective, images=10_000)


class TestRefusals:
    def test_no_images_to_hold_back(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        sampler = RefinedSampler(tiny_kde, replace(SETTINGS, images=10_000))
        with pytest.raises(SettingsError, match=r"images: 10000 of \d+ training images of digits.*give fewer"):
            sampler.latents(tiny_condition, 1, seeded())

    def test_no_dataset(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        with pytest.raises(SettingsError, match="no dataset to judge samples by; give one"):
            RefinedSampler(tiny_kde).latents(replace(tiny_condition, dataset=None), 1, seeded())

    @pytest.mark.parametrize(("name", "value"), [("steps", 0), ("images", 0), ("held_back", 0), ("learning_rate", 0.0)])
    def test_settings_that_go_nowhere(self, name: str, value: Any) -> None:
        with pytest.raises(SettingsError, match=f"{name}: {value} is .*give"):
            RefinementSettings(**{name: value})
