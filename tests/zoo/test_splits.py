from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import SettingsError, ZooError
from weightspace.zoo.splits import split_by_dataset, split_by_run


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 5), min_size=10, max_size=60), st.integers(0, 99))
def test_no_run_is_on_two_sides_and_every_model_is_on_one(checkpoints: list[int], seed: int) -> None:
    run_ids = np.repeat([f"run{i}" for i in range(len(checkpoints))], checkpoints)
    run_ids = np.random.default_rng(seed).permutation(run_ids)
    split = split_by_run(run_ids, seed)
    sides = [set(run_ids[rows]) for rows in (split.train, split.validation, split.test)]
    assert all(sides)
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert sorted(np.concatenate([split.train, split.validation, split.test])) == list(range(len(run_ids)))


def test_fractions_are_shares_of_runs() -> None:
    run_ids = np.repeat(np.arange(200), np.tile([1, 9], 100))
    split = split_by_run(run_ids, 0, (0.5, 0.25, 0.25))
    assert [len(np.unique(run_ids[side])) for side in (split.train, split.validation, split.test)] == [100, 50, 50]


def test_seed_decides_and_the_order_of_models_does_not() -> None:
    run_ids = np.repeat([f"r{i}" for i in range(30)], 3)
    order = np.random.default_rng(0).permutation(len(run_ids))
    first, shuffled, other = split_by_run(run_ids, 1), split_by_run(run_ids[order], 1), split_by_run(run_ids, 2)
    assert set(run_ids[first.test]) == set(run_ids[order][shuffled.test])
    assert set(run_ids[first.test]) != set(run_ids[other.test])


def test_fixed_test_runs_are_the_test_side_of_every_seed() -> None:
    run_ids = np.repeat([f"r{i}" for i in range(30)], 2)
    splits = [split_by_run(run_ids, seed, test_runs={"r3", "r8", "unknown"}) for seed in (0, 1)]
    assert [set(run_ids[split.test]) for split in splits] == [{"r3", "r8"}] * 2
    assert set(run_ids[splits[0].validation]) != set(run_ids[splits[1].validation])
    assert len(np.unique(run_ids[splits[0].validation])) == round(28 * 0.15 / 0.85)


@pytest.mark.parametrize("fractions", [(0.7, 0.3, 0.0), (0.7, 0.2, 0.2), (1.2, -0.1, -0.1)])
def test_refuses_fractions_that_are_none(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(SettingsError, match="fractions"):
        split_by_run(np.arange(20), 0, fractions)


def test_refuses_too_few_runs_and_useless_test_runs() -> None:
    with pytest.raises(ZooError, match=r"runs: 9 are too few.*at least 10"):
        split_by_run(np.repeat(np.arange(9), 5), 0)
    with pytest.raises(ZooError, match=r"test_runs: 0 of 12"):
        split_by_run(np.arange(12), 0, test_runs=["x"])
    with pytest.raises(ZooError, match=r"test_runs: 12 of 12"):
        split_by_run(np.arange(12), 0, test_runs=[str(i) for i in range(12)])


RUNS = np.repeat([f"r{i}" for i in range(40)], 3)
DATASETS = np.repeat([f"d{i % 8}" for i in range(40)], 3).astype(object)


@pytest.mark.parametrize("seed", range(5))
def test_test_models_are_of_datasets_that_no_other_model_has(seed: int) -> None:
    split = split_by_dataset(RUNS, DATASETS, seed, (0.5, 0.25, 0.25))
    tested = set(DATASETS[split.test])
    assert len(tested) == 2
    assert not tested & set(DATASETS[np.concatenate([split.train, split.validation])])
    assert not set(RUNS[split.train]) & set(RUNS[split.validation])
    assert sorted(np.concatenate([split.train, split.validation, split.test])) == list(range(120))
    assert len(np.unique(RUNS[split.validation])) == 10
    np.testing.assert_array_equal(split.test, split_by_dataset(RUNS, DATASETS, seed, (0.5, 0.25, 0.25)).test)


def test_datasets_and_runs_to_test_on_can_be_given() -> None:
    splits = [split_by_dataset(RUNS, DATASETS, seed, test_datasets=["d1", "d5", "other"]) for seed in (0, 1)]
    assert [set(DATASETS[split.test]) for split in splits] == [{"d1", "d5"}] * 2
    assert not np.array_equal(splits[0].validation, splits[1].validation)
    few = split_by_dataset(RUNS, DATASETS, 0, test_datasets=["d1"], test_runs=["r1", "r9", "r2"])
    assert set(RUNS[few.test]) == {"r1", "r9"}
    assert not set(DATASETS[np.concatenate([few.train, few.validation])]) & {"d1"}


def test_what_may_be_of_either_side_is_on_none() -> None:
    datasets = DATASETS.copy()
    datasets[0] = "d1"  # a model of run 0, whose others are of d0
    datasets[3], datasets[6] = None, float("nan")  # models of unknown data, in a tested and in a training run
    split = split_by_dataset(RUNS, datasets, 0, test_datasets=["d1"])
    sides = set(RUNS[np.concatenate([split.train, split.validation, split.test])])
    assert sides == {f"r{i}" for i in range(40)} - {"r0", "r1", "r2"}


def test_refuses_what_leaves_no_dataset_unseen() -> None:
    with pytest.raises(ZooError, match="datasets: 1 known"):
        split_by_dataset(RUNS, np.full(120, "d0", dtype=object), 0)
    with pytest.raises(ZooError, match="datasets: 0 runs to test on and 40 of other datasets"):
        split_by_dataset(RUNS, DATASETS, 0, test_datasets=["x"])
    with pytest.raises(ZooError, match="datasets: 40 runs to test on and 0 of other datasets"):
        split_by_dataset(RUNS, DATASETS, 0, test_datasets=set(DATASETS))
    with pytest.raises(SettingsError, match="fractions"):
        split_by_dataset(RUNS, DATASETS, 0, (0.5, 0.5, 0.5))
