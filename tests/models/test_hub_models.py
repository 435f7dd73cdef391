"""Encoders of the Hub: three lines embed a model, without remote code; and what transformers' own push leaves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download
from loopback_hub import LoopbackHub
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor

import weightspace
from weightspace.cards.facts import EncoderFacts, Measurement, Score
from weightspace.cards.record import known_facts, write_card
from weightspace.io.hub import HubOptions
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.publishing import PushSettings, push_folder
from weightspace.zoo.dataset import Zoo

THREE_LINES = """
import weightspace
from transformers import AutoModel, {auto}

encoder = AutoModel.from_pretrained("org/encoder")
tokenizer = {auto}.from_pretrained("org/encoder")
embedding = encoder.get_weight_features(**tokenizer("org/other")).pooler_output
"""


@pytest.fixture
def measured(tiny_encoder: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    facts = known_facts(folder)
    assert isinstance(facts, EncoderFacts)
    write_card(folder, replace(facts, measurements=(Measurement("size", "r2", "R²", Score("ours", 0.5)),)))
    return folder


@pytest.fixture
def on_hub(hub: LoopbackHub, measured: Path, tiny_zoo: Zoo) -> LoopbackHub:
    push_folder(measured, "org/encoder", PushSettings(licence="mit"))
    hub.create("org/other", {"model.safetensors": tiny_zoo.blob(0)})
    return hub


@pytest.mark.parametrize("auto", ["AutoFeatureExtractor", "AutoProcessor"])
def test_three_lines_embed_a_model(on_hub: LoopbackHub, tiny_encoder: Path, tiny_zoo: Zoo, auto: str) -> None:
    found: dict[str, torch.Tensor] = {}
    exec(THREE_LINES.format(auto=auto), found)
    encoder, extractor = AutoModel.from_pretrained(tiny_encoder), AutoFeatureExtractor.from_pretrained(tiny_encoder)
    expected = encoder.get_weight_features(**extractor(tiny_zoo.checkpoint(0))).pooler_output
    torch.testing.assert_close(found["embedding"], expected, rtol=0, atol=0)


@pytest.mark.slow
def test_three_lines_do_in_a_fresh_process(on_hub: LoopbackHub) -> None:
    code = f"{THREE_LINES.format(auto='AutoProcessor')}\nprint(tuple(embedding.shape))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"(1, {AutoModel.from_pretrained('org/encoder').embedding_size})\n"


def test_the_example_of_the_card_runs(on_hub: LoopbackHub, tiny_zoo: Zoo) -> None:
    example = ModelCard.load("org/encoder").text.split("```python\n")[1].split("```")[0]
    on_hub.create("org/model", {"model.safetensors": tiny_zoo.blob(1)})
    found: dict[str, torch.Tensor] = {}
    exec(example, found)
    assert found["embedding"].shape == (1, WeightAutoencoderModel.from_pretrained("org/encoder").embedding_size)


def test_every_auto_class_knows_the_repository_and_the_folder(on_hub: LoopbackHub, tiny_encoder: Path) -> None:
    for location in ("org/encoder", tiny_encoder):
        assert isinstance(AutoConfig.from_pretrained(location), WeightAutoencoderConfig)
        assert isinstance(AutoModel.from_pretrained(location), WeightAutoencoderModel)
        assert isinstance(AutoFeatureExtractor.from_pretrained(location), WeightFeatureExtractor)
        assert isinstance(AutoProcessor.from_pretrained(location), WeightFeatureExtractor)
    assert not on_hub.seen(r"\.py\b")
    assert "auto_map" not in AutoConfig.from_pretrained("org/encoder").to_dict()


def test_a_private_encoder_needs_a_token(hub: LoopbackHub, measured: Path, tiny_zoo: Zoo) -> None:
    push_folder(measured, "org/secret", PushSettings(private=True))
    for auto in (AutoModel, AutoFeatureExtractor, AutoProcessor):
        with pytest.raises((OSError, ValueError)):
            auto.from_pretrained("org/secret", token=False)
        auto.from_pretrained("org/secret", token=hub.token)


def test_an_encoder_loads_offline_from_the_cache(on_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = AutoModel.from_pretrained("org/encoder").state_dict()
    AutoProcessor.from_pretrained("org/encoder")
    on_hub.stop()
    again = AutoModel.from_pretrained("org/encoder", local_files_only=True).state_dict()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = AutoModel.from_pretrained("org/encoder").state_dict()
    assert all(torch.equal(value, again[name]) and torch.equal(value, offline[name]) for name, value in online.items())
    assert isinstance(AutoProcessor.from_pretrained("org/encoder"), WeightFeatureExtractor)
    on_hub.start()


def test_pushing_with_transformers_keeps_the_card(hub: LoopbackHub, measured: Path) -> None:
    encoder = AutoModel.from_pretrained(measured)
    encoder.push_to_hub("org/pushed")
    AutoFeatureExtractor.from_pretrained(measured).push_to_hub("org/pushed")
    card = ModelCard.load("org/pushed")
    assert "| size | R² | **ours** | **0.500** |" in card.text and "48 models" in card.text
    assert 'AutoModel.from_pretrained("org/pushed")' in card.text and card.data.library_name == "weightspace"
    AutoModel.from_pretrained("org/pushed").push_to_hub("org/copy")
    assert "| size | R² | **ours** | **0.500** |" in ModelCard.load("org/copy").text
    plan, _ = push_folder(measured, "org/pushed", PushSettings(licence="mit"))
    assert not plan.notices


def test_pushing_other_weights_says_only_what_they_show(hub: LoopbackHub, measured: Path) -> None:
    encoder = AutoModel.from_pretrained(measured)
    with torch.no_grad():
        encoder.to_latent.weight += 1
    encoder.push_to_hub("org/changed")
    assert "Nothing was measured" in ModelCard.load("org/changed").text
    config = AutoConfig.from_pretrained(measured)
    AutoModel.from_config(config).push_to_hub("org/fresh")
    card = ModelCard.load("org/fresh")
    assert f"{encoder.num_parameters():,} parameters" in card.text and "Training data" not in card.text


def test_pushing_with_transformers_keeps_what_people_wrote(hub: LoopbackHub, measured: Path) -> None:
    encoder = AutoModel.from_pretrained(measured)
    encoder.push_to_hub("org/pushed")
    edited = ModelCard.load("org/pushed").content.replace("A weight encoder", "Our weight encoder")
    hub.commit("org/pushed", {"README.md": edited})
    encoder.push_to_hub("org/pushed")
    assert "Our weight encoder" in ModelCard.load("org/pushed").text


def test_pushing_with_transformers_to_a_branch_with_tags(hub: LoopbackHub, measured: Path) -> None:
    AutoModel.from_pretrained(measured).push_to_hub(
        "org/branched", revision="next", tags=["mine"], commit_message="Try"
    )
    assert hub.repository("org/branched").at("next").title == "Try"
    assert "model.safetensors" not in hub.repository("org/branched").at("main").files
    files = hub.repository("org/branched").at("next").files
    assert {"README.md", "card.json", "config.json", "model.safetensors"} <= set(files)
    card = ModelCard.load(hf_hub_download("org/branched", "README.md", revision="next"))
    assert "mine" in card.data.tags and "weightspace" in card.data.tags


def test_an_encoder_of_the_hub_embeds_models_of_the_hub(on_hub: LoopbackHub, tiny_encoder: Path) -> None:
    table = weightspace.embed(["org/other"], encoder="org/encoder", options=HubOptions(token=on_hub.token))
    assert table["embedding"][0].shape == (AutoModel.from_pretrained(tiny_encoder).embedding_size,)
