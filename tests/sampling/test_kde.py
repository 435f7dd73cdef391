from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.encoder import Encoder, embed_zoo
from weightspace.errors import SettingsError
from weightspace.models.codec import LatentCodec
from weightspace.networks.families import FamilyConfig
from weightspace.networks.permutation import permute, random_permutations
from weightspace.sampling.base import Condition, sample
from weightspace.sampling.kde import Anchors, KdeSampler, KdeSettings, noise, picked
from weightspace.search.queries import joint_query
from weightspace.zoo.dataset import Zoo


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_settings(sampler: KdeSampler, **changes: Any) -> KdeSampler:
    """The same models under other settings."""
    settings = replace(sampler.settings, **changes)
    return KdeSampler(sampler._zoo, sampler._rows, sampler.codec, sampler._joint, settings)


def rows_of(zoo: Zoo, family: FamilyConfig) -> np.ndarray:
    return np.flatnonzero([own is not None and own.shapes() == family.shapes() for own in zoo.families])


class TestProbabilities:
    def test_are_importance_weights(
        self,
        tiny_zoo: Zoo,
        tiny_kde: KdeSampler,
        tiny_joint: Encoder,
        tiny_family: FamilyConfig,
        tiny_condition: Condition,
    ) -> None:
        rows = rows_of(tiny_zoo, tiny_family)
        embedded = F.normalize(torch.from_numpy(embed_zoo(tiny_joint, tiny_zoo, rows)), dim=1)
        query = torch.from_numpy(joint_query(tiny_joint, tiny_condition.dataset, tiny_condition.results))
        same = torch.tensor([tiny_zoo.families[row] == tiny_family for row in rows])
        for temperature in (0.5, 2.0):
            weights = torch.where(same, ((embedded @ query) / temperature).exp(), 0.0)
            found = with_settings(tiny_kde, temperature=temperature).probabilities(tiny_condition)
            torch.testing.assert_close(found, weights / weights.sum(), rtol=1e-4, atol=1e-6)
        assert 0 < int(same.sum()) < len(rows)

    def test_are_equal_where_nothing_is_requested(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        found = tiny_kde.probabilities(replace(tiny_condition, dataset=None, results=()))
        assert len(found[found > 0].unique()) == 1

    def test_count_every_activation_where_none_is_known(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        assert (tiny_kde.probabilities(replace(tiny_condition, config=None)) > 0).all()

    def test_only_given_rows_are_anchors(
        self,
        tiny_zoo: Zoo,
        tiny_codec: LatentCodec,
        tiny_joint: Encoder,
        tiny_family: FamilyConfig,
        tiny_condition: Condition,
    ) -> None:
        rows = rows_of(tiny_zoo, tiny_family)[3:7]
        sampler = KdeSampler(tiny_zoo, rows, tiny_codec, tiny_joint, KdeSettings(anchors=1, bandwidth=0.0))
        anchors = sampler.anchors(tiny_condition.architecture)
        assert len(anchors.flat) == 4
        assert torch.equal(anchors.flat.sort().values, tiny_zoo.flat(rows).sort().values)


class TestLatents:
    def test_one_anchor_without_noise_is_the_anchor(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        sampler = with_settings(tiny_kde, anchors=1, bandwidth=0.0)
        found = sampler.latents(tiny_condition, 6, seeded())
        anchors = sampler.anchors(tiny_condition.architecture).latents
        likely = anchors[sampler.probabilities(tiny_condition) > 0]
        assert all((likely == one).flatten(1).all(1).any() for one in found)

    def test_a_sharp_temperature_takes_the_best_anchor(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        sampler = with_settings(tiny_kde, anchors=1, bandwidth=0.0, temperature=1e-6)
        best = int(tiny_kde.probabilities(tiny_condition).argmax())
        (found,) = sampler.latents(tiny_condition, 1, seeded())
        assert torch.equal(found, sampler.anchors(tiny_condition.architecture).latents[best])

    def test_a_mean_of_permuted_copies_is_the_model(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        anchors = tiny_kde.anchors(tiny_condition.architecture)
        flat = anchors.flat[:1].expand(3, -1)
        shuffled = permute(flat, random_permutations(anchors.architecture, 3, seeded()), anchors.architecture)
        assert not torch.equal(shuffled[1], shuffled[0])
        copies = Anchors(
            anchors.architecture, anchors.families[:3], shuffled, anchors.latents[:3], anchors.embeddings[:3]
        )
        centre = tiny_kde._centre(copies, torch.arange(3), torch.tensor([0.5, 0.3, 0.2]))
        expected = tiny_kde.codec.encode(shuffled[:1], anchors.architecture)[0]
        torch.testing.assert_close(centre, expected, rtol=1e-4, atol=1e-5)

    def test_a_generator_gives_the_same_samples_again(self, tiny_kde: KdeSampler, tiny_condition: Condition) -> None:
        first, again, other = (sample(tiny_kde, tiny_condition, 3, seeded(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert first.shape == (3, tiny_condition.architecture.numel)

    def test_weights_are_read_once(
        self, tiny_kde: KdeSampler, tiny_condition: Condition, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = tiny_kde.anchors(tiny_condition.architecture)
        monkeypatch.setattr(Zoo, "batches", None)
        assert tiny_kde.anchors(Condition.from_config(tiny_condition.config or {}).architecture) is kept


class TestNoise:
    LATENTS = torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0]) + 5

    def drawn(self, probabilities: Tensor, **changes: float) -> Tensor:
        settings = KdeSettings(**{"bandwidth": 0.5, **asdict(KdeSettings()), **changes})
        return noise(self.LATENTS, probabilities, 20_000, settings, seeded())

    def test_is_as_wide_as_scotts_rule_says(self) -> None:
        found = self.drawn(torch.full((50,), 1 / 50), bandwidth=0.5)
        expected = 0.5 * self.LATENTS.std(0, correction=0) * 50 ** (-1 / 5)
        torch.testing.assert_close(found.std(0), expected, rtol=0.03, atol=0)
        assert (found.mean(0).abs() < 0.03 * expected).all()

    def test_follows_the_likely_anchors(self) -> None:
        weights = torch.zeros(50)
        weights[:10] = 0.1
        expected = 0.5 * self.LATENTS[:10].std(0, correction=0) * 10 ** (-1 / 5)
        torch.testing.assert_close(self.drawn(weights, bandwidth=0.5).std(0), expected, rtol=0.03, atol=0)

    def test_is_none_around_a_single_anchor_or_without_bandwidth(self) -> None:
        assert not self.drawn(F.one_hot(torch.tensor(3), 50).float()).any()
        assert not self.drawn(torch.full((50,), 1 / 50), bandwidth=0.0).any()


def test_shares_add_up_and_concentrate() -> None:
    spread = {}
    for concentration in (0.1, 100.0):
        settings = KdeSettings(anchors=4, concentration=concentration)
        places, shares = picked(torch.full((9,), 1 / 9), 200, settings, seeded())
        assert places.shape == shares.shape == (200, 4)
        torch.testing.assert_close(shares.sum(1), torch.ones(200))
        spread[concentration] = float(shares.std())
    assert spread[100.0] < 0.05 < 0.3 < spread[0.1]


class TestRefusals:
    def test_an_architecture_that_the_zoo_lacks(
        self, tiny_kde: KdeSampler, tiny_family: FamilyConfig, tiny_condition: Condition
    ) -> None:
        other = Condition.from_config({**tiny_family.to_dict(), "hidden": [5]}).architecture
        with pytest.raises(SettingsError, match=r"none of 48 models .* \(4 tensors, .* or use the flow sampler"):
            tiny_kde.latents(replace(tiny_condition, architecture=other, config=None), 1, seeded())

    def test_a_config_that_the_zoo_lacks(
        self, tiny_kde: KdeSampler, tiny_family: FamilyConfig, tiny_condition: Condition
    ) -> None:
        config = {**tiny_family.to_dict(), "activation": "silu"}
        with pytest.raises(SettingsError, match=r"none of \d+ models .*'activation': 'silu'.* use the flow sampler"):
            tiny_kde.latents(replace(tiny_condition, config=config), 1, seeded())

    @pytest.mark.parametrize(
        ("name", "value"),
        [("anchors", 0), ("temperature", 0.0), ("concentration", -1.0), ("bandwidth", -0.1)],
    )
    def test_settings_that_are_no_density(self, name: str, value: Any) -> None:
        with pytest.raises(SettingsError, match=f"{name}: {value} is .*give"):
            KdeSettings(**{name: value})
