from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightspace.evaluation import comparison as proof
from weightspace.evaluation import criteria
from weightspace.probes.explain import ACROSS, ALL
from weightspace.report import findings
from weightspace.report.findings import (
    clustering_answers,
    headlines,
    probe_verdicts,
    reconstruction_verdicts,
    retrieval_verdicts,
    sample_verdicts,
    variance_answers,
)


def probe(representation: str, r2: float | None, half: float | None = 0.05, **changes: Any) -> dict[str, Any]:
    known = r2 is not None and half is not None
    row = {
        "representation": representation,
        "estimator": "ridge",
        "target": "test_accuracy",
        "r2": r2,
        "r2_low": r2 - half if known else None,  # type: ignore[operator]
        "r2_high": r2 + half if known else None,  # type: ignore[operator]
        "permuted_r2": r2,
        "labels": [],
    }
    return {**row, **changes}


def label_probe(representation: str, auc: float | None, half: float = 0.02, **changes: Any) -> dict[str, Any]:
    known = auc is not None
    row = {
        "target": "classes",
        "labels": ["0", "1"],
        "auc": auc,
        "auc_low": auc - half if known else None,  # type: ignore[operator]
        "auc_high": auc + half if known else None,  # type: ignore[operator]
        "permuted_auc": auc,
    }
    return probe(representation, None, **{**row, **changes})


def clustered(description: str, value: float, models: str = ACROSS, **changes: Any) -> dict[str, Any]:
    estimate = {
        "value": value,
        "low": value - 0.02,
        "high": value + 0.02,
        "null_mean": 0.03,
        "null_low": 0.01,
        "null_high": 0.06,
        "p_value": 0.005,
    }
    row = {"description": description, "models": models, "label": "dataset", "measure": "nearest neighbour"}
    return {**row, "estimate": estimate, **changes}


def share(description: str, name: str, value: float, part: str = "factor", models: str = ALL) -> dict[str, Any]:
    estimate = {"value": value, "low": value, "high": value, "p_value": 0.005}
    return {
        "description": description,
        "models": models,
        "share": {"name": name, "kind": "data", "part": part, "share": estimate},
    }


def kept(method: str, share: float | None, architecture: str = "all", latent_size: int = 512) -> dict[str, Any]:
    interval = (None, None) if share is None else (share - 0.02, share + 0.02)
    return {
        "method": method,
        "architecture": architecture,
        "latent_size": latent_size,
        "kept": share,
        "kept_low": interval[0],
        "kept_high": interval[1],
    }


def found(pair: str, value: float, half: float | None = 0.02, chance: float = 0.03125) -> dict[str, Any]:
    interval = (None, None) if half is None else (value - half, value + half)
    return {
        "pair": pair,
        "measure": "R@1",
        "value": value,
        "low": interval[0],
        "high": interval[1],
        "chance": chance,
    }


def test_a_clear_lead_names_both_numbers_and_what_permutation_leaves() -> None:
    (verdict,) = probe_verdicts([probe("s(W)", 0.56), probe("autoencoder", 0.71, permuted_r2=0.6887)])
    assert (verdict.subject, verdict.outcome) == ("Test accuracy", "ahead")
    assert verdict.text == (
        "With ridge on both, R² is 0.710 [0.660, 0.760] for the autoencoder's embedding and 0.560 [0.510, 0.610] for "
        "s(W). The autoencoder is ahead. On neuron-permuted models the embedding keeps 97 % of its R²."
    )


def test_a_baseline_that_wins_is_said_to_win() -> None:
    rows = [
        probe("s(W)", 0.5),
        probe("s(W)+invariants", 0.9, estimator="extra-trees"),
        probe("autoencoder", 0.6),
        probe("autoencoder", 0.65, estimator="boosting"),
    ]
    like, best = probe_verdicts(rows)
    assert like.outcome == "level" and "autoencoder's mean is higher, but the intervals overlap" in like.text
    assert best.outcome == "behind" and "The baseline wins." in best.text
    assert "(boosting)" in best.text and "s(W)+invariants (extra-trees)" in best.text


