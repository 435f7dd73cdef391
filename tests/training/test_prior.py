from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel

from weightspace.encoder import load_encoder
from weightspace.errors import SettingsError, WeightspaceError, ZooError
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.codec import LatentCodec
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.networks.permutation import permute, random_permutations
from weightspace.search.queries import dataset_classes, dataset_for
from weightspace.training import prior
from weightspace.training.behaviour import BehaviourSettings
from weightspace.training.classes import reordered_outputs
from weightspace.training.loop import read_history
from weightspace.training.prior import PriorSettings, PriorShape, train_prior
from weightspace.training.prior_data import AlignedModels, Conditions
from weightspace.training.run import read_training
from weightspace.training.settings import LoopSettings
from weightspace.zoo.dataset import Zoo


@pytest.fixture(scope="module")
def settings() -> PriorSettings:
    return PriorSettings(
        shape=PriorShape(hidden_size=16, layers=1, heads=2),
        behaviour=BehaviourSettings(weight=0.5, images=4),
        loop=LoopSettings(
            steps=6,
            batch_size=8,
            mixed_precision="no",
            tracker="none",
            checkpoint_every=2,
            log_every=2,
            validate_every=3,
        ),
    )


@pytest.fixture
def folders(tiny_encoder: Path, tiny_clip_joint: Path) -> dict[str, Path]:
    return {"autoencoder": tiny_encoder, "joint": tiny_clip_joint}


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = AutoModel.from_pretrained(folder).state_dict()
    return state


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def opened(folders: dict[str, Path], zoo: Zoo) -> tuple[WeightAutoencoderModel, Any, Any]:
    joint = JointModel.from_pretrained(folders["joint"]).eval()
    conditions = Conditions.of(zoo, joint)
    model = WeightAutoencoderModel.from_pretrained(folders["autoencoder"]).eval()
    return model, AutoFeatureExtractor.from_pretrained(folders["autoencoder"]), conditions


def test_a_dataset_that_cannot_be_opened_does_not_stop_the_others(tiny_zoo: Zoo, folders: dict[str, Path]) -> None:
    joint = JointModel.from_pretrained(folders["joint"]).eval()
    names = tiny_zoo.index["dataset"].to_list()
    index = tiny_zoo.index.assign(dataset=["digits?classes=99", *names[1:]])
    zoo = Zoo.__new__(Zoo)
    vars(zoo).update(index=index, families=tiny_zoo.families, location="zoo")
    known = Conditions.of(tiny_zoo, joint)
    some = Conditions.of(zoo, joint)
    assert list(some.left_out) == ["digits?classes=99"] and not known.left_out
    assert some.dataset[0] == 0 and torch.equal(some.dataset[1:], known.dataset[1:])
    vars(zoo).update(index=index.assign(dataset="digits?classes=99"))
    with pytest.raises(ZooError, match=r"zoo: no dataset can be opened \(.*classes=99"):
        Conditions.of(zoo, joint)


