from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from weightspace.errors import SettingsError, ZooError
from weightspace.probes import estimators
from weightspace.probes.estimators import ESTIMATORS, ProbeData, RidgePath
from weightspace.probes.probe import probe_table
from weightspace.probes.representations import FeatureBlock, Features
from weightspace.probes.rows import ProbeRow, format_table, rows_to_records
from weightspace.probes.targets import Labels

MODELS, RUNS = 240, np.repeat([f"run{i}" for i in range(60)], 4)


@pytest.mark.parametrize("features", [5, 80])
def test_ridge_equals_scikit_learns_at_its_penalty(features: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, features)).astype(np.float32) * np.logspace(-2, 2, features).astype(np.float32)
    y = np.stack([x @ rng.normal(size=features), rng.normal(size=60)], axis=1)
    mine = RidgePath().fit(x[:40], y[:40], x[40:], y[40:])
    low, high = x[:40].min(axis=0), x[:40].max(axis=0)
    z = (np.clip(x, low, high).astype(np.float64) - x[:40].mean(axis=0, dtype=np.float64)) / x[:40].std(
        axis=0, dtype=np.float64
    )
    for target, penalty in enumerate(mine.penalty_):
        theirs = Ridge(alpha=penalty * 40).fit(z[:40], y[:40, target])
        np.testing.assert_allclose(mine.predict(x)[:, target], theirs.predict(z), rtol=1e-5, atol=1e-6)


def test_ridge_chooses_the_penalty_on_validation_data() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(300, 50)), rng.normal(size=(300, 1))
    signal = x @ rng.normal(size=(50, 1))
    pure = RidgePath().fit(x[:100], signal[:100], x[100:], signal[100:])
    noisy = RidgePath().fit(x[:100], noise[:100], x[100:], noise[100:])
    assert pure.penalty_ < 1e-3 and noisy.penalty_ >= 1
    halves = x[:100], noise[:100], x[100:], noise[100:]
    path = [RidgePath([p]).fit(*halves).predict(x[100:]) for p in estimators.PENALTIES]
    errors = [np.square(noise[100:] - predicted).mean() for predicted in path]
    assert noisy.penalty_ == estimators.PENALTIES[int(np.argmin(errors))]


def test_ridge_is_one_decomposition_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 1))
    whole = RidgePath().fit(x, y, x, y).predict(x)
    monkeypatch.setattr(estimators, "_CHUNK_ENTRIES", 20)
    np.testing.assert_allclose(RidgePath().fit(x, y, x, y).predict(x), whole, rtol=1e-9)


def test_ridge_ignores_constant_features_and_does_not_extrapolate() -> None:
    rng = np.random.default_rng(0)
    x = np.hstack([rng.normal(size=(50, 2)), np.full((50, 1), 0.1), np.full((50, 1), 1e6)]).astype(np.float32)
    y = x[:, :1] * 1.0
    fitted = RidgePath().fit(x, y, x, y)
    assert not fitted.coef_[:, 2:].any() and np.isfinite(fitted.coef_).all()
    wild = np.array([[1e30, 0, 5, -5]], dtype=np.float32)
    assert fitted.predict(wild)[0] <= y.max() + 0.1


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_every_estimator_learns_repeats_itself_and_does_not_fit_validation(estimator: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)).astype(np.float32)
    y = np.stack([x[:, 0], -2 * x[:, 1]], axis=1).astype(np.float64)
    data = ProbeData(x[:150], y[:150], x[150:200], y[150:200])
    predict = ESTIMATORS[estimator](data, 0)
    predicted = predict(x[200:])
    assert predicted.shape == (100, 2)
    assert (1 - ((predicted - y[200:]) ** 2).mean(0) / y[200:].var(0) > 0.3).all()
    np.testing.assert_array_equal(predicted, predict(x[200:]))
    np.testing.assert_array_equal(predicted, ESTIMATORS[estimator](data, 0)(x[200:]))
    # validation targets of a far mean would show in the predictions if anything were fitted on them
    spoiled = dataclasses.replace(data, validation_targets=data.validation_targets + 1000)
    assert np.abs(ESTIMATORS[estimator](spoiled, 0)(x[200:])).max() < 50


def fixed(values: np.ndarray, permuted: np.ndarray | None) -> Features:
    return Features([FeatureBlock(np.arange(len(values)), values, permuted)])


