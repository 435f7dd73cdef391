from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest

from weightspace.errors import ZooError
from weightspace.probes.explain import ACROSS, ALL, Description, Explanation, explain, standardised
from weightspace.probes.runs import RunTable
from weightspace.stats.clustering import MEASURES
from weightspace.stats.variance import Factor

CLASSES, ROTATIONS, POLARITIES = ("0-1", "2-3"), (0, 90, 180), ("normal", "inverted")


def coded(name: str, values: Sequence[object], kind: str = "data", in_dataset: bool = True) -> Factor:
    levels = list(dict.fromkeys(values))
    codes = np.array([levels.index(value) for value in values])
    return Factor(name, kind, codes, tuple(map(str, levels)), in_dataset)  # type: ignore[arg-type]


def experiment(runs: int = 240, architectures: Sequence[str] = ("mlp", "cnn"), seed: int = 0) -> RunTable:
    """Runs of a crossed grid in random order, and a learning rate drawn for each."""
    generator = np.random.default_rng(seed)
    numbers = generator.permutation(runs)
    rows = [
        (CLASSES[n % 2], ROTATIONS[n // 2 % 3], POLARITIES[n // 6 % 2], architectures[n // 12 % len(architectures)])
        for n in numbers
    ]
    classes, rotations, polarities, names = zip(*rows, strict=True)
    datasets = tuple(
        f"digits?classes={one}"
        + (f"&rotation={two}" if two else "")
        + ("&polarity=inverted" if three != "normal" else "")
        for one, two, three in zip(classes, rotations, polarities, strict=True)
    )
    factors = (
        coded("architecture", names, "architecture", False),
        coded("classes", classes),
        coded("rotation", rotations),
        coded("polarity", polarities),
        coded("learning_rate", generator.choice([0.1, 0.01], runs).tolist(), "training", False),
    )
    table = RunTable(np.arange(runs), datasets, tuple(names), factors)
    return table.where(np.ones(runs, dtype=bool))


def embedded(table: RunTable, dims: int = 12, seed: int = 1) -> np.ndarray:
    """The learning rate moves runs most, then the classes, hardly the rotation, and the polarity not at all."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(len(table), dims))
    for name, strength in (("architecture", 3.0), ("classes", 0.6), ("rotation", 0.25), ("learning_rate", 1.0)):
        factor = next((one for one in table.factors if one.name == name), None)
        if factor is not None:
            values += strength * generator.normal(size=(len(factor.levels), dims))[factor.codes]
    return values


def share(answer: Explanation, models: str, name: str) -> float:
    return next(row.share.share.value for row in answer.variance if (row.models, row.share.name) == (models, name))


@pytest.fixture(scope="module")
def answer() -> Explanation:
    table = experiment(144, seed=4)
    return explain(table, [Description("embedding", embedded(table))], draws=99)


def test_every_question_is_answered_for_every_scope(answer: Explanation) -> None:
    assert answer.notes == ()
    scopes = {(row.models, row.label, row.measure) for row in answer.clusters}
    labels = ("dataset", "classes", "rotation", "polarity")
    assert scopes == {(m, label, measure) for m in ("mlp", "cnn", ACROSS) for label in labels for measure in MEASURES}
    assert {(row.models, row.other) for row in answer.geometry if row.models == "mlp"} == {
        ("mlp", other) for other in ("characteristics", "classes", "rotation", "polarity", "cnn")
    }
    assert {row.models for row in answer.variance} == {"mlp", "cnn", ALL}
    assert json.dumps(dataclasses.asdict(answer), allow_nan=False)


def test_planted_effects_are_found_and_ordered(answer: Explanation) -> None:
    for models in ("mlp", "cnn", ALL):
        order = [share(answer, models, name) for name in ("learning_rate", "classes", "rotation", "polarity")]
        assert order == sorted(order, reverse=True)
        assert order[0] > 2 * order[-1]
    p_values = {(row.models, row.share.name): row.share.share.p_value for row in answer.variance}
    assert p_values[ALL, "classes"] == 0.01
    assert p_values[ALL, "polarity"] > 0.05  # type: ignore[operator]
    clusters = {(row.models, row.label, row.measure): row.estimate for row in answer.clusters}
    for models in ("mlp", ACROSS):
        assert clusters[models, "classes", "nearest neighbour"].p_value == 0.01
        assert clusters[models, "polarity", "nearest neighbour"].p_value > 0.02  # type: ignore[operator]
    geometry = {(row.models, row.other): row.estimate for row in answer.geometry}
    assert geometry["mlp", "classes"].p_value < 0.02  # type: ignore[operator]
    assert {row.datasets for row in answer.geometry} == {12}


def test_a_description_is_judged_by_itself_and_by_its_seed() -> None:
    table = experiment(48, ["mlp"])
    one, other = Description("one", embedded(table)), Description("other", embedded(table, seed=5))
    alone, beside, again = (explain(table, parts, draws=5) for parts in ([one], [other, one], [one]))
    assert alone == again
    assert [row for row in beside.clusters if row.description == "one"] == list(alone.clusters)
    assert [row for row in beside.variance if row.description == "one"] == list(alone.variance)
    assert explain(table, [one], draws=5, seed=1).clusters != alone.clusters


def test_features_of_datasets_are_compared_where_given() -> None:
    table = experiment(96)
    found = {dataset: np.random.default_rng(n).normal(size=4) for n, dataset in enumerate(sorted(set(table.datasets)))}
    answer = explain(table, [Description("e", embedded(table))], features=found, draws=5)
    assert sum(row.other == "features" for row in answer.geometry) == 2
    missing = found.popitem()[0]
    with pytest.raises(ZooError, match=r"features: none for dataset '.*'; give one vector") as error:
        explain(table, [Description("e", embedded(table))], features=found, draws=5)
    assert missing in str(error.value)


def test_columns_of_their_own_are_compared_within_architectures_only() -> None:
    table = experiment(96)
    answer = explain(table, [Description("s(W)", embedded(table), comparable=False)], draws=5)
    assert {row.models for row in (*answer.clusters, *answer.variance)} == {"mlp", "cnn"}
    assert any(row.other in ("mlp", "cnn") for row in answer.geometry)  # dissimilarities need no common columns
    assert answer.notes == ("s(W): its columns differ between architectures, which cannot be compared in it.",)


def test_one_architecture_and_one_dataset() -> None:
    table = experiment(48, ["mlp"])
    one = table.where(np.array([dataset == table.datasets[0] for dataset in table.datasets]))
    with pytest.raises(ZooError, match="4 runs with all factors known are too few; give a zoo of 10 or more"):
        explain(one, [Description("e", embedded(one))], draws=20)
    larger = experiment(480, ["mlp"])
    one = larger.where(np.array([dataset == larger.datasets[0] for dataset in larger.datasets]))
    answer = explain(one, [Description("e", embedded(one))], draws=50)
    assert answer.clusters == () and answer.geometry == ()
    assert {row.share.name for row in answer.variance} == {"learning_rate", "residual"}
    assert answer.notes == (
        "Whether runs of one dataset cluster in mlp cannot be said: too few runs share one.",
        "Whether mlp models of similar datasets are similar cannot be said: 1 datasets have two runs or more, and 5 "
        "are needed.",
    )


def test_runs_without_datasets_and_factors() -> None:
    table = RunTable(np.arange(30), (None,) * 30, ("a",) * 30, ())
    answer = explain(table, [Description("e", np.random.default_rng(0).normal(size=(30, 4)))], draws=20)
    assert answer.clusters == answer.geometry == answer.variance == ()
    assert answer.notes == (
        "Whether models of similar datasets cluster cannot be said: no run names its dataset.",
        "What determines the weights of a cannot be said: no factor differs between its runs.",
    )


def test_too_few_runs_for_the_factors_are_said() -> None:
    table = experiment(14, ["mlp"])
    answer = explain(table, [Description("e", embedded(table))], draws=20)
    assert answer.variance == ()
    assert any("14 runs are too few for factors of 5 degrees of freedom" in note for note in answer.notes)


def test_factors_that_change_together_are_said() -> None:
    table = experiment(120, ["mlp"])
    twin = dataclasses.replace(table.factors[-1], name="batch_size")
    joint = dataclasses.replace(table, factors=(*table.factors, twin))
    answer = explain(joint, [Description("e", embedded(table))], draws=5)
    assert "learning_rate + batch_size cannot be separated among the runs of mlp; their share is one." in answer.notes


def test_small_architectures_and_broken_runs_are_left_out() -> None:
    table = experiment(120, ["mlp"])
    names = ("cnn",) * 5 + table.architectures[5:]
    values = embedded(table)
    values[7] = np.nan
    answer = explain(dataclasses.replace(table, architectures=names), [Description("e", values)], draws=20)
    assert {row.models for row in answer.clusters} == {"mlp"}
    assert {row.runs for row in answer.variance} == {114}
    assert answer.notes == (
        "e: 1 runs are left out, as their numbers are not finite.",
        "1 architectures with 5 runs are left out: at most 6 of 10 runs or more are judged.",
    )


def test_datasets_of_one_run_each() -> None:
    table = experiment(12, ["mlp"])
    answer = explain(table, [Description("e", embedded(table))], draws=20)
    assert {row.label for row in answer.clusters} == {"classes", "rotation", "polarity"}
    assert answer.geometry == ()


def test_equally_different_datasets_have_no_order() -> None:
    table = RunTable(np.arange(30), tuple(f"set{n % 6}" for n in range(30)), ("a",) * 30, ())
    answer = explain(table, [Description("e", np.random.default_rng(0).normal(size=(30, 4)))], draws=20)
    assert answer.geometry == ()
    assert "The weights of a have no order to compare with base: all pairs are equally far." in answer.notes


def test_equal_embeddings_give_words_and_no_nan() -> None:
    table = experiment(60, ["mlp"])
    answer = explain(table, [Description("e", np.ones((60, 3)))], draws=20)
    assert json.dumps(dataclasses.asdict(answer), allow_nan=False)
    assert answer.variance == answer.geometry == ()
    assert answer.clusters == ()
    assert any("embeddings of all 60 runs are equal" in note for note in answer.notes)
    assert any("all are described by the same numbers" in note for note in answer.notes)


def test_standardised_columns() -> None:
    values = np.random.default_rng(0).normal(size=(200, 3)) * [1, 1000, 1]
    values[:, 2] = 5
    values[0, 0] = 1e20
    found = standardised(values)
    assert found[:, :2].std(axis=0) == pytest.approx(1)
    assert found.mean(axis=0) == pytest.approx(0, abs=1e-12)
    assert not found[:, 2].any()
    assert found[0, 0] < 5  # one diverged run is not the variance of its column
    assert standardised(values[:12])[0, 0] < 5