@pytest.mark.slow
def test_training_is_recorded_and_repeats_to_the_bit(
    tiny_zoo: Zoo, folders: dict[str, Path], settings: PriorSettings, tmp_path: Path
) -> None:
    first = train_prior(tiny_zoo.path, tmp_path / "a", settings, **folders)
    second = train_prior(tiny_zoo.path, tmp_path / "b", settings, **folders)
    assert equal(weights(first), weights(second))
    state = read_training(first)
    assert state is not None and state.complete and not (first / "checkpoints").exists()
    joint = read_training(folders["joint"])
    assert joint is not None and state.test_runs == joint.test_runs
    model = AutoModel.from_pretrained(first)
    assert model.config.joint_identity == joint.identity
    assert model.config.activations == ["relu", "tanh"]
    assert {"validation_loss", "validation_flow", "validation_behaviour"} <= set(read_history(first)[-1])
    own = WeightAutoencoderModel.from_pretrained(folders["autoencoder"]).state_dict()
    assert equal(model.autoencoder.state_dict(), own)
    before = (first / "model.safetensors").stat().st_mtime_ns
    train_prior(tiny_zoo.path, first, settings, **folders)
    assert (first / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    tiny_zoo: Zoo, folders: dict[str, Path], settings: PriorSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_prior(tiny_zoo.path, tmp_path / "whole", settings, **folders)
    losses = prior.PriorObjective.losses

    def interrupted(self: Any, model: Any, batch: Any) -> Any:
        if batch.number == 5:
            raise KeyboardInterrupt
        return losses(self, model, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prior.PriorObjective, "losses", interrupted)
        train_prior(tiny_zoo.path, tmp_path / "cut", settings, **folders)
    state = json.loads((tmp_path / "cut" / "training.json").read_text())
    assert not state["complete"]
    cut = train_prior(tiny_zoo.path, tmp_path / "cut", settings, **folders)
    assert equal(weights(cut), weights(whole))
    assert read_history(cut) == read_history(whole)


@pytest.mark.slow
def test_the_loss_falls(tiny_zoo: Zoo, folders: dict[str, Path], settings: PriorSettings, tmp_path: Path) -> None:
    loop = replace(settings.loop, steps=200, batch_size=32, checkpoint_every=0, validate_every=10, log_every=10)
    history = read_history(train_prior(tiny_zoo.path, tmp_path / "p", replace(settings, loop=loop), **folders))
    assert history[-1]["validation_flow"] < 0.9 * history[0]["validation_flow"]


def test_the_order_of_neurons_that_models_come_in_does_not_matter(
    tiny_zoo: Zoo, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, extractor, _ = opened(folders, tiny_zoo)
    rows = np.arange(len(tiny_zoo))
    plain = AlignedModels.of(tiny_zoo, rows, LatentCodec(model, extractor))
    flat = Zoo.flat
    generator = torch.Generator().manual_seed(0)

    def shuffled(self: Zoo, chosen: Any) -> Tensor:
        values = flat(self, chosen)
        architecture = tiny_zoo.architectures[str(self.index["header"].iloc[int(chosen[0])])]
        permutations = random_permutations(architecture, len(values), generator)
        best = int(self.index["test_accuracy"].to_numpy()[chosen].argmax())
        for group in permutations:  # what all others are brought in line with stays
            group[best] = torch.arange(group.shape[1])
        return permute(values, permutations, architecture)

    monkeypatch.setattr(Zoo, "flat", shuffled)
    again = AlignedModels.of(tiny_zoo, rows, LatentCodec(model, extractor))
    for one, other in zip(plain.parts, again.parts, strict=True):
        assert torch.equal(one.flat, other.flat)


def test_a_batch_holds_each_models_own_latents_and_condition(
    tiny_zoo: Zoo, folders: dict[str, Path], settings: PriorSettings
) -> None:
    model, extractor, conditions = opened(folders, tiny_zoo)
    models = AlignedModels.of(tiny_zoo, np.arange(len(tiny_zoo)), LatentCodec(model, extractor))
    batches = prior.PriorBatches(models, conditions, replace(settings, drop=0.0, shuffle_classes=0.0))
    batch = next(batches(3, 0, 1))
    assert batch.number == 3 and torch.equal(next(batches(3, 0, 1)).inputs["noise"], batch.inputs["noise"])
    for members in batch.parts:
        length = extractor.token_count(members.architecture)
        own = {name: value[members.places] for name, value in batch.inputs.items()}
        inputs = extractor.batch(members.flat, members.architecture)
        names = ("weight_values", "weight_mask", "position_ids", "attention_mask")
        expected = model.encode(**{name: inputs[name] for name in names})
        torch.testing.assert_close(own["latents"][:, :length], expected, rtol=1e-4, atol=1e-5)
        assert own["attention_mask"].sum(1).eq(length).all()
    lengths = batch.inputs["result_embeds"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(8))


def test_conditions_are_kept_from_the_model_each_by_itself(tiny_zoo: Zoo, folders: dict[str, Path]) -> None:
    _, _, conditions = opened(folders, tiny_zoo)
    rows = np.zeros(2000, dtype=np.int64)
    orders = torch.arange(conditions.classes).expand(2000, -1)
    asked = conditions.asked(rows, orders, 0.25, torch.Generator().manual_seed(0))
    gone = {name: ~asked[name].flatten(1).any(1) for name in ("class_features", "result_embeds")}
    assert all(float(share.float().mean()) == pytest.approx(0.25, abs=0.03) for share in gone.values())
    both = gone["class_features"] & gone["result_embeds"]
    assert float(both.float().mean()) == pytest.approx(0.0625, abs=0.02)


def test_classes_are_described_as_the_joint_model_sees_them_by_samples_of_their_images(
    tiny_zoo: Zoo, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, conditions = opened(folders, tiny_zoo)
    rows, orders = np.zeros(1, dtype=np.int64), torch.arange(conditions.classes).expand(1, -1)
    generator = torch.Generator().manual_seed(0)
    joint, name = load_encoder(folders["joint"]), str(tiny_zoo.index["dataset"].iloc[0])
    expected = dataset_classes(joint, dataset_for(joint, name))
    drawn = torch.stack([conditions.asked(rows, orders, 0.0, generator)["class_features"][0] for _ in range(200)])
    assert not torch.equal(drawn[0], drawn[1])
    width = expected.shape[1] // 2
    torch.testing.assert_close(drawn.mean(0)[: len(expected), :width], expected[:, :width], atol=0.02, rtol=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "exponential_", lambda self, **_: self.fill_(1.0))
        alike = conditions.asked(rows, orders, 0.0, generator)["class_features"][0]
    torch.testing.assert_close(alike[: len(expected)], expected)


def test_classes_and_outputs_are_put_in_one_order(tiny_zoo: Zoo, folders: dict[str, Path]) -> None:
    model, extractor, conditions = opened(folders, tiny_zoo)
    models = AlignedModels.of(tiny_zoo, np.arange(len(tiny_zoo)), LatentCodec(model, extractor))
    places, count = np.arange(12), conditions.classes
    plain = torch.arange(count).expand(12, -1)
    orders = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(n)) for n in range(12)])
    for one, other in zip(models.batch(places, plain)[1], models.batch(places, orders)[1], strict=True):
        own = orders[other.places]
        assert torch.equal(reordered_outputs(one.flat, one.architecture, own), other.flat)
        inputs, _ = models.batch(places, orders)
        latents = models.codec.encode(other.flat, other.architecture)
        torch.testing.assert_close(inputs["latents"][other.places, : latents.shape[1]], latents)
    asked, moved = (
        conditions.asked(models.rows[places], order, 0.0, torch.Generator().manual_seed(0))["class_features"]
        for order in (plain, orders)
    )
    expected = torch.stack([own[order] for own, order in zip(asked, orders, strict=True)])
    torch.testing.assert_close(moved, expected)


