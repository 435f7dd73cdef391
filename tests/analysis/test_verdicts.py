from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightspace.analysis.verdicts import probe_verdicts, reconstruction_verdicts, retrieval_verdicts


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
    }
    return {**row, **changes}


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
    (verdict,) = reconstruction_verdicts(rows, "all")
    assert verdict.outcome == "ahead"
    assert "512 numbers keep 93.0 % [91.0, 95.0] of the accuracy; PCA with as many keeps 62.0 %" in verdict.text
    assert [one.subject for one in reconstruction_verdicts(rows, "every")] == [
        "Decoded models, all",
        "Decoded models, cnn",
    ]


def test_a_comparison_of_other_sizes_names_both() -> None:
    (verdict,) = reconstruction_verdicts([kept("autoencoder", 0.5), kept("PCA", 0.62, latent_size=1024)], "all")
    assert verdict.outcome == "behind" and "PCA with 1,024 keeps" in verdict.text


def test_decoded_models_of_unknown_accuracy_are_not_judged() -> None:
    (verdict,) = reconstruction_verdicts([kept("autoencoder", None), kept("PCA", 0.62)], "all")
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
        "The joint model finds more than chance in all of it; no other method was asked."
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
