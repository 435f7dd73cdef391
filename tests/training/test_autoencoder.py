from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from weightspace.data.images import load_images
from weightspace.encoder import load_encoder
from weightspace.errors import SettingsError, ZooError
from weightspace.networks.families import MLPConfig, Network, family_config, run_flat
from weightspace.schema import ZooEntry
from weightspace.training import autoencoder, run
from weightspace.training.autoencoder import (
    AutoencoderSettings,
    EncoderSettings,
    train_autoencoder,
)
from weightspace.training.behaviour import BehaviourSettings, QueryImages
from weightspace.training.loop import read_history
from weightspace.training.run import read_training
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.writer import ZooWriter

ROOT = Path(__file__).parents[2]


def shorter(settings: AutoencoderSettings, steps: int = 4, **encoder: Any) -> AutoencoderSettings:
    return replace(
        settings,
        encoder=replace(settings.encoder, **encoder),
        loop=replace(settings.loop, steps=steps, checkpoint_every=2),
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestTraining:
    def test_leaves_an_encoder_and_how_it_came_about(
        self, tiny_encoder: Path, tiny_zoo: Zoo, tiny_encoder_settings: AutoencoderSettings
    ) -> None:
        assert sorted(path.name for path in tiny_encoder.iterdir()) == [
            "README.md",
            "card.json",
            "config.json",
            "history.jsonl",
            "model.safetensors",
            "preprocessor_config.json",
            "training.json",
        ]
        state = read_training(tiny_encoder)
        assert state is not None
        assert state.complete
        assert state.zoo == str(tiny_zoo.path)
        assert state.zoo_digest == tiny_zoo.digest
        assert state.settings == json.loads(json.dumps(asdict(tiny_encoder_settings)))
        assert state.parameters == load_encoder(tiny_encoder).model.num_parameters()
        assert state.test_runs
        assert not set(state.test_runs) & set(state.validation_runs)

    def test_learns_to_reconstruct(self, tiny_encoder: Path) -> None:
        history = read_history(tiny_encoder)
        assert [row["step"] for row in history] == [5, 10, 15, 20]
        assert set(history[-1]) == {
            "step",
            "loss",
            "reconstruction",
            "contrastive",
            "behaviour",
            "learning_rate",
            "validation_reconstruction",
            "validation_behaviour",
        }
        assert history[-1]["reconstruction"] < history[0]["reconstruction"]

    def test_mixes_structure_and_behaviour_as_asked(self, tiny_encoder: Path) -> None:
        for row in read_history(tiny_encoder):
            structure = 0.95 * row["reconstruction"] + 0.05 * row["contrastive"]
            assert row["loss"] == pytest.approx(0.5 * structure + 0.5 * row["behaviour"], rel=1e-4)

    @pytest.mark.parametrize("compression", [1.5, 2.0])
    def test_compresses_as_far_as_asked(
        self, compression: float, tiny_zoo: Zoo, tiny_encoder_settings: AutoencoderSettings, tmp_path: Path
    ) -> None:
        settings = shorter(tiny_encoder_settings, steps=1, compression=compression)
        encoder = load_encoder(train_autoencoder(tiny_zoo.path, tmp_path / "encoder", settings))
        sparsest = min(one.numel / encoder.latent_size(one) for one in tiny_zoo.architectures.values())
        size = encoder.model.config.latent_size
        assert sparsest >= compression > sparsest * size / (size + 1)

    def test_the_same_settings_give_the_same_encoder(
        self, tiny_zoo: Zoo, tiny_encoder_settings: AutoencoderSettings, tmp_path: Path
    ) -> None:
        settings = shorter(tiny_encoder_settings)
        for name in ("a", "b"):
            train_autoencoder(tiny_zoo.path, tmp_path / name, settings)
        assert content(tmp_path / "a") == content(tmp_path / "b")

    def test_a_killed_training_ends_as_the_uninterrupted_one(
        self, tiny_zoo: Zoo, tiny_encoder_settings: AutoencoderSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = shorter(tiny_encoder_settings)
        train_autoencoder(tiny_zoo.path, tmp_path / "whole", settings)
        losses, calls = autoencoder.AutoencoderObjective.losses, []

        def dying(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return losses(*arguments)

        monkeypatch.setattr(autoencoder.AutoencoderObjective, "losses", dying)
        with pytest.raises(KeyboardInterrupt):
            train_autoencoder(tiny_zoo.path, tmp_path / "killed", settings)
        state = read_training(tmp_path / "killed")
        assert state is not None
        assert not state.complete
        train_autoencoder(tiny_zoo.path, tmp_path / "killed", settings)
        assert len(calls) == 6  # two steps from the checkpoint on
        assert content(tmp_path / "killed") == content(tmp_path / "whole")

    @pytest.mark.slow
    def test_two_processes_leave_one_whole_encoder(
        self, tiny_zoo: Zoo, tiny_encoder_settings: AutoencoderSettings, tmp_path: Path
    ) -> None:
        settings = shorter(tiny_encoder_settings)
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(settings)))))
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
        script = ["hub_scripts/train_autoencoder.py", f"--zoo={tiny_zoo.path}", f"--output={tmp_path / 'encoder'}"]
        done = subprocess.run(
            [sys.executable, "-m", *launch, "--main_process_port=0", *script, f"--config={tmp_path / 'settings.yaml'}"],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr
        state = read_training(tmp_path / "encoder")
        assert state is not None
        assert state.complete
        assert [row["step"] for row in read_history(tmp_path / "encoder")] == [4]
        load_encoder(tmp_path / "encoder").embed(tiny_zoo.flat([0]), next(iter(tiny_zoo.architectures.values())))


class TestReuse:
    def test_a_complete_encoder_is_left_as_it_is(
        self, tiny_encoder: Path, tiny_zoo: Zoo, tiny_encoder_settings: AutoencoderSettings, monkeypatch: Any
    ) -> None:
        before = {path: path.stat().st_mtime_ns for path in tiny_encoder.iterdir()}
        monkeypatch.setattr(run, "fit", None)
        assert train_autoencoder(tiny_zoo.path, tiny_encoder, tiny_encoder_settings) == tiny_encoder
        assert {path: path.stat().st_mtime_ns for path in tiny_encoder.iterdir()} == before

    def test_other_settings_are_refused(
        self, tiny_encoder: Path, tiny_zoo: Zoo, tiny_encoder_settings: AutoencoderSettings
    ) -> None:
        for other in (replace(tiny_encoder_settings, split_seed=1), shorter(tiny_encoder_settings)):
            with pytest.raises(ZooError, match="holds an encoder of another zoo or other settings"):
                train_autoencoder(tiny_zoo.path, tiny_encoder, other)

    def test_another_zoo_is_refused(
        self, tiny_encoder: Path, tiny_encoder_settings: AutoencoderSettings, tmp_path: Path, tiny_zoo: Zoo
    ) -> None:
        copied(tiny_zoo, tmp_path / "zoo")
        with pytest.raises(ZooError, match=str(tiny_encoder)):
            train_autoencoder(tmp_path / "zoo", tiny_encoder, tiny_encoder_settings)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"complete": 1, "test_runs": []}'])
    def test_what_is_no_training_record_is_refused(self, text: str, tmp_path: Path) -> None:
        assert read_training(tmp_path) is None
        (tmp_path / "training.json").write_text(text)
        with pytest.raises(ZooError, match=r"training\.json: not a training record"):
            read_training(tmp_path)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"heads": 5}, "encoder: .*num_attention_heads"),
            ({"beta": 2.0}, "encoder: .*beta"),
            ({"tokenizer": "vowel"}, "vowel"),
            ({"token_size": -3}, "token_size"),
            ({"window": 0}, "window"),
            ({"code_levels": (4, 1)}, r"encoder: .*code_levels \[4, 1\]"),
            ({"code_levels": (4, 4), "latent_size": 5}, r"latent_size 5 is not a multiple of the 2 code_levels"),
        ],
    )
    def test_name_the_setting(
        self,
        change: dict[str, Any],
        named: str,
        tiny_zoo: Zoo,
        tiny_encoder_settings: AutoencoderSettings,
        tmp_path: Path,
    ) -> None:
        with pytest.raises(SettingsError, match=named):
            train_autoencoder(tiny_zoo.path, tmp_path / "encoder", shorter(tiny_encoder_settings, **change))

    def test_a_share_of_behaviour(self) -> None:
        with pytest.raises(SettingsError, match=r"weight: 1\.0 is out of range"):
            BehaviourSettings(weight=1.0)
        with pytest.raises(SettingsError, match="images: 0"):
            BehaviourSettings(images=0)

    def test_a_folder_that_is_no_zoo(self, tiny_encoder_settings: AutoencoderSettings, tmp_path: Path) -> None:
        with pytest.raises(ZooError, match="nowhere"):
            train_autoencoder(tmp_path / "nowhere", tmp_path / "encoder", tiny_encoder_settings)
        assert not (tmp_path / "encoder").exists()