def test_only_models_with_an_output_for_each_class_are_put_in_another_order(
    tiny_zoo: Zoo, folders: dict[str, Path]
) -> None:
    _, _, conditions = opened(folders, tiny_zoo)
    rows, count = np.zeros(2000, dtype=np.int64), conditions.classes
    known = int(conditions.counts[conditions.dataset[0]])
    outputs = torch.tensor([known] * 1000 + [known + 1] * 500 + [0] * 500)
    orders = conditions.orders(rows, outputs, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(orders.sort(1).values, torch.arange(count).expand(2000, -1))
    moved = (orders != torch.arange(count)).any(1)
    assert not moved[1000:].any() and 350 < int(moved[:1000].sum()) < 550
    assert torch.equal(orders[:, known:], torch.arange(known, count).expand(2000, -1))
    unknown = replace(conditions, dataset=torch.zeros_like(conditions.dataset))
    assert torch.equal(
        unknown.orders(rows, torch.zeros_like(outputs), 1.0, torch.Generator()), torch.arange(count).expand(2000, -1)
    )


def test_what_does_not_fit_together_is_refused(
    tiny_zoo: Zoo, folders: dict[str, Path], settings: PriorSettings, tmp_path: Path
) -> None:
    swapped = {"autoencoder": folders["joint"], "joint": folders["autoencoder"]}
    with pytest.raises(SettingsError, match=r"autoencoder: .* holds another kind of model"):
        train_prior(tiny_zoo.path, tmp_path / "p", settings, **swapped)
    with pytest.raises(SettingsError, match=r"joint: .*nothing holds no trained model; run `weightspace train joint`"):
        train_prior(tiny_zoo.path, tmp_path / "p", settings, **{**folders, "joint": tmp_path / "nothing"})
    with pytest.raises(SettingsError, match=r"split_seed: 1 tests on runs that the autoencoder .* was trained on"):
        train_prior(tiny_zoo.path, tmp_path / "p", replace(settings, split_seed=1), **folders)
    with pytest.raises(SettingsError, match="drop: 1"):
        replace(settings, drop=1.0)
    with pytest.raises(SettingsError, match="shuffle_classes: 2"):
        replace(settings, shuffle_classes=2.0)
    assert not (tmp_path / "p").exists()


@pytest.mark.slow
def test_a_folder_of_other_settings_is_left_alone(
    tiny_zoo: Zoo, folders: dict[str, Path], settings: PriorSettings, tmp_path: Path
) -> None:
    short = replace(settings, loop=replace(settings.loop, steps=1))
    folder = train_prior(tiny_zoo.path, tmp_path / "p", short, **folders)
    with pytest.raises(ZooError, match="holds a prior of another zoo, other models or other settings"):
        train_prior(tiny_zoo.path, folder, settings, **folders)
    with pytest.raises(WeightspaceError, match=r"shape: .*hidden_size 15"):
        shape = PriorShape(hidden_size=15, layers=1, heads=2)
        train_prior(tiny_zoo.path, tmp_path / "q", replace(short, shape=shape), **folders)
