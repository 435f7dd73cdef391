from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from weightspace.errors import SettingsError
from weightspace.evaluation.accuracy import FineTuning, ModelSet, accuracies
from weightspace.evaluation.comparison import (
    ALIGNED_AVERAGE,
    ANY,
    AVERAGE,
    BEST,
    DISAGREEMENT,
    DISTANCE,
    ERROR,
    HELD_OUT,
    INDEPENDENT,
    NOISE,
    OVERLAP,
    RELATIVE_DISTANCE,
    SAMPLES,
    SCRATCH,
    SPEARMAN,
    ZOO,
    ComparisonRow,
    ComparisonSettings,
    accuracy_after,
    compare,
)
from weightspace.networks.families import MLPConfig
from weightspace.networks.infer import infer_architecture
from weightspace.networks.permutation import permute, random_permutations
from weightspace.schema import TensorSpec
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.training import train_zoo

SETTINGS = ComparisonSettings(fine_tuning=FineTuning(epochs=(0, 1)), checkpoints=2)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, tiny_zoo_settings: Any) -> Zoo:
    """Three datasets, each with four runs of each of two architectures."""
    settings = replace(
        tiny_zoo_settings,
        class_subsets=((0, 1, 2, 3, 4),),
        rotations=(0, 90, 180),
        polarities=("normal",),
        activations=("relu",),
        steps=(20, 40),
    )
    return train_zoo(settings, tmp_path_factory.mktemp("comparison") / "zoo")


def split(zoo: Zoo) -> tuple[np.ndarray, list[str], str]:
    """Rows of three of four runs of two datasets, these datasets, and the third."""
    datasets = list(dict.fromkeys(zoo.index["dataset"]))
    runs = np.array([int(run.removeprefix("run-")) for run in zoo.index["run_id"]])
    return np.flatnonzero(zoo.index["dataset"].isin(datasets[:2]) & (runs < 18)), datasets[:2], datasets[2]


def copies(zoo: Zoo, rows: np.ndarray, **changes: Any) -> ModelSet:
    """The zoo's own models as if they were sampled, meant for the dataset of the first."""
    row = int(rows[0])
    config = zoo.families[row]
    assert config is not None
    values = zoo.index.iloc[row]
    same = [int(n) for n in rows if zoo.families[n] == config and zoo.index["dataset"][n] == values["dataset"]]
    sampled = ModelSet(values["dataset"], config, zoo.architectures[values["header"]], zoo.flat(same))
    return replace(sampled, **changes)


def by_subject(rows: list[ComparisonRow], **wanted: str) -> Mapping[tuple[str, str], ComparisonRow]:
    chosen = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    found = {(row.measure, row.subject): row for row in chosen}
    assert len(found) == len(chosen)
    return found


def test_copies_of_training_models_are_found_out(zoo: Zoo) -> None:
    training, datasets, _ = split(zoo)
    own = [training[zoo.index["dataset"].to_numpy()[training] == dataset] for dataset in datasets]
    plain = [copies(zoo, rows) for rows in own]
    moved = [
        replace(
            one,
            flat=permute(
                one.flat,
                random_permutations(one.architecture, len(one.flat), torch.Generator().manual_seed(0)),
                one.architecture,
            ),
        )
        for one in plain
    ]
    rows = compare({"plain": plain, "permuted": moved}, zoo, training, SETTINGS)
    assert {row.sampler for row in rows} == {"plain", "permuted"}
    for sampler in ("plain", "permuted"):
        found = by_subject(rows, sampler=sampler)
        assert found[DISTANCE, SAMPLES].value == found[RELATIVE_DISTANCE, SAMPLES].value == 0
        assert found[DISTANCE, HELD_OUT].value > 0.1
        assert found[OVERLAP, SAMPLES].value == pytest.approx(1)
        assert found[accuracy_after(0), NOISE].value == pytest.approx(found[accuracy_after(0), SAMPLES].value)