@pytest.fixture
def zoo() -> tuple[dict[str, Features], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(MODELS, 5))
    y = x[:, 0] + 0.1 * rng.normal(size=MODELS)
    representations = {
        "invariant": fixed(x, x),
        "sensitive": fixed(x, x[:, ::-1].copy()),
        "unknown": fixed(x, None),
    }
    return representations, {"accuracy": y, "luck": rng.normal(size=MODELS)}


def by_key(rows: list[ProbeRow]) -> dict[tuple[str, str, str], ProbeRow]:
    return {(row.target, row.representation, row.estimator): row for row in rows}


def test_table_tells_signal_from_luck_and_invariance_from_collapse(zoo: tuple) -> None:
    rows = by_key(probe_table(*zoo, RUNS, replicates=200))
    good = rows["accuracy", "invariant", "ridge"]
    share, tau = good.scores["r2"], good.scores["kendall_tau"]
    assert share.value > 0.95 and share.low < share.value < share.high <= 1
    assert tau.value > 0.85 and tau.low < tau.value < tau.high
    assert share.permuted == share.value and tau.permuted == tau.value
    collapsed = rows["accuracy", "sensitive", "ridge"]
    assert collapsed.scores["r2"].value == good.scores["r2"].value and collapsed.scores["r2"].permuted < 0.5
    assert rows["luck", "invariant", "ridge"].scores["r2"].value < 0.2
    assert (good.models, good.dropped, good.dimensions, good.seeds) == (MODELS, 0, 5, (0, 1, 2))
    unknown = rows["accuracy", "unknown", "ridge"]
    assert math.isnan(unknown.scores["r2"].permuted) and "no neuron permutation" in unknown.note
    assert unknown.scores["r2"].value == good.scores["r2"].value


def test_checkpoints_of_a_run_do_not_leak_into_the_test_side() -> None:
    rng = np.random.default_rng(0)
    # Features tell runs apart and nothing else: a split by checkpoint would look the answer up.
    identity = np.repeat(rng.normal(size=(60, 30)), 4, axis=0)
    luck = np.repeat(rng.normal(size=60), 4)
    (row,) = probe_table(
        {"r": fixed(identity, None)}, {"luck": luck}, RUNS, estimators={"r": ("extra-trees",)}, replicates=50
    )
    assert row.scores["r2"].value < 0.2


def test_representations_are_fitted_on_the_training_split_of_each_seed(zoo: tuple) -> None:
    seen: list[np.ndarray] = []

    class Spy:
        def fit(self, train: np.ndarray) -> Features:
            seen.append(train)
            return zoo[0]["invariant"]

    rows = probe_table({"spy": Spy()}, zoo[1], RUNS, replicates=10)
    assert len(seen) == 3 and not np.array_equal(seen[0], seen[1])
    predictions = rows[0].predictions
    assert predictions is not None
    assert not set(RUNS[seen[0]]) & set(RUNS[predictions.rows])
    np.testing.assert_array_equal(predictions.targets, zoo[1]["accuracy"][predictions.rows])


def test_models_without_a_target_are_dropped_for_it_alone_and_counted(zoo: tuple) -> None:
    representations, targets = zoo
    targets["accuracy"][:8] = np.nan
    targets["accuracy"][8] = np.inf
    rows = by_key(probe_table({"x": representations["invariant"]}, targets, RUNS, replicates=10))
    assert (rows["accuracy", "x", "ridge"].models, rows["accuracy", "x", "ridge"].dropped) == (MODELS - 9, 9)
    assert rows["luck", "x", "ridge"].dropped == 0
    assert rows["accuracy", "x", "ridge"].scores["r2"].value > 0.9
    assert "231 models, 9 left out without it" in format_table(list(rows.values()))


def test_constant_targets_are_undefined_with_the_reason(zoo: tuple) -> None:
    table = probe_table(
        {"x": zoo[0]["invariant"]}, {"same": np.ones(MODELS)}, RUNS, estimators={"x": tuple(ESTIMATORS)}, replicates=10
    )
    for row in table:
        share, tau = row.scores["r2"], row.scores["kendall_tau"]
        assert math.isnan(share.value) and math.isnan(tau.value) and math.isnan(share.low)
        assert "undefined" in row.note
    assert "undefined" in format_table(table)
    assert all(record["r2"] is None for record in rows_to_records(table))


