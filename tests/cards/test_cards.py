from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from weightspace.cards import EncoderFacts, Measurement, Score, TrainingZoo, write_encoder_card
from weightspace.errors import WeightspaceError

HOSTILE = "a | b\n---\n<script>alert(1)</script> ``` *x*"
FACTS = EncoderFacts(
    name="digits-encoder",
    location="demo/encoder",
    licence="apache-2.0",
    parameters=3211264,
    embedding_size=192,
    zoo=TrainingZoo(
        "digits-zoo",
        digest="abc123",
        models=3200,
        runs=1600,
        architectures=("MLP 64-16-10",),
        datasets=("digits", "digits?rotation=90"),
        licences={"apache-2.0": 3000, "mit": 200},
    ),
    config={"hidden_size": 256},
    training={"max_steps": 4321},
    measurements=(
        Measurement(
            "test accuracy from the embedding",
            "r2",
            "R²",
            Score("autoencoder with ridge", 0.7123456, 0.66, 0.75),
            (Score("s(W) with ridge", 0.5612345, 0.52, 0.6), Score("W with ridge", math.nan)),
        ),
    ),
    limits=("Language models are out of reach.",),
)


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, flags=re.MULTILINE)


def test_the_card_says_what_was_measured_beside_the_baselines(tmp_path: Path) -> None:
    path = write_encoder_card(tmp_path / "new", FACTS)
    text = path.read_text(encoding="utf-8")
    assert path.name == "README.md"
    assert "| **autoencoder with ridge** | **0.712 [0.660, 0.750]** |" in text
    assert "| s(W) with ridge | 0.561 [0.520, 0.600] |" in text
    assert "| W with ridge | n/a |" in text
    assert "digest abc123): 3,200 models of 1,600 training runs." in text
    assert "apache-2.0 (3,000 models); mit (200 models)" in text
    assert "3,211,264 parameters" in text and "- Language models are out of reach." in text
    assert "\n\n\n" not in text


def test_the_metadata_are_read_back(tmp_path: Path) -> None:
    data = ModelCard.load(write_encoder_card(tmp_path, FACTS)).data
    assert (data.library_name, data.license, data.model_name) == ("weightspace", "apache-2.0", "digits-encoder")
    assert "weightspace" in data.tags and data.metrics == ["r2"]
    (result,) = data.eval_results
    assert (result.metric_value, result.metric_type, result.dataset_name) == (0.7123456, "r2", "digits-zoo")
    assert data.datasets is None


def test_a_zoo_on_the_hub_is_linked(tmp_path: Path) -> None:
    zoo = TrainingZoo("digits-zoo", hub_id="org/digits-zoo")
    data = ModelCard.load(write_encoder_card(tmp_path, replace(FACTS, zoo=zoo))).data
    assert data.datasets == ["org/digits-zoo"] and data.eval_results[0].dataset_type == "org/digits-zoo"


def test_the_loading_example_is_three_lines_of_python(tmp_path: Path) -> None:
    text = write_encoder_card(tmp_path, replace(FACTS, location='a"b`c')).read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    lines = [line for line in example.splitlines() if line]
    assert lines[:2] == ["import weightspace", "from transformers import AutoModel"] and len(lines) == 3
    loaded: list[str] = []
    model = type("AutoModel", (), {"from_pretrained": staticmethod(loaded.append)})
    exec(compile(lines[2], "card", "exec"), {"AutoModel": model})
    assert loaded == ['a"b`c']


def test_nothing_is_said_of_what_is_not_known(tmp_path: Path) -> None:
    text = write_encoder_card(tmp_path, EncoderFacts("bare")).read_text(encoding="utf-8")
    assert headings(text) == ["Intended use"]
    assert "None" not in text and "model-index" not in text and "license" not in text
    measured = replace(FACTS, zoo=None, measurements=(replace(FACTS.measurements[0], score=Score("x", math.nan)),))
    card = write_encoder_card(tmp_path, measured)
    assert "Training data" not in headings(card.read_text(encoding="utf-8"))
    assert ModelCard.load(card).data.eval_results is None


def test_texts_cannot_break_out(tmp_path: Path) -> None:
    zoo = TrainingZoo(HOSTILE, digest=HOSTILE, architectures=(HOSTILE,), datasets=(HOSTILE,), licences={HOSTILE: 1})
    scores = (Score(HOSTILE, 0.5),)
    measurement = Measurement(HOSTILE, "r2", HOSTILE, scores[0], scores)
    config = {"note": HOSTILE}
    facts = EncoderFacts(HOSTILE, HOSTILE, zoo=zoo, config=config, measurements=(measurement,), limits=(HOSTILE,))
    card = ModelCard.load(write_encoder_card(tmp_path, facts))
    outside = re.sub(r"```\w+\n.*?\n```", "", card.text, flags=re.DOTALL)
    assert "<script" not in outside and "`" not in outside.replace("\\`", "")
    assert headings(card.text) == ["Measured", "Training data", "Intended use", "Limits", "Configuration"]
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows) and len(rows) == 4
    assert card.data.eval_results[0].dataset_name == HOSTILE


def test_an_unwritable_folder_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightspaceError, match=r"file.*choose another folder"):
        write_encoder_card(tmp_path / "file", FACTS)
    (tmp_path / "folder" / "README.md").mkdir(parents=True)
    with pytest.raises(WeightspaceError, match=r"README\.md: cannot be written"):
        write_encoder_card(tmp_path / "folder", FACTS)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["README.md"]