def copied(zoo: Zoo, path: Path, **changes: Any) -> Zoo:
    """The models of a zoo as another zoo, with something of each entry changed."""
    entries: list[ZooEntry] = [replace(entry, **changes) for entry in zoo.entries()]
    writer = ZooWriter(path, settings={"copied": sorted(changes)})
    writer.write_shard("all", entries, [zoo.blob(row) for row in range(len(zoo))])
    writer.finish()
    return load_zoo(path)


class TestBehaviour:
    def test_flat_vectors_run_like_the_modules(self, tiny_zoo: Zoo) -> None:
        for batch in tiny_zoo.batches():
            rows = batch.rows[:3]
            entry = tiny_zoo.entry(int(rows[0]))
            assert entry.config is not None
            config, module = family_config(entry.config), Network(family_config(entry.config))
            assert config is not None
            assert module is not None
            images = torch.rand(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            logits = run_flat(config, batch.architecture, batch.flat[:3], images)
            module.load_state_dict(tiny_zoo.checkpoint(int(rows[0])).tensors())
            torch.testing.assert_close(logits[0], module(images[0]).detach(), atol=1e-5, rtol=1e-4)

    def test_queries_are_training_images_of_each_models_own_dataset(self, tiny_zoo: Zoo) -> None:
        rows = np.array([0, 20, 40, 0])
        drawn = QueryImages(tiny_zoo).draw(rows, 6, torch.Generator().manual_seed(0))
        for row, images in zip(rows, drawn, strict=True):
            own = load_images(tiny_zoo.index["dataset"][row]).train_images
            assert all((own == image).flatten(1).all(1).any() for image in images)
        assert not torch.equal(drawn[0], drawn[3])

    def test_images_of_each_shape_go_to_the_models_that_take_them(self, tmp_path: Path) -> None:
        for number in range(20):
            path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (10, 10), 10 * number).save(path)
        small, large = "digits?classes=0-1", str(tmp_path / "images")
        configs = [MLPConfig((1, size, size), 2, (3,)) for size in (8, 10, 10, 8)]
        index = pd.DataFrame({"dataset": [small, large, small, "digits?classes=99"]})
        zoo = Zoo.__new__(Zoo)
        vars(zoo).update(families=configs, index=index, location="zoo")
        queries = QueryImages(zoo)
        assert queries.functions(np.arange(4)) == {configs[0]: [0], configs[1]: [1]}
        for row, name in ((0, small), (1, large)):
            drawn = queries.draw(np.array([row]), 5, torch.Generator().manual_seed(0))[0]
            own = load_images(name).train_images
            assert all((own == image).flatten(1).all(1).any() for image in drawn)
        vars(zoo).update(families=configs[3:], index=index[3:])
        with pytest.raises(ZooError, match=r"zoo: no dataset can be opened \(.*classes=99"):
            QueryImages(zoo)

    def test_functions_are_grouped_by_what_runs_them(self, tiny_zoo: Zoo) -> None:
        rows = np.arange(48)[::-1]
        groups = QueryImages(tiny_zoo).functions(rows)
        assert sorted(place for places in groups.values() for place in places) == list(range(48))
        assert len(groups) == 4
        for config, places in groups.items():
            assert {family_config(tiny_zoo.entry(int(rows[place])).config or {}) for place in places} == {config}

    @pytest.mark.parametrize("changes", [{"config": None}, {"dataset": None}, {"config": {"family": "rnn"}}])
    def test_models_that_cannot_be_run_are_trained_by_structure_alone(
        self, changes: dict[str, Any], tiny_zoo: Zoo, tiny_encoder_settings: AutoencoderSettings, tmp_path: Path
    ) -> None:
        zoo = copied(tiny_zoo, tmp_path / "zoo", **changes)
        train_autoencoder(zoo.path, tmp_path / "encoder", shorter(tiny_encoder_settings, steps=2))
        (row,) = read_history(tmp_path / "encoder")
        assert "behaviour" not in row
        assert row["loss"] == pytest.approx(0.95 * row["reconstruction"] + 0.05 * row["contrastive"], rel=1e-4)