def test_same_seeds_give_the_same_table_and_progress_reaches_the_total(zoo: tuple) -> None:
    calls: list[tuple[int, int]] = []
    tables = [
        probe_table(
            {"x": zoo[0]["invariant"]},
            zoo[1],
            RUNS,
            seeds=(3, 4),
            estimators={"x": ("ridge", "boosting")},
            replicates=20,
            progress=lambda done, total: calls.append((done, total)),
        )
        for _ in range(2)
    ]
    assert tables[0] == tables[1]
    assert calls[:8] == [(i, 8) for i in range(1, 9)]


@pytest.fixture
def labels(zoo: tuple) -> dict[str, Labels]:
    """A category of three, of which one is rare, that the first feature tells, and two memberships."""
    score = zoo[0]["invariant"].features(np.arange(MODELS))[:, 0]
    category = np.digitize(score, [-1.5, 0])
    has = np.stack([score > 0.5, np.random.default_rng(1).random(MODELS) > 0.5], axis=1)
    return {
        "kind": Labels(("a", "b", "c"), np.eye(3)[category], exclusive=True, note="a is rare"),
        "seen": Labels(("told", "luck"), has.astype(float), exclusive=False),
    }


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_labels_are_told_by_every_estimator(estimator: str, zoo: tuple, labels: dict[str, Labels]) -> None:
    chosen = {name: (estimator,) for name in ("invariant", "sensitive")}
    representations = {name: zoo[0][name] for name in chosen}
    rows = by_key(probe_table(representations, labels, RUNS, estimators=chosen, replicates=100))
    kind, seen = rows["kind", "invariant", estimator], rows["seen", "invariant", estimator]
    accuracy, area = kind.scores["balanced_accuracy"], kind.scores["auc"]
    assert accuracy.low < accuracy.value < accuracy.high
    assert accuracy.value > 0.6 and area.value > 0.85 and area.low < area.value < area.high
    assert kind.chance == pytest.approx(1 / 3) and seen.chance == 0.5
    assert (accuracy.permuted, area.permuted) == (accuracy.value, area.value)
    collapsed = rows["kind", "sensitive", estimator]
    assert collapsed.scores["balanced_accuracy"].permuted < 0.5 < collapsed.scores["balanced_accuracy"].value
    # One label is known and the other is luck.
    assert 0.6 < seen.scores["auc"].value < 0.9 and 0.6 < seen.scores["balanced_accuracy"].value < 0.85
    assert set(kind.scores) == {"balanced_accuracy", "auc"} and kind.predictions is None
    assert kind.labels == ("a", "b", "c") and kind.note == "a is rare"


def test_rare_categories_weigh_as_much_as_common_ones() -> None:
    rng = np.random.default_rng(0)
    rare = np.repeat(rng.random(60) < 0.1, 4)
    x = np.where(rare, 1.5, 0.0)[:, None] + rng.normal(size=(MODELS, 1))
    kind = Labels(("rare", "common"), np.stack([rare, ~rare], axis=1).astype(float), exclusive=True)
    (row,) = probe_table({"x": fixed(x, None)}, {"kind": kind}, RUNS, replicates=50)
    # To answer "common" always would be right for nine in ten and reach one half.
    assert row.scores["balanced_accuracy"].value > 0.65
    assert math.isnan(row.scores["auc"].permuted) and "no neuron permutation" in row.note


@pytest.mark.slow
def test_numbers_are_probed_alike_with_and_without_labels_beside_them(zoo: tuple, labels: dict[str, Labels]) -> None:
    chosen = {"x": ("boosting", "extra-trees")}
    alone, beside = (
        probe_table({"x": zoo[0]["invariant"]}, {**zoo[1], **more}, RUNS, estimators=chosen, replicates=10)
        for more in ({}, labels)
    )
    assert beside[: len(alone)] == alone


def test_models_without_labels_are_left_out_and_test_sets_may_lack_a_label(
    zoo: tuple, labels: dict[str, Labels]
) -> None:
    labels["seen"].values[:8] = np.nan
    labels["seen"].values[8:, 1] = 1
    (row,) = probe_table({"x": zoo[0]["invariant"]}, {"seen": labels["seen"]}, RUNS, replicates=10)
    assert (row.models, row.dropped) == (MODELS - 8, 8)
    assert row.scores["auc"].value > 0.95 and "labels that all test models have, or none" in row.note
    text = format_table([row])
    assert "seen: 232 models, 8 left out without it" in text
    assert (
        "2 labels (told, luck), chance 0.500, AUC 0.500" in text
        and "balanced accuracy [95 %]" in text
        and "R2" not in text
    )
    (record,) = json.loads(json.dumps(rows_to_records([row]), allow_nan=False))
    assert record["r2"] is None and record["auc"] == row.scores["auc"].value and record["labels"] == ["told", "luck"]


