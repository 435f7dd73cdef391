from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightspace.crawl.card_facts import (
    MAX_METRIC_COLUMNS,
    MAX_METRICS,
    CardFacts,
    card_facts,
    card_results,
    card_text_facts,
    metric_columns,
    metrics_left_out,
    trainer_facts,
    training_hyperparameters,
)
from weightspace.schema import ReportedMetric


def index(*metrics: dict[str, Any], **dataset: Any) -> dict[str, Any]:
    results = [{"task": {"type": "t"}, "dataset": {"type": "mnist", **dataset}, "metrics": list(metrics)}]
    return {"model-index": [{"name": "m", "results": results}]}


def test_a_row_of_the_listing() -> None:
    card = {
        "license": "mit",
        "base_model": ["org/base", "org/other"],
        "datasets": "mnist",
        **index({"type": "accuracy", "value": 0.9, "verified": True}, split="test"),
    }
    row = {
        "cardData": card,
        "tags": ["generated_from_trainer"],
        "pipeline_tag": "image-classification",
        "library_name": "timm",
        "config": {"peft": {"base_model_name_or_path": "not/asked"}},
    }
    metric = ReportedMetric("accuracy", 0.9, "mnist", "test", verified=True)
    assert card_facts(row) == CardFacts(
        "mit", "image-classification", "timm", ("org/base", "org/other"), ("mnist",), (metric,), trained_by_trainer=True
    )


def test_tags_and_adapter_config_stand_in_for_a_card() -> None:
    row = {
        "tags": ["license:apache-2.0", "dataset:a", "dataset:b"],
        "config": {"peft": {"base_model_name_or_path": "org/base"}},
    }
    assert card_facts(row) == CardFacts("apache-2.0", base_models=("org/base",), datasets=("a", "b"))


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (1, 1.0),
        (0.25, 0.25),
        ("95 %", "95 %"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (True, "True"),
        ([1, 2], "[1, 2]"),
        ("\x1b[2J", r"'\x1b[2J'"),
    ],
)
def test_values_are_kept_as_written(value: Any, kept: Any) -> None:
    (metric,) = card_facts({"cardData": index({"type": "accuracy", "value": value})}).metrics
    assert metric.value == kept
    assert type(metric.value) is type(kept)


def test_a_number_beyond_floats_becomes_a_text() -> None:
    (metric,) = card_facts({"cardData": index({"type": "accuracy", "value": 10**400})}).metrics
    assert isinstance(metric.value, str)
    assert len(metric.value) < 120


def test_metrics_of_a_card_are_bounded() -> None:
    many = [{"type": f"metric {i}", "value": i} for i in range(MAX_METRICS + 10)]
    metrics = card_facts({"cardData": index(*many)}).metrics
    assert len(metrics) == MAX_METRICS
    assert len(metric_columns([metrics])) == MAX_METRIC_COLUMNS


