"""Probes and baselines: what can be read off weights, by how much, and what is left of it after neuron permutation."""

from __future__ import annotations

from weightspace.probes.labels import Labels
from weightspace.probes.metrics import (
    RunBootstrap,
    auc,
    balanced_accuracy,
    evaluate_metric,
    interval,
    kendall_tau,
    r2,
)
from weightspace.probes.probe import (
    ESTIMATORS,
    STANDARD_ESTIMATORS,
    Predictions,
    ProbeRow,
    RidgePath,
    format_table,
    probe_table,
    rows_to_records,
)
from weightspace.probes.representations import (
    CodeFeatures,
    FeatureBlock,
    FixedFeatures,
    LinearCodes,
    Representation,
    WeightBlock,
    baselines,
    collect_weights,
    embedding_features,
    weight_invariants,
    weight_statistics,
)
from weightspace.zoo.splits import Split, split_by_dataset, split_by_run

__all__ = [
    "ESTIMATORS",
    "STANDARD_ESTIMATORS",
    "CodeFeatures",
    "FeatureBlock",
    "FixedFeatures",
    "Labels",
    "LinearCodes",
    "Predictions",
    "ProbeRow",
    "Representation",
    "RidgePath",
    "RunBootstrap",
    "Split",
    "WeightBlock",
    "auc",
    "balanced_accuracy",
    "baselines",
    "collect_weights",
    "embedding_features",
    "evaluate_metric",
    "format_table",
    "interval",
    "kendall_tau",
    "probe_table",
    "r2",
    "rows_to_records",
    "split_by_dataset",
    "split_by_run",
    "weight_invariants",
    "weight_statistics",
]