@pytest.mark.parametrize("tokenizer", ["channel", "dense"])
def test_windows_and_tokens_smaller_than_a_model_train_too(
    tokenizer: str, tiny_zoo: Zoo, tiny_encoder_settings: AutoencoderSettings, tmp_path: Path
) -> None:
    settings = shorter(tiny_encoder_settings, steps=2, tokenizer=tokenizer, token_size=7, window=5, latent_size=2)
    encoder = load_encoder(train_autoencoder(tiny_zoo.path, tmp_path / "encoder", settings))
    assert (encoder.model.config.token_size, encoder.model.config.latent_size) == (7, 2)
    assert isinstance(settings.encoder, EncoderSettings)
    for batch in tiny_zoo.batches():
        assert encoder.reconstruct(batch.flat, batch.architecture).shape == batch.flat.shape


class TestCodes:
    def test_are_trained_and_how_they_are_used_is_recorded(
        self, tiny_zoo: Zoo, tiny_encoder_settings: AutoencoderSettings, tmp_path: Path
    ) -> None:
        settings = shorter(tiny_encoder_settings, compression=2.0, code_levels=(4, 3, 2))
        plain = load_encoder(
            train_autoencoder(tiny_zoo.path, tmp_path / "plain", shorter(tiny_encoder_settings, compression=2.0))
        )
        encoder = load_encoder(train_autoencoder(tiny_zoo.path, tmp_path / "coded", settings))
        model = encoder.autoencoder
        assert 0 <= model.config.latent_size - plain.model.config.latent_size < 3
        assert model.codes_per_token * 3 == model.config.latent_size
        assert '"codebook_size": 24' in (tmp_path / "coded" / "README.md").read_text()
        last = read_history(tmp_path / "coded")[-1]
        assert 1 / 24 <= last["validation_code_use"] <= 1
        assert 1 <= last["validation_code_perplexity"] <= 24 * last["validation_code_use"]
        assert "validation_code_use" not in read_history(tmp_path / "plain")[-1]
        for batch in tiny_zoo.batches():
            inputs = encoder.extractor.batch(batch.flat, batch.architecture)
            codes = model.to_codes(model.encode(**inputs))
            tokens = model.decode(model.from_codes(codes), inputs["weight_mask"], inputs["position_ids"])
            restored = encoder.extractor.restore(tokens, batch.architecture)
            torch.testing.assert_close(restored, encoder.reconstruct(batch.flat, batch.architecture))

    def test_use_counts_each_place_of_a_token_by_itself(self) -> None:
        codes = torch.tensor([[0, 3], [1, 3], [2, 3], [3, 3]])
        assert autoencoder.code_use(codes, 8) == pytest.approx({"code_use": (4 + 1) / 16, "code_perplexity": 2.5})
