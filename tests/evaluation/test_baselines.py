from __future__ import annotations

import numpy as np
import pytest
import torch

from weightspace.errors import SettingsError
from weightspace.evaluation.baselines import (
    average,
    best_model,
    closest_in_results,
    from_scratch,
    nearest_datasets,
    noisy_copies,
)
from weightspace.networks.families import initialize
from weightspace.networks.flat import unflatten
from weightspace.networks.permutation import permute, random_permutations
from weightspace.zoo.dataset import Zoo, ZooBatch


def first(zoo: Zoo) -> ZooBatch:
    return next(zoo.batches())


def test_models_from_scratch_are_initial_weights(tiny_zoo: Zoo) -> None:
    architecture, config = first(tiny_zoo).architecture, tiny_zoo.families[first(tiny_zoo).rows[0]]
    assert config is not None
    drawn = from_scratch(config, architecture, 3, torch.Generator().manual_seed(0))
    expected = initialize(config, ["kaiming_uniform"] * 3, torch.Generator().manual_seed(0))
    for name, values in unflatten(drawn, architecture).items():
        assert torch.equal(values, expected[name])


def test_noisy_copies_are_as_far_as_requested(tiny_zoo: Zoo) -> None:
    flat, distance = first(tiny_zoo).flat[:3], torch.tensor([0.0, 0.5, 3.0])
    moved = noisy_copies(flat, distance, torch.Generator().manual_seed(0))
    assert (moved - flat).norm(dim=1).tolist() == pytest.approx(distance.tolist(), rel=1e-4)
    assert torch.equal(moved, noisy_copies(flat, distance, torch.Generator().manual_seed(0)))


class TestAverage:
    @pytest.mark.parametrize("aligned", [False, True])
    def test_of_one_model_is_itself(self, tiny_zoo: Zoo, aligned: bool) -> None:
        batch = first(tiny_zoo)
        assert torch.equal(average(batch.flat[:1], batch.architecture, aligned=aligned), batch.flat[:1])

    def test_of_permuted_copies_is_the_model_only_if_they_are_aligned(self, tiny_zoo: Zoo) -> None:
        batch = first(tiny_zoo)
        copies = batch.flat[:1].repeat(4, 1)
        draws = random_permutations(batch.architecture, 4, torch.Generator().manual_seed(0))
        copies = torch.cat([copies[:1], permute(copies, draws, batch.architecture)])
        torch.testing.assert_close(average(copies, batch.architecture, aligned=True), copies[:1])
        assert (average(copies, batch.architecture, aligned=False) - copies[:1]).norm() > 0.1 * copies[0].norm()


def test_the_best_model_is_the_most_accurate_one(tiny_zoo: Zoo) -> None:
    rows = np.arange(3, 30)
    assert best_model(tiny_zoo, rows) == tiny_zoo.index["test_accuracy"][rows].idxmax()


class TestClosestInResults:
    def test_come_nearest_first(self, tiny_zoo: Zoo) -> None:
        known = tiny_zoo.index["test_accuracy"].to_numpy()
        found = closest_in_results(tiny_zoo, np.arange(20), {"test_accuracy": 0.3}, 5, np.random.default_rng(0))
        apart = np.abs(known - 0.3)
        assert apart[found].tolist() == sorted(apart[:20])[:5]

    def test_count_every_result_in_its_own_spread(self, tiny_zoo: Zoo) -> None:
        row = 7
        wanted = {name: float(tiny_zoo.index[name][row]) for name in ("test_loss", "train_loss", "step")}
        found = closest_in_results(tiny_zoo, np.arange(len(tiny_zoo)), wanted, 1, np.random.default_rng(0))
        assert found.tolist() == [row]

    def test_are_drawn_where_nothing_is_requested(self, tiny_zoo: Zoo) -> None:
        one, same, other = (
            closest_in_results(tiny_zoo, np.arange(20), {}, 5, np.random.default_rng(seed)).tolist()
            for seed in (0, 0, 1)
        )
        assert one == same != other

    def test_refuses_a_result_that_the_zoo_does_not_have(self, tiny_zoo: Zoo) -> None:
        with pytest.raises(SettingsError, match=r"'f1' is none of the zoo's; choose of test_accuracy"):
            closest_in_results(tiny_zoo, np.arange(3), {"f1": 1.0}, 1, np.random.default_rng(0))


def test_datasets_are_near_by_the_angle_of_their_embeddings() -> None:
    known = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 100.0])}
    wanted = {"x": torch.tensor([9.0, 2.0]), "y": torch.tensor([0.1, 0.2])}
    assert nearest_datasets(wanted, known) == {"x": "a", "y": "b"}
    with pytest.raises(SettingsError, match="no dataset is known"):
        nearest_datasets(wanted, {})
