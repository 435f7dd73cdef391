"""The cards in ``model_cards`` say what their facts say, and the facts what the folders of the demo say.

``WEIGHTSPACE_DEMO=FOLDER`` names the output of a finished ``weightspace demo``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import DatasetCard
from loopback_hub import LoopbackHub

from weightspace.cards.facts import EncoderFacts, ZooFacts
from weightspace.cards.record import CardRecord, card_digest, notes_of, parse_record, render_card, weights_digest

FOLDER = Path(__file__).parent.parent / "model_cards"
CARDS = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")


def record_of(card: Path) -> CardRecord:
    path = card.with_suffix(".json")
    return parse_record(path.read_text(encoding="utf-8"), where=str(path))


def demo() -> Path:
    folder = os.environ.get("WEIGHTSPACE_DEMO")
    if not folder or not (Path(folder) / "report.json").is_file():
        pytest.skip("WEIGHTSPACE_DEMO names no finished demo")
    return Path(folder)


def test_every_card_is_listed() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert CARDS and all(f"({card.name})" in readme for card in CARDS)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_card_is_what_its_facts_render_to(card: Path) -> None:
    text, record = card.read_text(encoding="utf-8"), record_of(card)
    assert render_card(record.facts, notes_of(text)) == text
    assert record.rendered == card_digest(text)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_hub_accepts_the_card(hub: LoopbackHub, card: Path) -> None:
    kind = DatasetCard if isinstance(record_of(card).facts, ZooFacts) else ModelCard
    loaded = kind.load(card)
    loaded.validate()
    assert loaded.data.license == "apache-2.0"
    if kind is ModelCard:
        assert loaded.data.eval_results and loaded.data.library_name == "weightspace"


def test_the_encoder_of_the_demo_is_the_one_of_the_card() -> None:
    encoder, record = demo() / "encoder", record_of(FOLDER / "demo-encoder.md")
    facts = record.facts
    assert isinstance(facts, EncoderFacts) and facts.zoo is not None
    config = json.loads((encoder / "config.json").read_text())
    volatile = {"transformers_version"}
    assert all(config[name] == value for name, value in facts.config.items() if name in config and name not in volatile)
    training = json.loads((encoder / "training.json").read_text())
    assert facts.training == training["settings"] and facts.parameters == training["parameters"]
    zoo = json.loads((demo() / "zoo" / "zoo.json").read_text())
    assert facts.zoo.models == zoo["models"]
    assert zoo["digest"] == training["zoo_digest"]
    if (record.weights, facts.zoo.digest) != (weights_digest(encoder), zoo["digest"]):
        pytest.skip("this demo is another run than that of the card: its digests and numbers are its own")
    report = json.loads((demo() / "report.json").read_text())
    measured = {
        (one.task, score.method): score.value for one in facts.measurements for score in (one.score, *one.baselines)
    }
    for row in report["probes"]:
        task = f"{row['target']} from the embedding (ridge)"
        own = row["representation"] == "autoencoder"
        if own and row["estimator"] != "ridge":
            continue
        method = "autoencoder" if own else f"{row['representation']}, {row['estimator']}"
        assert measured.pop((task, method)) == pytest.approx(row["auc" if row["labels"] else "r2"])
    for row in report["reconstruction"]:
        if row["architecture"] == "all":
            assert measured.pop(("reconstruction", row["method"])) == pytest.approx(row["kept"])
    assert not measured


def test_the_zoo_of_the_demo_is_the_one_of_the_card() -> None:
    facts = record_of(FOLDER / "demo-zoo.md").facts
    zoo = json.loads((demo() / "zoo" / "zoo.json").read_text())
    assert isinstance(facts, ZooFacts)
    assert (
        facts.models == zoo["models"] == sum(one.models for one in facts.architectures) == sum(facts.datasets.values())
    )
    if facts.digest != zoo["digest"]:
        pytest.skip("this demo is another run than that of the card: its digests and numbers are its own")
    assert facts.settings == zoo["settings"]