@given(st.floats(-2, 1), st.floats(-2, 1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_lead_is_claimed_only_where_the_intervals_are_apart(a: float, b: float, wide: float, narrow: float) -> None:
    ours, theirs = probe("autoencoder", a, wide), probe("s(W)", b, narrow)
    (verdict,) = probe_verdicts([ours, theirs])
    assert (verdict.outcome == "ahead") == (ours["r2_low"] > theirs["r2_high"])
    assert (verdict.outcome == "behind") == (theirs["r2_low"] > ours["r2_high"])
    assert ("ahead" in verdict.text) == (verdict.outcome == "ahead")
    assert ("wins" in verdict.text) == (verdict.outcome == "behind")


@pytest.mark.parametrize(
    ("r2", "permuted", "words"),
    [
        (0.7, -0.3, "nothing of the embedding's R² is left (\N{MINUS SIGN}0.300)"),
        (0.7, -123456.0, "nothing of the embedding's R² is left (\N{MINUS SIGN}1.2\N{MULTIPLICATION SIGN}10⁵)"),
        (-0.1, 0.2, "no better than predicting the mean"),
        (0.02, 0.01, "too little to say"),
        (0.7, None, "is not known"),
    ],
)
def test_no_share_is_claimed_that_means_nothing(r2: float, permuted: float | None, words: str) -> None:
    (verdict,) = probe_verdicts([probe("s(W)", 0.1), probe("autoencoder", r2, permuted_r2=permuted)])
    assert words in verdict.text and "keeps" not in verdict.text


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([probe("s(W)", 0.5)], "was not probed; it is 0.500 [0.450, 0.550] for the best baseline, s(W) (ridge)"),
        ([probe("s(W)", 0.5), probe("autoencoder", None)], "undefined for the autoencoder's embedding"),
        ([probe("autoencoder", 0.5)], "no baseline to compare it with"),
        ([probe("autoencoder", None)], "nor is R² known for a baseline"),
        ([probe("s(W)", 0.5, None), probe("autoencoder", 0.9)], "cannot be judged"),
    ],
)
def test_what_is_missing_is_said(rows: list[dict[str, Any]], words: str) -> None:
    (verdict,) = probe_verdicts(rows)
    assert verdict.outcome == "unclear" and words in verdict.text


def test_decoded_models_are_judged_overall_where_it_is_known() -> None:
    rows = [kept("autoencoder", 0.93), kept("PCA", 0.62), kept("IncrementalPCA", 0.6), kept("autoencoder", 0.1, "cnn")]
    (verdict,) = reconstruction_verdicts(rows)
    assert verdict.outcome == "ahead"
    assert "512 numbers keep 93.0 % [91.0, 95.0] of the accuracy; PCA with as many keeps 62.0 %" in verdict.text
    alone = [kept("autoencoder", 0.93, "mlp"), kept("autoencoder", 0.1, "cnn")]
    assert [one.subject for one in reconstruction_verdicts(alone)] == ["Decoded models, mlp", "Decoded models, cnn"]


def test_a_comparison_of_other_sizes_names_both() -> None:
    (verdict,) = reconstruction_verdicts([kept("autoencoder", 0.5), kept("PCA", 0.62, latent_size=1024)])
    assert verdict.outcome == "behind" and "PCA with 1,024 keeps" in verdict.text


def test_decoded_models_of_unknown_accuracy_are_not_judged() -> None:
    (verdict,) = reconstruction_verdicts([kept("autoencoder", None), kept("PCA", 0.62)])
    assert verdict.outcome == "unclear"


def test_the_joint_model_is_compared_with_the_baselines_and_is_none_of_them() -> None:
    rows = [probe("s(W)", 0.5), probe("autoencoder", 0.6, 0.01), probe("joint", 0.9)]
    ours, joint = probe_verdicts(rows)
    assert (ours.subject, ours.outcome) == ("Test accuracy", "ahead")
    assert (joint.subject, joint.outcome) == ("Test accuracy, joint model", "ahead")
    assert "for the joint model's embedding and 0.500" in joint.text and "The joint model is ahead." in joint.text
    assert "0.900" not in ours.text and "0.600" not in joint.text


def test_what_is_found_is_compared_with_chance() -> None:
    (verdict,) = retrieval_verdicts([found("D → W", 0.9), found("W → D", 0.8)])
    assert (verdict.subject, verdict.outcome) == ("Retrieval by the joint model", "ahead")
    assert verdict.text == (
        "D → W: R@1 is 0.900 [0.880, 0.920], by chance 0.031; W → D: R@1 is 0.800 [0.780, 0.820], by chance 0.031. "
        "The joint model finds more than chance in all of it; there is no other method to compare it with."
    )
    assert retrieval_verdicts([]) == []


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (found("W → D", 0.04), "level"),
        (found("W → D", 0.01, 0.005), "behind"),
        (found("W → D", 0.9, None), "level"),
    ],
)
def test_more_than_chance_is_claimed_only_outside_of_the_interval(row: dict[str, Any], outcome: str) -> None:
    (verdict,) = retrieval_verdicts([found("D → W", 0.9), row])
    assert verdict.outcome == outcome
    assert "For W → D that is not shown to be more than chance." in verdict.text and "finds more" not in verdict.text