KEYS = [
    *("cardData", "model-index", "results", "dataset", "args", "metrics", "type", "value", "license", "tags", "config"),
    *(
        "peft",
        "base_model",
        "datasets",
        "base_model_name_or_path",
        "pipeline_tag",
        "log_history",
        "global_step",
        "step",
    ),
    *("epoch", "eval_loss"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=30,
)


@given(row=st.dictionaries(st.sampled_from(["cardData", "tags", "config", "log_history", "global_step"]), JSON))
def test_no_row_is_too_strange(row: dict[str, Any]) -> None:
    facts = card_facts(row)
    state = trainer_facts(row)
    results = card_results(facts.metrics)
    assert all(math.isfinite(value) for value in (*results.values(), *state.results.values()))
    texts = [facts.licence, facts.task, facts.library, *facts.base_models, *facts.datasets]
    assert all(text is None or text.isprintable() for text in texts)
    json.dumps([str(metric) for metric in facts.metrics + state.metrics], allow_nan=False)


@pytest.mark.parametrize(
    ("metrics", "accuracy"),
    [
        ([ReportedMetric("accuracy", 0.9, "d", "test")], 0.9),
        ([ReportedMetric("Accuracy", 90.0, "d", "validation")], 0.9),
        ([ReportedMetric("accuracy", 0.9, "d", "test"), ReportedMetric("accuracy", 0.9, "e", "test")], 0.9),
        ([ReportedMetric("accuracy", 0.9, "d", "test"), ReportedMetric("accuracy", 0.8, "e", "test")], None),
        ([ReportedMetric("accuracy", 0.9, "d", "train")], None),
        ([ReportedMetric("accuracy", 0.9, "d")], None),
        ([ReportedMetric("accuracy", "0.9", "d", "test")], None),
        ([ReportedMetric("accuracy", -3.0, "d", "test")], None),
        ([ReportedMetric("accuracy", 1e300, "d", "test")], None),
    ],
)
def test_accuracy_counts_where_it_is_unambiguous(metrics: list[ReportedMetric], accuracy: float | None) -> None:
    assert card_results(metrics).get("test_accuracy") == accuracy


def test_each_kind_of_metric_is_a_column() -> None:
    metrics = [
        ReportedMetric("F1 (macro)", 0.5),
        ReportedMetric("wer", 0.1, "a"),
        ReportedMetric("wer", 0.2, "b"),
        ReportedMetric("size", 3.0),
        ReportedMetric("test_loss", 2.0),
        ReportedMetric("loss", 1.5, "d", "test"),
        ReportedMetric("???", 1.0),
    ]
    expected = {"f1_macro": 0.5, "metric_size": 3.0, "metric_test_loss": 2.0, "loss": 1.5, "test_loss": 1.5}
    assert card_results(metrics) == expected
    assert metric_columns([metrics]) == ("f1_macro", "loss", "metric_size", "metric_test_loss")


def test_hyperparameters_of_a_trainer_card() -> None:
    card = """
## Training procedure

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 5e-05
- train_batch_size: 32
- optimizer: Use adamw_torch with betas=(0.9,0.999)
- mixed_precision_training: Native AMP

### Training results

- not_one: 3
"""
    assert training_hyperparameters(card) == {
        "learning_rate": 5e-05,
        "train_batch_size": 32.0,
        "optimizer": "Use adamw_torch with betas=(0.9,0.999)",
        "mixed_precision_training": "Native AMP",
    }
    assert training_hyperparameters("- learning_rate: 1") == {}


@pytest.mark.parametrize(
    ("name", "value", "column"),
    [
        ("accuracy", 0.77, 0.77),
        ("accuracy", 91.2, 0.912),
        ("accuracy", "91.2 %", 0.912),
        ("accuracy", 100, 1.0),
        ("accuracy", 1, 1.0),
        ("F1 (macro)", 88.0, 0.88),
        ("eval_f1", 88.0, 0.88),
        ("cos_sim_pearson", -12.5, -0.125),
        ("bleu", 34.0, 0.34),
        ("rougeL", 41.0, 0.41),
        ("top-5 accuracy", 99.0, 0.99),
        ("accuracy", 12345.0, None),
        ("perplexity", 12.5, 12.5),
        ("loss", 3.5, 3.5),
        ("accuracy loss", 3.5, 3.5),
        ("mean reward", 210.0, 210.0),
        ("reward", "12%", 0.12),
        ("accuracy", "about 90 %", None),
    ],
)
def test_a_column_has_one_unit(name: str, value: Any, column: float | None) -> None:
    found = card_facts({"cardData": index({"type": name, "value": value})}).metrics
    assert found[0].value == value  # as written
    results = card_results(found)
    assert list(results.values()) == ([] if column is None else [pytest.approx(column)])


def test_a_cut_card_is_counted() -> None:
    many = [{"type": f"metric {i}", "value": i} for i in range(MAX_METRICS + 7)]
    assert metrics_left_out({"cardData": index(*many)}) == 7
    assert metrics_left_out({"model-index": index(*many[:3])["model-index"]}) == 0


TRAINER_CARD = """
This model is a fine-tuned version of [org/base](https://huggingface.co/org/base) on the mnist dataset.
It achieves the following results on the evaluation set:
- Loss: 0.3042
- Accuracy: 91.5
- F1: 0.9
- Note: see below

## Training procedure

### Training hyperparameters

- learning_rate: 5e-05

### Training results

| Training Loss | Epoch | Step | Validation Loss | Accuracy |
|:-------------:|:-----:|:----:|:---------------:|:--------:|
| 0.5           | 1.0   | 100  | 0.4             | 88.0     |
| 0.4           | 2.0   | 200  | 0.3042          | 91.5     |
| 0.3           | 3.0   | 300  | 0.35            | 91.0     |

### Framework versions
"""


def test_results_in_the_text_of_a_trainer_card() -> None:
    facts = card_text_facts(TRAINER_CARD)
    assert facts.results == {"test_loss": 0.3042, "test_accuracy": 0.915, "epoch": 2.0, "step": 200.0}
    assert facts.hyperparameters == {"learning_rate": 5e-05}
    assert [(metric.name, metric.value) for metric in facts.metrics] == [
        ("Loss", 0.3042),
        ("Accuracy", 91.5),
        ("F1", 0.9),
        ("Note", "see below"),
    ]
    assert {metric.split for metric in facts.metrics} == {"evaluation"}


@pytest.mark.parametrize("loss", ["0.31", "nan", "low"])
def test_a_table_of_other_weights_gives_no_step(loss: str) -> None:
    facts = card_text_facts(TRAINER_CARD.replace("- Loss: 0.3042", f"- Loss: {loss}"))
    assert not facts.results.keys() & {"epoch", "step"}
    assert card_text_facts("| Validation Loss |\n|--|\n| 1 |\n").results == {}


def test_a_hostile_card_stays_short() -> None:
    lines = (f"- key{i}: {'9' * 400 if i % 2 else 'nan'}\n" for i in range(10**4))
    card = "# Training hyperparameters\n" + "".join(lines)
    found = training_hyperparameters(card)
    assert 0 < len(found) <= 200
    assert all(value == "nan" for value in found.values())


def test_the_trainer_state_of_a_checkpoint() -> None:
    state = {
        "global_step": 500,
        "epoch": 2.5,
        "max_steps": 1000,
        "num_train_epochs": 5,
        "log_history": [
            {"step": 250, "eval_loss": 9.0},
            {"step": 500, "loss": 0.5, "learning_rate": 1e-4},
            {"step": 500, "eval_loss": 0.7, "eval_accuracy": 0.8, "eval_runtime": 3.0, "eval_samples_per_second": 7.0},
        ],
    }
    facts = trainer_facts(state)
    assert facts.results == {"step": 500.0, "epoch": 2.5, "test_loss": 0.7, "test_accuracy": 0.8}
    assert facts.hyperparameters == {"max_steps": 1000.0, "num_train_epochs": 5.0}
    assert facts.metrics == (
        ReportedMetric("eval_loss", 0.7, split="evaluation"),
        ReportedMetric("eval_accuracy", 0.8, split="evaluation"),
    )
