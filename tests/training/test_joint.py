from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from loopback_hub import LoopbackHub
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel

from weightspace.cli.main import main
from weightspace.data.image_encoders import ImageEncoder, open_image_encoder
from weightspace.data.images import load_images
from weightspace.encoder import embed_dataset, load_encoder
from weightspace.errors import SettingsError, ZooError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.networks.families import run_flat
from weightspace.search.finding import open_index
from weightspace.search.queries import joint_query, parse_results
from weightspace.training import joint, run
from weightspace.training.autoencoder import EncoderSettings
from weightspace.training.classes import reordered_outputs
from weightspace.training.joint import JointSettings, TowerSettings, train_joint
from weightspace.training.joint_data import JointBatches, stated_results
from weightspace.training.loop import read_history
from weightspace.training.run import read_training
from weightspace.training.settings import LoopSettings
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.splits import split_by_run
from weightspace.zoo.writer import ZooWriter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(tiny_clip: Path) -> JointSettings:
    return JointSettings(
        towers=TowerSettings(
            encoder=EncoderSettings(hidden_size=16, layers=1, heads=2, window=16),
            hidden_size=16,
            pooling_heads=2,
            projection_dim=16,
            bins=4,
            reconstruction_weight=0.1,
        ),
        image_encoder=str(tiny_clip),
        sample=20,
        images=10,
        shuffle_classes=0.5,
        loop=LoopSettings(
            steps=4,
            batch_size=8,
            mixed_precision="no",
            tracker="none",
            checkpoint_every=2,
            log_every=2,
            validate_every=2,
        ),
    )


def changed(settings: JointSettings, loop: dict[str, Any] | None = None, **towers: Any) -> JointSettings:
    return replace(settings, towers=replace(settings.towers, **towers), loop=replace(settings.loop, **(loop or {})))


def copied(zoo: Zoo, path: Path, change: Any) -> Zoo:
    """The models of a zoo as another zoo, whose entries are what ``change`` makes of them."""
    entries = [change(number, entry) for number, entry in enumerate(zoo.entries())]
    writer = ZooWriter(path, settings={"copied": path.name})
    writer.write_shard("all", entries, [zoo.blob(row) for row in range(len(zoo))])
    writer.finish()
    return load_zoo(path)


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = AutoModel.from_pretrained(folder).state_dict()
    return state


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def batches(zoo: Zoo, settings: JointSettings) -> tuple[JointModel, JointBatches]:
    encoder = open_image_encoder(settings.image_encoder)
    data = joint._joint_data(zoo, split_by_run(zoo.index["run_id"].to_numpy(), settings.split_seed), settings, encoder)
    extractor, model = joint._built(zoo, data, settings, encoder, None)
    return model, joint._batches(zoo, data, extractor, settings)


