"""Mistakes that were found in public code on learning from weights, by running it; each has a test here."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from weightspace.encoder import load_encoder
from weightspace.errors import SettingsError, ZooError
from weightspace.evaluation.accuracy import compare_functions
from weightspace.io.checkpoint import open_checkpoint_bytes
from weightspace.io.writing import checkpoint_bytes
from weightspace.losses import masked_mse
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel, WeightAutoencoderOutput
from weightspace.networks.flat import unflatten
from weightspace.networks.infer import infer_architecture
from weightspace.sampling.base import Condition
from weightspace.sampling.kde import KdeSampler, KdeSettings
from weightspace.sampling.steps import BootstrappedSampler, Objective, SelectedSampler, SelectionSettings
from weightspace.search.queries import dataset_for, parse_results
from weightspace.settings import settings_from_mapping
from weightspace.tokenizers import TOKENIZERS, get_tokenizer
from weightspace.training import run
from weightspace.training.autoencoder import (
    AutoencoderSettings,
    BehaviourSettings,
    EncoderSettings,
    train_autoencoder,
)
from weightspace.training.batches import Batch, ViewBatches
from weightspace.training.loop import read_history
from weightspace.training.run import read_training
from weightspace.training.settings import LoopSettings
from weightspace.zoo import training as zoo_training
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.training import ZooSettings, train_zoo
from weightspace.zoo.views import Augmentation

EXTRACTOR = WeightFeatureExtractor("channel", 65, std=0.25)
CLEAN = Augmentation(erase=0.0, noise=0.0)


def batch_of(zoo: Zoo, rows: list[int], augmentation: Augmentation = CLEAN, window: int = 16) -> Batch:
    return next(ViewBatches(zoo, np.array(rows), EXTRACTOR, augmentation, len(rows), window, 0)(0, 0, 1))


def model(**changes: Any) -> WeightAutoencoderModel:
    small = {"token_size": 65, "latent_size": 4, "window": 16, "hidden_size": 16, "intermediate_size": 32}
    config = WeightAutoencoderConfig(**{**small, "num_encoder_layers": 1, "num_decoder_layers": 1, **changes})
    torch.manual_seed(0)
    return WeightAutoencoderModel._from_config(config, attn_implementation="eager").eval()


def test_1_both_views_of_a_model_are_permuted_and_not_alike(tiny_zoo: Zoo) -> None:
    batch = batch_of(tiny_zoo, list(range(20)))
    for part in batch.parts:
        half = len(part.rows) // 2
        original = tiny_zoo.flat(part.rows[:half])
        first, second = part.flat[:half], part.flat[half:]
        for one, other in ((first, original), (second, original), (first, second)):
            assert (one != other).any(1).all()


def test_2_tokens_attend_to_the_tokens_of_their_own_model(tiny_zoo: Zoo) -> None:
    inputs = dict(EXTRACTOR.batch(tiny_zoo.flat([0, 1, 2]), next(iter(tiny_zoo.architectures.values()))))
    changed = {**inputs, "weight_values": inputs["weight_values"].clone()}
    changed["weight_values"][1, 3] += 1.0
    with torch.no_grad():
        before, after = (model().encode(**value) for value in (inputs, changed))
    moved = (before != after).any(-1)
    assert not moved[[0, 2]].any()
    assert moved[1].all()


Asked = tuple[KdeSampler, Condition]


@pytest.fixture(scope="module")
def asked(tiny_zoo: Zoo, tiny_encoder: Path, tiny_clip_joint: Path) -> Asked:
    """A kernel density over the zoo, and what samples of it are to be good for."""
    joint, encoder = load_encoder(tiny_clip_joint), load_encoder(tiny_encoder)
    codec = encoder.codec
    sampler = KdeSampler(tiny_zoo, np.arange(len(tiny_zoo)), codec, joint, KdeSettings(anchors=1))
    condition = Condition.from_config(json.loads(tiny_zoo.index["config"][0]))
    dataset = dataset_for(joint, tiny_zoo.index["dataset"][0])
    return sampler, replace(condition, dataset=dataset, results=parse_results("<=0.2"))


def test_3_every_sample_draws_its_own_anchor_and_every_token_its_own_noise(asked: Asked) -> None:
    sampler, condition = asked
    anything = replace(condition, dataset=None, results=())
    latents = sampler.latents(anything, 8, torch.Generator().manual_seed(0))
    anchors = sampler.anchors(condition.architecture).latents
    nearest = torch.cdist(latents.flatten(1), anchors.flatten(1)).argmin(1)
    assert len(nearest.unique()) > 3
    noise = latents - anchors[nearest]
    assert noise.any(-1).all()
    for alike in (noise.flatten(1), noise.transpose(0, 1).flatten(1)):  # between samples, and between tokens
        assert alike.corrcoef().fill_diagonal_(0).abs().max() < 0.8


@pytest.mark.parametrize("kind", [SelectedSampler, BootstrappedSampler])
def test_4_the_best_samples_are_kept_and_not_the_first(
    kind: type[SelectedSampler] | type[BootstrappedSampler], asked: Asked
) -> None:
    density, condition = asked
    objective, codec, images = Objective.of(condition), density.codec, 100

    def worth(latents: Tensor, shown: Tensor) -> list[tuple[float, float]]:
        with torch.no_grad():
            scores = objective.score(codec.decode(latents, objective.architecture), shown.expand(len(latents), -1))
        return [tuple(one) for one in scores.tolist()]

    settings = SelectionSettings(candidates=6, images=images)
    kept = kind(density, settings).latents(condition, 3, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    shown = objective.draw(1, images, generator)
    candidates = worth(density.latents(condition, 18, generator), shown)
    best = sorted(candidates)[:3]
    assert best != sorted(candidates[:3])
    found = worth(kept, shown)
    assert found == sorted(found)
    if kind is SelectedSampler:
        assert found == [pytest.approx(one) for one in best]
    else:
        assert all(ours <= theirs for ours, theirs in zip(found, best, strict=True))
        assert found[-1] < best[-1]


@pytest.mark.parametrize("extra", [1, 5, 40])
def test_5_padding_is_in_no_loss_and_in_no_embedding(extra: int, tiny_zoo: Zoo) -> None:
    inputs = {k: v for k, v in batch_of(tiny_zoo, [0, 1, 30, 31]).inputs.items()}
    wider = {
        k: nn.functional.pad(v, (0, 0) * (v.ndim - 2) + (0, extra)) if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    encoder = model()
    with torch.no_grad():
        for name, value in encoder(**inputs).items():
            if value.ndim == 0:
                torch.testing.assert_close(encoder(**wider)[name], value, rtol=1e-4, atol=1e-5)
        names = WeightFeatureExtractor.model_input_names
        found, expected = (
            encoder.get_weight_features(**{name: value[name] for name in names}).pooler_output
            for value in (wider, inputs)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    prediction = torch.randn(inputs["labels"].shape, generator=torch.Generator().manual_seed(0))
    garbage = torch.where(inputs["weight_mask"], prediction, 1e3)
    losses = [masked_mse(value, inputs["labels"], inputs["weight_mask"]) for value in (prediction, garbage)]
    assert losses[0] == losses[1]


def test_6_statistics_are_those_of_the_training_runs_without_padding(tiny_zoo: Zoo, tiny_encoder: Path) -> None:
    state = read_training(tiny_encoder)
    assert state is not None
    held_out = {*state.test_runs, *state.validation_runs}
    training = np.flatnonzero(~tiny_zoo.index["run_id"].isin(held_out))
    weights = torch.cat([batch.flat.flatten() for batch in tiny_zoo.batches(training)]).double()
    everything = torch.cat([batch.flat.flatten() for batch in tiny_zoo.batches()]).double()
    found = WeightFeatureExtractor.from_pretrained(tiny_encoder)
    assert found.mean == pytest.approx(float(weights.mean()), rel=1e-6)
    assert found.std == pytest.approx(float(weights.std(correction=0)), rel=1e-6)
    assert found.std != pytest.approx(float(everything.std(correction=0)), rel=1e-6)


def test_7_every_sample_has_its_own_window_and_permutation(tiny_zoo: Zoo) -> None:
    alike = batch_of(tiny_zoo, [0] * 8)
    assert len(torch.unique(alike.parts[0].flat, dim=0)) == 16
    starts = batch_of(tiny_zoo, list(range(20)), window=4).inputs["position_ids"][:, 0, 0]
    assert len(starts.unique()) > 4
    assert not torch.equal(starts[:20], starts[20:])


@pytest.mark.parametrize("name", [name for name, cls in TOKENIZERS.items() if cls.exact])
def test_8_no_parameter_is_dropped_for_its_name(name: str) -> None:
    shapes = {
        "cls_token": (1, 1, 8),
        "pos_embed": (1, 5, 8),
        "blocks.0.gamma_1": (8,),
        "blocks.0.attn.q_bias": (8,),
        "blocks.0.attn.in_proj_weight": (24, 8),
        "blocks.0.attn.in_proj_bias": (24,),
        "blocks.0.norm.weight": (8,),
        "blocks.0.norm.bias": (8,),
        "rnn.weight_ih_l0": (12, 8),
        "rnn.bias_ih_l0": (12,),
        "logit_scale": (),
        "relative_position_bias_table": (9, 2),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    architecture = infer_architecture(open_checkpoint_bytes(checkpoint_bytes(tensors), where="here").specs.values())
    assert {tensor.name for tensor in architecture.tensors} == set(shapes)
    tokenizer = get_tokenizer(name, 16)
    tokens = tokenizer.tokenize(tensors, architecture)
    assert int(tokens.mask.sum()) == sum(value.numel() for value in tensors.values())
    restored = tokenizer.detokenize(tokens)
    assert all(torch.equal(restored[key], value) for key, value in tensors.items())


class Test9FunctionIsReported:
    def test_in_training_unless_switched_off(self, tiny_encoder: Path) -> None:
        assert AutoencoderSettings().behaviour.weight > 0
        assert {"behaviour", "validation_behaviour"} <= set(read_history(tiny_encoder)[-1])

    def test_a_close_reconstruction_without_function_is_found_out(self, tiny_zoo: Zoo) -> None:
        batch = next(tiny_zoo.batches())
        decoded = batch.flat.clone()
        unflatten(decoded, batch.architecture)["head.weight"].zero_()
        error = (decoded - batch.flat).square().mean() / batch.flat.var()
        found = compare_functions(tiny_zoo, batch.rows, batch.flat, decoded, batch.architecture)
        assert error < 0.7
        assert found.decoded.mean() < 0.25 < found.original.mean()


# --- 10. keys that nothing reads -------------------------------------------------------------------------------------

# Another value for each key of the settings. A key that is missing here fails a test, and so does one without effect.
ZOO_CHANGES: dict[str, Any] = {
    "dataset": "no/such/folder",
    "class_subsets": [[0, 1, 2, 3, 5]],
    "rotations": [90],
    "polarities": ["inverted"],
    "architectures": [{"family": "mlp", "hidden": [5]}],
    "runs": 4,
    "seed": 1,
    "activations": ["tanh"],
    "learning_rates": [0.02],
    "weight_decays": [0.9],
    "initializations": ["xavier_normal"],
    "label_noise": [0.9],
    "train_sizes": [31],
    "steps": [3],
    "checkpoints": [0.5],
    "batch_size": 5,
    "device": "meta",
}
ENCODER_CHANGES: dict[str, Any] = {
    "split_seed": 1,
    "encoder.tokenizer": "dense",
    "encoder.token_size": 9,
    "encoder.latent_size": 5,
    "encoder.compression": 1.5,
    "encoder.window": 4,
    "encoder.hidden_size": 16,
    "encoder.layers": 2,
    "encoder.heads": 4,
    "encoder.beta": 0.5,
    "encoder.temperature": 0.5,
    "encoder.code_levels": [4, 4],
    "augmentation.permute": False,
    "augmentation.erase": 0.4,
    "augmentation.noise": 0.4,
    "behaviour.weight": 0.1,
    "behaviour.images": 3,
    "loop.steps": 5,
    "loop.batch_size": 7,
    "loop.gradient_accumulation_steps": 2,
    "loop.learning_rate": 0.02,
    "loop.weight_decay": 0.9,
    "loop.warmup": 0.6,
    "loop.schedule": "linear",
    "loop.max_grad_norm": 0.01,
    "loop.mixed_precision": "bf16",
    "loop.seed": 1,
    "loop.checkpoint_every": 2,
    "loop.keep_checkpoints": 2,
    "loop.log_every": 2,
    "loop.validate_every": 1,
    "loop.tracker": "tensorboard",
    "loop.best": "validation_reconstruction",
}


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    for key, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from keys(typing.cast(type, hint), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def changed(settings: Any, key: str, value: Any) -> Any:
    head, _, rest = key.partition(".")
    if rest:
        return replace(settings, **{head: changed(getattr(settings, head), rest, value)})
    return settings_from_mapping(
        type(settings), {**{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}, key: value}
    )


def test_10_every_key_is_changed_below() -> None:
    assert set(keys(ZooSettings)) == set(ZOO_CHANGES)
    assert set(keys(AutoencoderSettings)) == set(ENCODER_CHANGES)


class Test10ZooSettings:
    BASE = ZooSettings(
        class_subsets=((0, 1, 2, 3, 4),),
        rotations=(0,),
        polarities=("normal",),
        architectures=({"family": "mlp", "hidden": [4]},),
        runs=2,
        activations=("relu",),
        learning_rates=(0.01,),
        weight_decays=(0.0,),
        initializations=("kaiming_uniform",),
        label_noise=(0.0,),
        train_sizes=(30,),
        steps=(2,),
        checkpoints=(1.0,),
        batch_size=4,
        device="cpu",
    )

    def made(self, settings: ZooSettings, folder: Path, patch: pytest.MonkeyPatch) -> tuple[Any, ...]:
        devices = []
        train_population = zoo_training.train_population

        def on_cpu(*arguments: Any, device: str, **options: Any) -> Any:
            devices.append(device)
            return train_population(*arguments, device="cpu", **options)

        with patch.context() as inner:
            inner.setattr(zoo_training, "train_population", on_cpu)
            try:
                zoo = train_zoo(settings, folder)
            except ZooError as error:
                return (str(error),)
        weights = [zoo.blob(row) for row in range(len(zoo))]
        return weights, zoo.index["dataset"].tolist(), devices

    @pytest.mark.parametrize("key", ZOO_CHANGES)
    def test_every_key_changes_the_zoo(self, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = self.made(self.BASE, tmp_path / "plain", monkeypatch)
        other = self.made(changed(self.BASE, key, ZOO_CHANGES[key]), tmp_path / "other", monkeypatch)
        assert plain != other


@pytest.fixture(scope="module")
def plain_training(tiny_zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    return trained(tiny_zoo, Test10EncoderSettings.BASE, tmp_path_factory.mktemp("plain"))


def trained(zoo: Zoo, settings: AutoencoderSettings, folder: Path) -> tuple[Any, ...]:
    """Everything that training leaves: weights, input side, history, checkpoints and logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "clear_checkpoints", lambda _: None)
        # In mixed precision Accelerate builds outputs anew from one mapping: ModelOutput allows it, their types do not.
        patch.setattr(WeightAutoencoderOutput.__init__, "__no_type_check__", True, raising=False)
        train_autoencoder(zoo.path, folder / "encoder", settings)
    names = ("model.safetensors", "preprocessor_config.json", "history.jsonl")
    places = sorted(path.parent.name for path in folder.rglob("*") if path.parent.name in ("checkpoints", "logs"))
    return (
        tuple((folder / "encoder" / name).read_bytes() for name in names),
        places,
        sorted(path.name for path in folder.rglob("step-*")),
    )