def test_labels_are_compared_by_auc_and_what_is_left_above_one_half() -> None:
    rows = [label_probe("s(W)", 0.6), label_probe("autoencoder", 0.8, permuted_auc=0.65)]
    (verdict,) = probe_verdicts(rows)
    assert (verdict.subject, verdict.outcome) == ("Classes", "ahead")
    assert verdict.text == (
        "With ridge on both, AUC is 0.800 [0.780, 0.820] for the autoencoder's embedding and 0.600 [0.580, 0.620] for "
        "s(W). The autoencoder is ahead. On neuron-permuted models the embedding keeps 50 % of its AUC above 0.5."
    )


@pytest.mark.parametrize(
    ("auc", "permuted", "words"),
    [
        (0.45, 0.9, "no better than guessing"),
        (0.8, 0.4, "nothing of the embedding's AUC above 0.5 is left (0.400)"),
        (0.52, 0.51, "too little to say"),
        (0.8, None, "What is left of the embedding's AUC on neuron-permuted models is not known."),
    ],
)
def test_no_share_of_an_auc_is_claimed_that_means_nothing(auc: float, permuted: float | None, words: str) -> None:
    (verdict,) = probe_verdicts([label_probe("s(W)", 0.55), label_probe("autoencoder", auc, permuted_auc=permuted)])
    assert words in verdict.text and "keeps" not in verdict.text


def test_an_auc_that_is_missing_is_said() -> None:
    (verdict,) = probe_verdicts([label_probe("s(W)", 0.6), label_probe("autoencoder", None)])
    assert verdict.outcome == "unclear"
    assert verdict.text == (
        "AUC is undefined for the autoencoder's embedding; it is 0.600 [0.580, 0.620] for the best baseline, s(W) "
        "(ridge)."
    )


def judged(outcome: criteria.Outcome, **changes: Any) -> dict[str, Any]:
    made = criteria.CriterionRow(
        sampler="kde",
        datasets="seen",
        measure=proof.accuracy_after(0),
        subject=f"samples - 95 % of {proof.ZOO}",
        requirement="at least 0",
        value=-0.0161,
        low=-0.0302,
        high=0.0103,
        holds=2,
        of=8,
        outcome=outcome,
    )
    return dataclasses.asdict(made) | changes


def test_outcomes_of_criteria_are_outcomes_of_findings() -> None:
    assert set(get_args(criteria.Outcome)) <= set(get_args(findings.Outcome))


def test_every_criterion_of_a_sampler_is_named_with_its_number() -> None:
    alone = judged(
        "met", measure=proof.SPEARMAN, subject=proof.SAMPLES, requirement="at least 0.8", value=0.9, low=None
    )
    (verdict,) = sample_verdicts([alone, judged("undecided")])
    assert (verdict.subject, verdict.outcome) == ("Samples of kde, seen datasets", "undecided")
    assert verdict.text == (
        "Undecided: accuracy after 0 epochs, samples \N{MINUS SIGN} 95 % of zoo models of the condition "
        "\N{MINUS SIGN}0.016 [\N{MINUS SIGN}0.030, 0.010] (at least 0). Met: requested-obtained Spearman 0.900 "
        "(at least 0.8)."
    )


@pytest.mark.parametrize(
    ("outcomes", "together"),
    [
        (("met", "met"), "met"),
        (("met", "undecided"), "undecided"),
        (("undecided", "not met"), "not met"),
        (("met", "not met"), "not met"),
    ],
)
def test_one_criterion_that_is_not_met_is_enough(outcomes: Sequence[criteria.Outcome], together: str) -> None:
    (verdict,) = sample_verdicts(list(map(judged, outcomes)))
    assert verdict.outcome == together


def test_samplers_and_kinds_of_datasets_have_verdicts_of_their_own() -> None:
    found = sample_verdicts([judged("met"), judged("met", datasets="unseen"), judged("not met", sampler="flow")])
    assert [(verdict.subject, verdict.outcome) for verdict in found] == [
        ("Samples of kde, seen datasets", "met"),
        ("Samples of kde, unseen datasets", "met"),
        ("Samples of flow, seen datasets", "not met"),
    ]
    assert sample_verdicts([]) == []


