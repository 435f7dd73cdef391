from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from weightspace.errors import SettingsError
from weightspace.evaluation.accuracy import FineTuning, ModelSet, accuracies, fine_tune, predictions
from weightspace.evaluation.baselines import from_scratch
from weightspace.zoo.dataset import Zoo


def model_set(zoo: Zoo, row: int = 0, count: int = 3, dataset: str | None = None) -> ModelSet:
    """Models of the config, architecture and dataset of the zoo's ``row``."""
    families, index = zoo.families, zoo.index
    config = families[row]
    assert config is not None
    same = [number for number, own in enumerate(families) if own == config][:count]
    architecture = zoo.architectures[index["header"][row]]
    return ModelSet(dataset or index["dataset"][row], config, architecture, zoo.flat(same))


def other_config(zoo: Zoo) -> int:
    return next(row for row, config in enumerate(zoo.families) if config != zoo.families[0])


def test_no_training_is_evaluation(tiny_zoo: Zoo) -> None:
    one = model_set(tiny_zoo)
    (found,) = fine_tune([one], FineTuning(epochs=(0,)), seed=0)
    for number, flat in enumerate(one.flat):
        alone = ModelSet(one.dataset, one.config, one.architecture, flat.unsqueeze(0))
        assert found[0, number] == accuracies(alone)[0]
    assert found[0, 0] == pytest.approx(tiny_zoo.index["test_accuracy"][0], abs=1e-6)


def test_training_helps_and_leaves_the_given_weights_alone(tiny_zoo: Zoo) -> None:
    one = model_set(tiny_zoo)
    before = one.flat.clone()
    (found,) = fine_tune([one], FineTuning(epochs=(0, 1, 5)), seed=0)
    assert found.shape == (3, 3)
    assert (np.diff(found.mean(1)) > 0).all()
    assert torch.equal(one.flat, before)


def test_the_seed_decides_the_order_of_images(tiny_zoo: Zoo) -> None:
    one = model_set(tiny_zoo)
    drawn = from_scratch(one.config, one.architecture, 4, torch.Generator().manual_seed(0))
    again = from_scratch(one.config, one.architecture, 4, torch.Generator().manual_seed(0))
    scratch = replace(one, flat=drawn)
    settings = FineTuning(epochs=(1, 2))
    (first,), (same,), (other,) = (
        fine_tune([chosen], settings, seed=seed)
        for chosen, seed in ((scratch, 0), (replace(one, flat=again), 0), (scratch, 1))
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_configs_and_datasets_are_kept_apart(tiny_zoo: Zoo) -> None:
    datasets = tiny_zoo.index["dataset"].unique()
    sets = [
        model_set(tiny_zoo, dataset=datasets[0]),
        model_set(tiny_zoo, other_config(tiny_zoo), 2, datasets[1]),
        model_set(tiny_zoo, count=1, dataset=datasets[2]),
    ]
    settings = FineTuning(epochs=(0,))
    together = fine_tune(sets, settings, seed=0)
    for one, found in zip(sets, together, strict=True):
        assert np.array_equal(found, fine_tune([one], settings, seed=0)[0])


def test_a_budget_does_not_depend_on_the_others(tiny_zoo: Zoo) -> None:
    one = model_set(tiny_zoo)
    (alone,) = fine_tune([one], FineTuning(epochs=(1,)), seed=0)
    (beside,) = fine_tune([one], FineTuning(epochs=(3, 1)), seed=0)
    assert np.array_equal(alone[0], beside[1])


def test_images_that_do_not_fit_are_refused(tiny_zoo: Zoo) -> None:
    with pytest.raises(
        SettingsError, match=r"digits: images .* in 10 classes do not fit the architecture \(classes: 5, .*; choose"
    ):
        predictions(model_set(tiny_zoo, dataset="digits"))


def test_weights_of_another_config_are_refused(tiny_zoo: Zoo) -> None:
    one = model_set(tiny_zoo)
    with pytest.raises(SettingsError, match="give the config that the weights are of"):
        replace(one, config=replace(one.config, classes=7))


@pytest.mark.parametrize("changes", [{"epochs": ()}, {"epochs": (-1,)}, {"learning_rate": 0.0}, {"batch_size": 0}])
def test_settings_without_meaning_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(changes))):
        FineTuning(**changes)