class TestTraining:
    def test_leaves_a_model_and_how_it_came_about(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        output = train_joint(tiny_zoo.path, tmp_path / "joint", settings)
        names = {"config.json", "history.jsonl", "model.safetensors", "preprocessor_config.json", "training.json"}
        assert names <= {path.name for path in output.iterdir()}
        assert not (output / "checkpoints").exists()
        state = read_training(output)
        assert state is not None
        assert state.complete
        assert state.settings == json.loads(json.dumps(asdict(settings)))
        assert not set(state.test_runs) & set(state.validation_runs)
        assert state.extras["datasets_left_out"] == {}
        model, extractor = AutoModel.from_pretrained(output), AutoFeatureExtractor.from_pretrained(output)
        assert isinstance(model, JointModel)
        assert state.parameters == model.num_parameters()
        assert "weight_links" in extractor.model_input_names
        assert model.config.dataset_config.image_encoder == settings.image_encoder
        assert model.config.dataset_config.image_encoder_digest == open_image_encoder(settings.image_encoder).digest

    def test_records_every_pair(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        output = train_joint(tiny_zoo.path, tmp_path / "joint", settings)
        row = read_history(output)[-1]
        pairs = ("dataset_weight", "weight_result", "dataset_result")
        assert row["loss"] == pytest.approx(sum(row[pair] for pair in pairs) + 0.1 * row["reconstruction"], rel=1e-4)
        assert row["validation_loss"] == pytest.approx(sum(row[f"validation_{pair}"] for pair in pairs), rel=1e-4)
        for name in ("dataset_to_weight", "weight_to_dataset"):
            assert 0 <= row[f"validation_{name}"] <= 1
        assert -1 <= row["validation_result_to_weight"] <= 1

    def test_finds_the_datasets_of_models_that_it_has_seen(
        self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path
    ) -> None:
        longer = changed(settings, {"steps": 60, "batch_size": 16, "checkpoint_every": 0, "validate_every": 0})
        history = read_history(train_joint(tiny_zoo.path, tmp_path / "joint", replace(longer, shuffle_classes=0.0)))
        for pair in ("dataset_weight", "weight_result"):
            assert history[-1][pair] < history[0][pair] - 0.2, pair

    def test_a_killed_training_ends_as_the_uninterrupted_one(
        self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train_joint(tiny_zoo.path, tmp_path / "whole", settings)
        losses, calls = joint.JointObjective.losses, []

        def dying(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return losses(*arguments)

        monkeypatch.setattr(joint.JointObjective, "losses", dying)
        with pytest.raises(KeyboardInterrupt):
            train_joint(tiny_zoo.path, tmp_path / "killed", settings)
        train_joint(tiny_zoo.path, tmp_path / "killed", settings)
        assert len(calls) == 6  # two steps from the checkpoint on
        assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
        assert read_history(tmp_path / "killed") == read_history(tmp_path / "whole")

    @pytest.mark.slow
    def test_bf16_leaves_weights_of_full_precision(
        self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path
    ) -> None:
        # In a process of its own: Accelerate hands over outputs in a way that type checks of tests do not know.
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(settings)))))
        code = "import sys; from weightspace.cli.main import main; sys.exit(main(sys.argv[1:]))"
        words = [f"--zoo={tiny_zoo.path}", f"--output={tmp_path / 'joint'}", f"--config={tmp_path / 'settings.yaml'}"]
        command = [sys.executable, "-c", code, "train", "joint", *words, "--mixed-precision=bf16"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
        assert done.stdout == f"joint model: {tmp_path / 'joint'}\n", done.stderr
        assert {value.dtype for value in weights(tmp_path / "joint").values()} == {torch.float32}
        assert np.isfinite([row["loss"] for row in read_history(tmp_path / "joint")]).all()

    def test_a_complete_model_is_left_as_it_is_and_others_are_refused(
        self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = train_joint(tiny_zoo.path, tmp_path / "joint", settings)
        monkeypatch.setattr(run, "fit", None)
        assert train_joint(tiny_zoo.path, output, settings) == output
        with pytest.raises(ZooError, match=r"holds a model of another zoo, encoder or other settings.*--output"):
            train_joint(tiny_zoo.path, output, changed(settings, bins=5))


class TestStart:
    def test_goes_on_from_a_trained_encoder(
        self, tiny_zoo: Zoo, tiny_encoder: Path, settings: JointSettings, tmp_path: Path
    ) -> None:
        frozen = changed(settings, freeze_encoder=True)
        output = train_joint(tiny_zoo.path, tmp_path / "joint", frozen, tiny_encoder)
        given, own = weights(tiny_encoder), weights(output)
        for name, value in own.items():
            if name.startswith("weight_model.encoder."):
                assert torch.equal(given[name.removeprefix("weight_model.encoder.")], value), name
        moved = weights(train_joint(tiny_zoo.path, tmp_path / "moved", settings, tiny_encoder))
        name = "encoder.to_latent" if "encoder.to_latent.weight" in given else "to_latent"
        assert not torch.equal(moved["weight_model.encoder.to_latent.weight"], given[f"{name}.weight"])
        extractors = [AutoFeatureExtractor.from_pretrained(folder) for folder in (tiny_encoder, output)]
        assert extractors[0].mean == extractors[1].mean

    def test_an_encoder_that_saw_the_test_runs_is_refused(
        self, tiny_zoo: Zoo, tiny_encoder: Path, settings: JointSettings, tmp_path: Path
    ) -> None:
        with pytest.raises(SettingsError, match=r"split_seed: 3 tests on runs that the encoder .* was trained on"):
            train_joint(tiny_zoo.path, tmp_path / "joint", replace(settings, split_seed=3), tiny_encoder)

    def test_a_folder_that_is_no_encoder(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"no trained model.*weightspace train autoencoder"):
            train_joint(tiny_zoo.path, tmp_path / "joint", settings, tmp_path)


class TestBatches:
    def test_a_batch_follows_from_its_number(self, tiny_zoo: Zoo, settings: JointSettings) -> None:
        _, source = batches(tiny_zoo, settings)
        stream = source(0, 0, 1)
        third = [next(stream) for _ in range(3)][2]
        again = next(source(2, 0, 1))
        assert third.number == again.number == 2
        assert third.inputs.keys() == again.inputs.keys()
        assert all(torch.equal(value, again.inputs[name]) for name, value in third.inputs.items())

    def test_models_of_a_dataset_share_its_images_on_all_processes(
        self, tiny_zoo: Zoo, settings: JointSettings
    ) -> None:
        _, source = batches(tiny_zoo, settings)
        parts = [next(source(0, process, 2)).inputs for process in (0, 1)]
        found = [dict(zip(part["dataset_ids"].tolist(), part["dataset_features"], strict=True)) for part in parts]
        shared = found[0].keys() & found[1].keys()
        assert shared
        assert all(torch.equal(found[0][number], found[1][number]) for number in shared)

    def test_statements_are_subsets_of_what_is_known(self) -> None:
        results = torch.rand(300, 3, generator=torch.Generator().manual_seed(0))
        results[:100, 1] = float("nan")
        results[-1] = float("nan")
        stated = stated_results(results, torch.Generator().manual_seed(1))
        assert not (stated & results.isnan()).any()
        assert stated[:-1].any(1).all()
        assert not stated[-1].any()
        sizes = stated[100:-1].sum(1).bincount(minlength=4)
        assert sizes[1:].min() > 40

    def test_renumbered_classes_are_those_of_images_and_models_alike(
        self, tiny_zoo: Zoo, settings: JointSettings
    ) -> None:
        rows = np.array([0, 1])
        batch = next(tiny_zoo.batches(rows))
        config = tiny_zoo.families[0]
        assert config is not None
        images = load_images(tiny_zoo.index["dataset"][0]).test_images[:6].expand(len(batch.flat), -1, -1, -1, -1)
        order = torch.tensor([3, 1, 4, 0, 2]).repeat(len(batch.flat), 1)
        moved = reordered_outputs(batch.flat, batch.architecture, order)
        before, after = (run_flat(config, batch.architecture, flat, images) for flat in (batch.flat, moved))
        torch.testing.assert_close(after, before[..., order[0]])
        _, source = batches(tiny_zoo, replace(settings, shuffle_classes=1.0))
        number = int(source.data.numbers[0])
        drawn = source.orders.order(7, number)
        assert sorted(drawn.tolist()) == list(range(5))
        assert torch.equal(
            source.orders.renumbered(batch.flat, batch.architecture, batch.rows, 7),
            reordered_outputs(batch.flat, batch.architecture, drawn.repeat(len(batch.flat), 1)),
        )

    def test_every_parameter_that_is_trained_gets_a_gradient(self, tiny_zoo: Zoo, settings: JointSettings) -> None:
        # Processes that share gradients would wait for the others forever.
        for change in (
            {},
            {"reconstruction_weight": 0.0},
            {"pairs": ("weight_result",)},
            {"pairs": ("dataset_weight",)},
        ):
            model, source = batches(tiny_zoo, changed(settings, **change))
            model.train()(**next(source(0, 0, 1)).inputs, return_loss=True).loss.backward()
            silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            idle = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
            assert silent == idle == []


class TestLittle:
    """Zoos that say little train, or stop with a clear word."""

    def trained(self, zoo: Zoo, settings: JointSettings, output: Path) -> dict[str, float]:
        row = read_history(train_joint(zoo.path, output, settings))[-1]
        assert np.isfinite(list(row.values())).all()
        assert all(value.isfinite().all() for value in weights(output).values())
        return row

    def test_one_dataset(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        zoo = copied(tiny_zoo, tmp_path / "zoo", lambda _, entry: replace(entry, dataset="digits?classes=0-1-2-3-4"))
        self.trained(zoo, settings, tmp_path / "joint")

    def test_results_that_are_missing_or_all_the_same(
        self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path
    ) -> None:
        def change(number: int, entry: Any) -> Any:
            return replace(entry, results={"test_accuracy": 0.5} if number % 3 else {})

        row = self.trained(copied(tiny_zoo, tmp_path / "zoo", change), settings, tmp_path / "joint")
        assert "validation_result_to_weight" not in row
        encoder = load_encoder(tmp_path / "joint")
        assert encoder.model.config.result_config.results == ["test_accuracy"]
        assert np.isfinite(joint_query(encoder, wanted=parse_results(">=0.4"))).all()

    @pytest.mark.parametrize("pair", ["weight_result", "dataset_weight"])
    def test_results_of_training_models_alone(
        self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path, pair: str
    ) -> None:
        trained_on = split_by_run(tiny_zoo.index["run_id"].to_numpy(), settings.split_seed).train

        def change(number: int, entry: Any) -> Any:
            return entry if number in trained_on else replace(entry, results={})

        zoo = copied(tiny_zoo, tmp_path / "zoo", change)
        row = self.trained(zoo, changed(settings, pairs=(pair,)), tmp_path / "joint")
        assert "validation_result_to_weight" not in row
        assert (row[f"validation_{pair}"] == 0) is (pair == "weight_result")

    def test_no_results(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        unknown = replace(settings, results=("flair",))
        with pytest.raises(SettingsError, match=r"results: .* no numbers in flair; choose from .*\[dataset_weight\]"):
            train_joint(tiny_zoo.path, tmp_path / "joint", unknown)
        zoo = copied(tiny_zoo, tmp_path / "zoo", lambda _, entry: replace(entry, results={}))
        with pytest.raises(SettingsError, match=r"no numbers in test_accuracy, test_loss, .*, or train with towers"):
            train_joint(zoo.path, tmp_path / "joint", settings)
        self.trained(zoo, changed(settings, pairs=("dataset_weight",)), tmp_path / "joint")

    def test_a_result_that_nobody_has_is_left_out_and_said(
        self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path
    ) -> None:
        self.trained(tiny_zoo, replace(settings, results=("flair", "test_accuracy")), tmp_path / "joint")
        state = read_training(tmp_path / "joint")
        assert state is not None
        assert state.extras["results_left_out"] == ["flair"]
        with pytest.raises(SettingsError, match=r"'flair': the joint model knows test_accuracy; choose"):
            joint_query(load_encoder(tmp_path / "joint"), wanted=parse_results("flair>0"))

    def test_more_bins_than_models(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        self.trained(tiny_zoo, changed(settings, bins=100), tmp_path / "joint")

    def test_one_bin_is_no_scale(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"towers: .*bins 1 must be at least 2"):
            train_joint(tiny_zoo.path, tmp_path / "joint", changed(settings, bins=1))

    def test_a_single_run(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        zoo = copied(tiny_zoo, tmp_path / "zoo", lambda _, entry: replace(entry, run_id="one"))
        with pytest.raises(ZooError, match=r"runs: 1 are too few to split; add models of at least 10 runs"):
            train_joint(zoo.path, tmp_path / "joint", settings)

    def test_models_that_are_all_one(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        entries = list(tiny_zoo.entries())
        same = [replace(entries[0], model_id=entry.model_id, run_id=entry.run_id) for entry in entries]
        writer = ZooWriter(tmp_path / "zoo", settings={})
        writer.write_shard("all", same, [tiny_zoo.blob(0)] * len(same))
        writer.finish()
        self.trained(load_zoo(tmp_path / "zoo"), settings, tmp_path / "joint")
        vectors = open_index(tmp_path / "zoo", tmp_path / "joint")[0].vectors
        np.testing.assert_allclose(vectors, np.broadcast_to(vectors[0], vectors.shape), atol=1e-6)

    def test_datasets_that_cannot_be_opened(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        def change(number: int, entry: Any) -> Any:
            return replace(entry, dataset=(entry.dataset, None, "./gone")[number % 3])

        zoo = copied(tiny_zoo, tmp_path / "zoo", change)
        self.trained(zoo, settings, tmp_path / "joint")
        state = read_training(tmp_path / "joint")
        assert state is not None
        assert list(state.extras["datasets_left_out"]) == ["./gone"]

    def test_no_dataset_that_can_be_opened(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        zoo = copied(tiny_zoo, tmp_path / "zoo", lambda _, entry: replace(entry, dataset="./gone"))
        with pytest.raises(ZooError, match=r"no dataset can be opened \(.*gone.*pairs: \[weight_result\]"):
            train_joint(zoo.path, tmp_path / "joint", settings)
        self.trained(zoo, changed(settings, pairs=("weight_result",)), tmp_path / "joint")

    def test_batches_smaller_than_the_number_of_datasets(
        self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path
    ) -> None:
        self.trained(tiny_zoo, changed(settings, {"batch_size": 2}), tmp_path / "joint")


class TestHeldOut:
    def test_models_of_held_out_datasets_are_not_trained_on(self, tiny_zoo: Zoo, settings: JointSettings) -> None:
        name = tiny_zoo.index["dataset"][0]
        _, source = batches(tiny_zoo, replace(settings, held_out_datasets=(name,)))
        rows = np.flatnonzero((tiny_zoo.index["dataset"] == name).to_numpy())
        assert not set(rows) & set(source.views.rows)
        assert not set(rows) & set(source.data.validation)

    def test_an_unknown_one_is_refused(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="held_out_datasets: the zoo has no dataset 'x'"):
            train_joint(tiny_zoo.path, tmp_path / "joint", replace(settings, held_out_datasets=("x",)))

    def test_all_of_them_leave_nothing_to_train_on(
        self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path
    ) -> None:
        names = tuple(sorted(set(tiny_zoo.index["dataset"])))
        with pytest.raises(SettingsError, match="held_out_datasets: no model is left to train on; hold out fewer"):
            train_joint(tiny_zoo.path, tmp_path / "joint", replace(settings, held_out_datasets=names))


class TestSaved:
    @pytest.mark.slow
    def test_loading_a_trained_model_warns_of_nothing(self, tiny_clip_joint: Path) -> None:
        # In a process of its own: what transformers says on the way to the terminal.
        code = "import sys, weightspace, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(tiny_clip_joint)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if line and "Loading weights" not in line]
        _, report = AutoModel.from_pretrained(tiny_clip_joint, output_loading_info=True)
        assert not any(report.values())

    def test_what_is_saved_is_what_the_model_has(self, tiny_clip_joint: Path) -> None:
        stored = open_checkpoint(tiny_clip_joint / "model.safetensors").specs
        assert stored.keys() == weights(tiny_clip_joint).keys()

    def test_a_folder_of_before_the_sample_was_recorded_loads(self, tiny_clip_joint: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_clip_joint, tmp_path / "old")
        config = json.loads((tmp_path / "old" / "config.json").read_text())
        assert config["dataset_config"].pop("sample") == 20
        (tmp_path / "old" / "config.json").write_text(json.dumps(config))
        assert load_encoder(tmp_path / "old").model.config.dataset_config.sample == 64


class TestPickledImageEncoder:
    """An image encoder without safetensors needs consent, and even then only plain tensors are read."""

    @pytest.fixture
    def files(self, tiny_clip: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tiny_clip.iterdir() if path.suffix != ".safetensors"}

    def train(self, *words: str) -> int:
        return main(["train", "joint", *words])

    @pytest.mark.slow
    def test_consent_is_needed_and_enough(
        self,
        hub: LoopbackHub,
        files: dict[str, bytes],
        tiny_clip: Path,
        tiny_zoo: Zoo,
        settings: JointSettings,
        tiny_encoder: Path,
        tiny_prior_settings: Any,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        torch.save(open_checkpoint(tiny_clip).tensors(), tmp_path / "weights.bin")
        hub.create("org/clip", {**files, "pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()})
        chosen = replace(settings, image_encoder="org/clip")
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(chosen)))))
        words = [f"--zoo={tiny_zoo.path}", f"--output={tmp_path / 'joint'}", f"--config={tmp_path / 'settings.yaml'}"]
        assert self.train(*words) == 2
        assert "its weights are a pickle" in capsys.readouterr().err
        assert self.train(*words, "--allow-pickle") == 0
        search = ["search", str(tiny_zoo.path), "--joint", str(tmp_path / "joint"), "--dataset", "digits", "-k", "1"]
        assert main(search) == 2
        assert "--allow-pickle" in capsys.readouterr().err
        assert main([*search, "--allow-pickle"]) == 0
        (tmp_path / "prior.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(tiny_prior_settings)))))
        prior = ["train", "prior", *words[:1], f"--autoencoder={tiny_encoder}", f"--joint={tmp_path / 'joint'}"]
        prior += [f"--output={tmp_path / 'prior'}", f"--config={tmp_path / 'prior.yaml'}"]
        assert main(prior) == 2
        assert "--allow-pickle" in capsys.readouterr().err
        assert main([*prior, "--allow-pickle"]) == 0
        proof = ["evaluate-samples", str(tiny_zoo.path), "--model", str(tmp_path / "joint"), "--sampler", "flow"]
        proof += ["--prior", str(tmp_path / "prior"), f"--output={tmp_path / 'proof.json'}"]
        proof += ["--datasets=1", "-n1", "--epochs=0"]
        assert main(proof) == 2
        assert "--allow-pickle" in capsys.readouterr().err
        assert main([*proof, "--allow-pickle"]) == 0

    def test_code_in_it_is_never_run(
        self, hub: LoopbackHub, files: dict[str, bytes], tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path
    ) -> None:
        class Trap:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "trapped"),)

        torch.save({"weight": Trap()}, tmp_path / "weights.bin")
        hub.create("org/clip", {**files, "pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()})
        with pytest.raises(SettingsError, match="org/clip"):
            train_joint(
                tiny_zoo.path, tmp_path / "joint", replace(settings, image_encoder="org/clip"), allow_pickle=True
            )
        assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sample": 0}, "sample: 0"),
        ({"images": 0}, "images: 0"),
        ({"shuffle_classes": 2.0}, "2.0"),
        ({"results": ()}, "results: .* is empty, give at least one value"),
        ({"loop": LoopSettings(batch_size=1)}, "batch_size: 1 leaves a model no other to be told from, give 2 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        JointSettings(**change)


def test_features_of_another_image_encoder_are_refused(tiny_zoo: Zoo, settings: JointSettings) -> None:
    class Other(ImageEncoder):
        name, digest = "other", "0" * 64

        def _encode(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :12]

    model, source = batches(tiny_zoo, settings)
    own = source.data.datasets[0]
    assert embed_dataset(model, own).shape == (1, 16)
    with pytest.raises(SettingsError, match=r"image encoder other .*was trained with"):
        embed_dataset(model, replace(own, encoder=Other.name, encoder_digest=Other.digest))


@pytest.mark.slow
class TestProcesses:
    LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")

    def launch(self, *words: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *self.LAUNCH, "--main_process_port=0", *words],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr

    def test_two_have_the_loss_and_gradients_of_one_with_the_whole_batch(
        self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path
    ) -> None:
        model, source = batches(tiny_zoo, changed(settings, dropout=0.0, reconstruction_weight=0.0))
        inputs = next(source(0, 0, 1)).inputs
        model.save_pretrained(tmp_path / "model")
        torch.save(inputs, tmp_path / "inputs.pt")
        script = tmp_path / "script.py"
        script.write_text(
            """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from transformers import AutoModel
import weightspace
folder = Path(sys.argv[1])
accelerator = Accelerator()
model = AutoModel.from_pretrained(folder / "model").train()
encoder = model.weight_model.encoder
for module in encoder.decoding_modules:
    module.requires_grad_(False)
inputs = torch.load(folder / "inputs.pt")
shared = {name for name in inputs if name in ("dataset_features", "dataset_labels", "dataset_ids")}
half = {n: v if n in shared else v.chunk(2)[accelerator.process_index] for n, v in inputs.items()}
prepared = accelerator.prepare(model)
loss = prepared(**half, return_loss=True).loss
accelerator.backward(loss)
gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
torch.save({"loss": loss.detach(), **gradients}, folder / f"found-{accelerator.process_index}.pt")
accelerator.wait_for_everyone()
accelerator.end_training()
"""
        )
        self.launch(str(script), str(tmp_path))
        loss = model.train()(**inputs, return_loss=True).loss
        loss.backward()
        expected = {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
        for process in range(2):
            found = torch.load(tmp_path / f"found-{process}.pt")
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)

    def test_two_leave_one_whole_model(self, tiny_zoo: Zoo, settings: JointSettings, tmp_path: Path) -> None:
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(settings)))))
        words = [f"--zoo={tiny_zoo.path}", f"--output={tmp_path / 'joint'}", f"--config={tmp_path / 'settings.yaml'}"]
        self.launch("hub_scripts/train_joint.py", *words)
        state = read_training(tmp_path / "joint")
        assert state is not None
        assert state.complete
        assert [row["step"] for row in read_history(tmp_path / "joint")] == [2, 4]