def test_clusters_across_architectures_count_where_they_are_known() -> None:
    other = clustered("joint", 0.1, label="polarity")
    rows = [clustered("joint", 0.9), clustered("s(W)", 0.07), clustered("joint", 0.5, "mlp"), other]
    assert clustering_answers(rows) == [
        "joint: the nearest run of another architecture was trained on the same dataset for 90.0 % [88.0, 92.0] of the "
        "runs, by chance 3.0 %: more than chance.",
        "s(W): the nearest run of another architecture was trained on the same dataset for 7.0 % [5.0, 9.0] of the "
        "runs, by chance 3.0 %: not shown to be more than chance.",
    ]
    (alone,) = clustering_answers(rows[2:])
    assert alone.startswith("joint (mlp): the nearest run was trained on")


def test_the_largest_factors_are_named_with_what_data_and_training_do_together() -> None:
    rows = [
        share("joint", "polarity", 0.01),
        share("joint", "learning_rate", 0.2),
        share("joint", "classes", 0.3),
        share("joint", "steps", 0.1),
        share("joint", "data x data", 0.4, "interactions"),
        share("joint", "all of data", 0.6, "together"),
        share("joint", "classes", 0.9, models="mlp"),
    ]
    assert variance_answers(rows) == [
        "joint: the largest factors are classes 30.0 %, learning rate 20.0 %, steps 10.0 %; all of data 60.0 %."
    ]
    assert variance_answers(rows[-1:]) == ["joint (mlp): the largest factors are classes 90.0 %."]
    assert clustering_answers([]) == variance_answers([]) == []


def sampled(subject: str, value: float, sampler: str = "kde", **changes: Any) -> dict[str, Any]:
    row = {"sampler": sampler, "datasets": "seen", "measure": proof.accuracy_after(0), "subject": subject}
    return {**row, "value": value, "low": value - 0.02, "high": value + 0.02, **changes}


def test_the_main_results_are_one_sentence_each() -> None:
    records: dict[str, Any] = {
        "probes": [probe("s(W)", 0.5), probe("PCA", 0.56), probe("autoencoder", 0.6), probe("joint", 0.71, 0.01)],
        "reconstruction": [kept("autoencoder", 0.93), kept("PCA", 0.92), kept("IncrementalPCA", 0.6)],
        "retrieval": [{**found("D → W", 0.9), "question": "for a dataset, a model that was trained on it"}],
        "samples": [
            sampled(proof.SAMPLES, 0.8),
            sampled(proof.SAMPLES, 0.9, "flow"),
            sampled(proof.ZOO, 0.93, "flow"),
            sampled(proof.REFINED_SCRATCH, 0.7, "flow"),
            sampled(proof.SAMPLES, 0.95, datasets="unseen"),
        ],
    }
    assert headlines(records) == [
        "Test accuracy is read from the weights of a model with an R² of 0.710 [0.700, 0.720] from the joint model's "
        "embedding with ridge, beside 0.560 [0.510, 0.610] from PCA with ridge, the best baseline.",
        "Models that the autoencoder decodes from 512 numbers keep 93.0 % [91.0, 95.0] of the accuracy of the "
        "originals, beside 92.0 % [90.0, 94.0] with PCA; the intervals overlap.",
        "Models sampled by flow for seen datasets reach a test accuracy of 0.900 [0.880, 0.920] without any training, "
        "beside 0.700 [0.680, 0.720] of the control, from scratch, refined alike.",
    ]
    assert headlines({**records, "samples": []})[-1] == (
        "The joint model finds, for a dataset, a model that was trained on it: R@1 is 0.900 [0.880, 0.920], by chance "
        "0.031."
    )


def test_only_what_was_measured_makes_a_main_result() -> None:
    empty: dict[str, Any] = dict.fromkeys(("probes", "reconstruction", "retrieval", "samples"), ())
    assert headlines(empty) == []
    alone = headlines({**empty, "probes": [probe("s(W)", 0.5)], "reconstruction": [kept("autoencoder", 0.5)]})
    assert alone == [
        "Models that the autoencoder decodes from 512 numbers keep 50.0 % [48.0, 52.0] of the accuracy of the "
        "originals."
    ]
    rows = [probe("s(W)", 0.9), probe("autoencoder", 0.5)]
    (behind,) = headlines({**empty, "probes": rows})
    assert behind.endswith("the best baseline, which wins.")