def test_accuracies_are_those_of_the_models(zoo: Zoo) -> None:
    training, datasets, _ = split(zoo)
    sampled = copies(zoo, training)
    found = by_subject(compare({"it": [sampled]}, zoo, training, SETTINGS))
    expected = float(accuracies(sampled).mean())
    row = found[accuracy_after(0), SAMPLES]
    assert row.value == pytest.approx(expected)
    assert row.values == ((datasets[0], row.value),)
    assert row.low is row.high is None
    subjects = (SAMPLES, SCRATCH, ZOO, BEST, AVERAGE, ALIGNED_AVERAGE, NOISE)
    assert [subject for measure, subject in found if measure == accuracy_after(1)] == list(subjects)
    seen = zoo.index.iloc[training].query("dataset == @sampled.dataset")
    assert found[accuracy_after(0), BEST].value == pytest.approx(seen["test_accuracy"].max(), abs=1e-6)
    assert found[accuracy_after(1), SAMPLES].value > found[accuracy_after(1), SCRATCH].value


def test_unseen_datasets_borrow_from_the_nearest_one(zoo: Zoo) -> None:
    training, datasets, unseen = split(zoo)
    samples = [copies(zoo, training), copies(zoo, training, dataset=unseen)]
    rows = compare({"it": samples}, zoo, training, SETTINGS, {unseen: datasets[0]})
    assert {row.datasets for row in rows} == {"seen", "unseen"}
    assert [row.datasets for row in rows] == sorted(row.datasets for row in rows)
    found = by_subject(rows, datasets="unseen")
    assert {dataset for row in found.values() for dataset, _ in row.values} == {unseen}
    # The models of the nearest dataset are the pool, and the samples are among them.
    assert found[OVERLAP, SAMPLES].value == pytest.approx(1)
    assert found[DISTANCE, SAMPLES].value == 0
    assert found[accuracy_after(0), BEST].value < by_subject(rows, datasets="seen")[accuracy_after(0), BEST].value


def test_a_dataset_far_from_everything_is_refused(zoo: Zoo) -> None:
    training, _, unseen = split(zoo)
    sampled = copies(zoo, training, dataset=unseen)
    for nearest, name in (({}, "no dataset"), ({unseen: "nowhere"}, "nowhere")):
        with pytest.raises(SettingsError, match=f"no training model, and nearest names {name}; name a dataset"):
            compare({"it": [sampled]}, zoo, training, SETTINGS, nearest)


class TestRequests:
    def samples(self, zoo: Zoo, training: np.ndarray, shift: float) -> list[ModelSet]:
        """Each model of a dataset as a condition of its own, asked for ``shift`` more than it reaches."""
        whole = copies(zoo, np.flatnonzero(zoo.index["dataset"] == zoo.index["dataset"][training[0]]))
        reached = accuracies(whole)
        return [
            replace(whole, flat=model.unsqueeze(0), requested={"test_accuracy": float(value) + shift})
            for model, value in zip(whole.flat, reached, strict=True)
        ]

    def test_that_are_met_correlate(self, zoo: Zoo) -> None:
        training, _, _ = split(zoo)
        found = by_subject(compare({"it": self.samples(zoo, training, 0.0)}, zoo, training, SETTINGS))
        assert found[SPEARMAN, SAMPLES].value == pytest.approx(1)
        assert found[ERROR, SAMPLES].value == pytest.approx(0)
        assert found[ERROR, ANY].value > 0.01

    def test_that_are_missed_have_an_error(self, zoo: Zoo) -> None:
        training, _, _ = split(zoo)
        found = by_subject(compare({"it": self.samples(zoo, training, 0.25)}, zoo, training, SETTINGS))
        assert found[SPEARMAN, SAMPLES].value == pytest.approx(1)
        assert found[ERROR, SAMPLES].value == pytest.approx(0.25)

    def test_only_the_highest_is_tried_otherwise(self, zoo: Zoo) -> None:
        training, _, _ = split(zoo)
        samples = self.samples(zoo, training, 0.0)
        top = max(samples, key=lambda sampled: sampled.requested["test_accuracy"])
        found = by_subject(compare({"it": samples}, zoo, training, SETTINGS))
        assert found[accuracy_after(0), SAMPLES].value == pytest.approx(top.requested["test_accuracy"])