class Test10EncoderSettings:
    BASE = AutoencoderSettings(
        encoder=EncoderSettings(hidden_size=8, layers=1, heads=2, compression=2.0),
        behaviour=BehaviourSettings(weight=0.5, images=2),
        loop=LoopSettings(
            steps=4,
            batch_size=6,
            warmup=0.25,
            max_grad_norm=0.1,
            mixed_precision="no",
            checkpoint_every=1,
            log_every=3,
            validate_every=0,
            tracker="none",
        ),
    )

    @pytest.mark.parametrize("key", ENCODER_CHANGES)
    def test_every_key_changes_the_training(
        self, key: str, tiny_zoo: Zoo, plain_training: tuple[Any, ...], tmp_path: Path
    ) -> None:
        other = trained(tiny_zoo, changed(self.BASE, key, ENCODER_CHANGES[key]), tmp_path)
        assert other != plain_training

    def test_equal_settings_change_nothing(
        self, tiny_zoo: Zoo, plain_training: tuple[Any, ...], tmp_path: Path
    ) -> None:
        assert trained(tiny_zoo, self.BASE, tmp_path) == plain_training


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (ZooSettings, {"learning_rate": [0.1]}),
        (ZooSettings, {"epochs": 3}),
        (AutoencoderSettings, {"steps": 3}),
        (AutoencoderSettings, {"loop": {"step": 3}}),
        (AutoencoderSettings, {"augmentation": {"erasing": 0.1}}),
        (AutoencoderSettings, {"encoder": {"dropout": 0.1}}),
        (AutoencoderSettings, {"behaviour": {"beta": 0.1}}),
    ],
)
def test_10_unknown_keys_are_refused(settings: type, values: dict[str, Any]) -> None:
    unknown = next(iter(values))
    unknown = next(iter(values[unknown])) if isinstance(values[unknown], dict) else unknown
    with pytest.raises(SettingsError, match=f"unknown key '{unknown}'"):
        settings_from_mapping(settings, values)


