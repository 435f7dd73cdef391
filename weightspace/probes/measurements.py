"""What was measured of an encoder, as its card shows it."""

from __future__ import annotations

from collections.abc import Sequence

from weightspace.cards.facts import Measurement, Score
from weightspace.evaluation.retrieval import RetrievalRow
from weightspace.probes.reconstruction import ALL_ARCHITECTURES, ReconstructionRow
from weightspace.probes.rows import ProbeRow
from weightspace.probes.zoo import JOINT


def probe_measurements(rows: Sequence[ProbeRow], name: str) -> list[Measurement]:
    """Returns what a ridge probe of the representation ``name`` reached at each target, and what the others did."""
    measurements = []
    for target in dict.fromkeys(row.target for row in rows):
        own = [row for row in rows if row.target == target and (row.representation, row.estimator) == (name, "ridge")]
        others = [row for row in rows if row.target == target and row.representation != name]
        if own:
            measurements.append(
                Measurement(
                    f"{target} from the embedding (ridge)",
                    *(("roc_auc", "AUC") if own[0].labels else ("r2", "R²")),
                    _score(own[0], name),
                    tuple(_score(row, f"{row.representation}, {row.estimator}") for row in others),
                )
            )
    return measurements


def _score(row: ProbeRow, method: str) -> Score:
    score = row.scores["auc" if row.labels else "r2"]
    return Score(method, score.value, score.low, score.high)


def reconstruction_measurements(rows: Sequence[ReconstructionRow]) -> list[Measurement]:
    """Returns the share of accuracy that the encoder keeps over all architectures, and what PCA does."""
    kept = [
        Score(row.method, row.kept, row.kept_low, row.kept_high)
        for row in rows
        if row.architecture == ALL_ARCHITECTURES
    ]
    if not kept:
        return []
    return [Measurement("reconstruction", "accuracy_kept", "share of accuracy kept", kept[0], tuple(kept[1:]))]


def retrieval_measurements(rows: Sequence[RetrievalRow]) -> list[Measurement]:
    """Returns what a joint model retrieves, beside chance."""
    return [
        Measurement(
            f"retrieval {row.pair} ({row.question})",
            "recall_at_1" if row.measure == "R@1" else "spearmanr",
            row.measure,
            Score(JOINT, row.value, row.low, row.high),
            (Score("chance", row.chance),),
        )
        for row in rows
    ]