class TestBaselinesOfTheSamples:
    def rows(self, zoo: Zoo) -> list[ComparisonRow]:
        training, _, _ = split(zoo)
        plain = [copies(zoo, training, requested={"test_accuracy": value}) for value in (0.3, 0.9)]
        own = [replace(one, baselines={"other": replace(one, flat=one.flat * 0)}) for one in plain]
        return compare({"plain": plain, "own": own, "top": own[1:]}, zoo, training, SETTINGS)

    def test_stand_beside_these_samples_and_no_others(self, zoo: Zoo) -> None:
        rows = self.rows(zoo)
        plain, own, top = (by_subject(rows, sampler=name) for name in ("plain", "own", "top"))
        assert "other" not in {subject for _, subject in plain}
        measures = [measure for measure, subject in own if subject == "other"]
        # All models without weights are equally accurate.
        assert measures == [accuracy_after(0), accuracy_after(1), SPEARMAN, ERROR]
        assert [measure for measure, subject in top if subject == "other"] == [*measures[:2], ERROR]
        for measure in measures[:2]:
            assert own[measure, "other"].value == top[measure, "other"].value
        assert list(plain) == [key for key in own if key[1] != "other"]


def test_the_seed_decides_everything(zoo: Zoo) -> None:
    training, _, _ = split(zoo)
    samples = {"it": [copies(zoo, training)]}
    one = compare(samples, zoo, training, SETTINGS)
    assert one == compare(samples, zoo, training, SETTINGS)
    assert one != compare(samples, zoo, training, replace(SETTINGS, seed=1))


def test_an_architecture_that_the_zoo_does_not_have_is_tried_too(zoo: Zoo) -> None:
    training, datasets, _ = split(zoo)
    wide = MLPConfig((1, 8, 8), 5, (9,))
    specs = [TensorSpec(name, shape, "F32") for name, shape in wide.shapes().items()]
    architecture = infer_architecture(specs, config=wide.to_dict())
    flat = torch.randn(3, architecture.numel, generator=torch.Generator().manual_seed(0)) * 0.1
    found = by_subject(compare({"it": [ModelSet(datasets[0], wide, architecture, flat)]}, zoo, training, SETTINGS))
    assert [subject for measure, subject in found if measure == accuracy_after(0)] == [SAMPLES, SCRATCH, BEST]
    assert (DISTANCE, SAMPLES) not in found
    assert (OVERLAP, INDEPENDENT) not in found
    assert 0 < found[OVERLAP, SAMPLES].value < 1


def row(subject: str, values: dict[str, float]) -> ComparisonRow:
    mean = float(np.mean(list(values.values())))
    return ComparisonRow("it", "seen", OVERLAP, subject, mean, None, None, tuple(values.items()))


def test_a_difference_is_taken_dataset_by_dataset() -> None:
    ours, theirs = row(SAMPLES, {"a": 0.5, "b": 0.7, "c": 9.0}), row(INDEPENDENT, {"b": 0.5, "a": 0.4})
    found = ours.minus(theirs)
    assert found.values == (("a", pytest.approx(0.1)), ("b", pytest.approx(0.2)))
    assert found.value == pytest.approx(0.15)
    assert found.low is not None and found.high is not None
    assert 0.1 <= found.low < 0.15 < found.high <= 0.2
    part = ours.minus(theirs, share=0.5)
    assert part.subject == f"samples - 50 % of {INDEPENDENT}"
    assert part.values == (("a", pytest.approx(0.3)), ("b", pytest.approx(0.45)))
    with pytest.raises(SettingsError, match="no dataset in common"):
        ours.minus(row(INDEPENDENT, {"d": 0.1}))


def test_disagreement_is_none_among_copies_of_one_model(zoo: Zoo) -> None:
    training, _, _ = split(zoo)
    one = copies(zoo, training)
    found = by_subject(compare({"it": [replace(one, flat=one.flat[:1].repeat(3, 1))]}, zoo, training, SETTINGS))
    assert found[DISAGREEMENT, SAMPLES].value == 0
