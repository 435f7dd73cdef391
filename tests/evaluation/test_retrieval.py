from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from weightspace.data.features import features_of_datasets
from weightspace.data.image_encoders import open_image_encoder
from weightspace.encoder import Encoder, embed_dataset, embed_zoo, load_encoder
from weightspace.evaluation.retrieval import retrieval_table
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.training.run import TrainingRecord, read_training
from weightspace.zoo.dataset import Zoo


@pytest.fixture(scope="module")
def joint(tiny_clip_joint: Path) -> Encoder:
    return load_encoder(tiny_clip_joint)


@pytest.fixture(scope="module")
def training(tiny_clip_joint: Path) -> TrainingRecord:
    state = read_training(tiny_clip_joint)
    assert state is not None
    return state


def pairs(zoo: Zoo, joint: Encoder, training: TrainingRecord, **changes: Any) -> list[str]:
    settings = {**training.settings, **changes}
    return [row.pair for row in retrieval_table(zoo, joint, replace(training, settings=settings))]


def test_counts_what_test_models_find(tiny_zoo: Zoo, joint: Encoder, training: TrainingRecord) -> None:
    assert isinstance(joint.model, JointModel)
    names = sorted(set(tiny_zoo.index["dataset"]))
    seen = features_of_datasets(names, open_image_encoder(training.settings["image_encoder"]), images=20)
    datasets = torch.cat([embed_dataset(joint.model, one) for one in seen])
    rows = np.flatnonzero(tiny_zoo.index["run_id"].isin(training.test_runs))
    weights = F.normalize(torch.from_numpy(embed_zoo(joint, tiny_zoo, rows)), dim=-1)
    own = tiny_zoo.index["dataset"].to_numpy()[rows]
    similarity = (datasets @ weights.T).numpy()
    asked = [number for number, name in enumerate(names) if name in own]
    models = np.mean([own[similarity[number].argmax()] == names[number] for number in asked])
    found = np.mean([names[number] == name for number, name in zip(similarity.argmax(0), own, strict=True)])
    by_dataset, by_weights, by_result = retrieval_table(tiny_zoo, joint, training)
    assert (by_dataset.queries, by_dataset.candidates) == (len(asked), len(rows))
    assert (by_weights.queries, by_weights.candidates) == (len(rows), len(names))
    assert by_dataset.value == pytest.approx(models) and by_weights.value == pytest.approx(found)
    assert by_weights.chance == pytest.approx(1 / len(names))
    assert (by_result.measure, by_result.candidates, by_result.chance) == ("Spearman", len(rows), 0.0)


def test_asks_about_datasets_that_were_trained_on(tiny_zoo: Zoo, joint: Encoder, training: TrainingRecord) -> None:
    names = tuple(sorted(set(tiny_zoo.index["dataset"])))
    rows = retrieval_table(
        tiny_zoo, joint, replace(training, settings={**training.settings, "held_out_datasets": names[:3]})
    )
    assert rows[1].candidates == len(names) - 3
    assert pairs(tiny_zoo, joint, training, held_out_datasets=names) == []


def test_leaves_out_what_the_model_knows_nothing_of(
    tiny_zoo: Zoo, joint: Encoder, training: TrainingRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(joint.model.result_model.config, "results", ["test_loss"])
        assert pairs(tiny_zoo, joint, training) == ["D → W", "W → D"]