def test_unseen_datasets_are_tested(zoo: tuple) -> None:
    datasets = np.repeat([f"d{i % 6}" for i in range(60)], 4).astype(object)
    seen: list[np.ndarray] = []

    class Spy:
        def fit(self, train: np.ndarray) -> Features:
            seen.append(train)
            return zoo[0]["invariant"]

    options: dict = {"datasets": datasets, "replicates": 10}
    (row, _) = probe_table({"x": Spy()}, zoo[1], RUNS, (0,), **options, test_datasets=["d1", "d4"])
    assert row.predictions is not None and set(datasets[row.predictions.rows]) == {"d1", "d4"}
    assert not set(datasets[seen[0]]) & {"d1", "d4"}
    assert row.unseen_datasets == 2 and "tested on 2 unseen datasets" in format_table([row])
    own = Labels(tuple("012345"), (datasets[:, None] == np.unique(datasets)).astype(float), exclusive=True)
    with pytest.raises(ZooError, match="target 'dataset': no category of the test models has a training model"):
        probe_table({"x": zoo[0]["invariant"]}, {"dataset": own}, RUNS, (0,), **options)


def test_fixed_test_runs_are_tested_at_every_seed(zoo: tuple) -> None:
    rows = probe_table({"x": zoo[0]["invariant"]}, zoo[1], RUNS, test_runs=["run1", "run7"], replicates=10)
    assert rows[0].predictions is not None
    assert set(RUNS[rows[0].predictions.rows]) == {"run1", "run7"}


def test_standard_estimators_follow_the_representation(zoo: tuple) -> None:
    rows = probe_table({"s(W)": zoo[0]["invariant"], "W": zoo[0]["invariant"]}, zoo[1], RUNS, (0,), replicates=10)
    named = [(row.representation, row.estimator) for row in rows if row.target == "luck"]
    assert named == [("s(W)", "ridge"), ("s(W)", "boosting"), ("W", "ridge")]


def test_records_are_json_and_the_table_names_everything(zoo: tuple) -> None:
    rows = probe_table(*zoo, RUNS, replicates=10)
    records = json.loads(json.dumps(rows_to_records(rows), allow_nan=False))
    assert len(records) == len(rows) == 6
    assert records[0]["representation"] == "invariant" and records[0]["seeds"] == [0, 1, 2]
    assert "predictions" not in records[0]
    text = format_table(rows)
    for word in ("accuracy: 240 models", "luck", "invariant", "sensitive", "ridge", "R2 permuted", "note: no neuron"):
        assert word in text
    widths = {len(line) for line in text.split("\n\n")[0].splitlines()[1:5]}
    assert len(widths) == 1


def test_refusals_name_the_thing(zoo: tuple) -> None:
    representations, targets = zoo
    few = np.where(np.isin(RUNS, [f"run{i}" for i in range(9)]), targets["luck"], np.nan)
    with pytest.raises(ZooError, match=r"target 'few': known for 9 runs"):
        probe_table(representations, {"few": few}, RUNS)
    with pytest.raises(ZooError, match="target 'short'"):
        probe_table(representations, {"short": np.ones(3)}, RUNS)
    with pytest.raises(ZooError, match=r"target 'wide'.*one number a model"):
        probe_table(representations, {"wide": Labels(("one",), np.ones((MODELS, 2)), exclusive=False)}, RUNS)
    with pytest.raises(ZooError, match="target 'text'"):
        probe_table(representations, {"text": np.array(["a"] * MODELS)}, RUNS)
    with pytest.raises(SettingsError, match="'forest'"):
        probe_table(representations, targets, RUNS, estimators={"invariant": ("forest",)})
    with pytest.raises(SettingsError, match="'nowhere'"):
        probe_table(representations, targets, RUNS, estimators={"nowhere": ("ridge",)})
    with pytest.raises(SettingsError, match="seeds"):
        probe_table(representations, targets, RUNS, ())