class Test10Config:
    CHANGES: dict[str, Any] = {  # noqa: RUF012
        "token_size": 66,
        "latent_size": 5,
        "window": 4,
        "hidden_size": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "hidden_act": "relu",
        "layer_norm_eps": 0.1,
        "position_size": 16,
        "depth_bins": 2,
        "projection_size": 32,
        "temperature": 0.5,
        "beta": 0.5,
        "code_levels": [3],
    }

    def loss(self, zoo: Zoo, **changes: Any) -> Tensor:
        extractor = WeightFeatureExtractor("channel", changes.get("token_size", 65), std=0.25)
        inputs = extractor.batch(zoo.flat([0, 1, 2, 3]), next(iter(zoo.architectures.values())))
        with torch.no_grad():
            loss: Tensor = model(**changes)(**inputs, views=2).loss
        return loss

    def test_every_key_is_changed_below(self) -> None:
        general, ours = (
            {field.name for field in dataclasses.fields(cls)} for cls in (PreTrainedConfig, WeightAutoencoderConfig)
        )
        assert ours - general == set(self.CHANGES)

    @pytest.mark.parametrize("key", CHANGES)
    def test_every_key_changes_the_loss(self, key: str, tiny_zoo: Zoo) -> None:
        assert self.loss(tiny_zoo) == self.loss(tiny_zoo) != self.loss(tiny_zoo, **{key: self.CHANGES[key]})
