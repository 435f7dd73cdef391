"""Every kind of part that users may add is added here by one file outside of the package, and used."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import weightspace
from weightspace.data.features import dataset_features
from weightspace.data.image_encoders import IMAGE_ENCODERS, open_image_encoder
from weightspace.data.images import load_images
from weightspace.encoder import load_encoder
from weightspace.networks.families import FAMILIES, Network, family_config
from weightspace.probes.targets import TARGETS, read_target
from weightspace.sampling.base import Condition, sample
from weightspace.sampling.factory import SAMPLERS, STEPS, Sources, open_sampler
from weightspace.tokenizers import TOKENIZERS
from weightspace.zoo.training import ZooSettings

REGISTRIES = (TOKENIZERS, SAMPLERS, STEPS, FAMILIES, IMAGE_ENCODERS, TARGETS)
EXTENSION = """
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from weightspace.data.image_encoders import IMAGE_ENCODERS, ImageEncoder
from weightspace.encoder import load_encoder
from weightspace.evaluation.baselines import from_scratch
from weightspace.networks.families import Activation, FamilyConfig, register_family
from weightspace.probes.targets import TARGETS
from weightspace.sampling.base import SamplerStep
from weightspace.sampling.factory import SAMPLERS, STEPS
from weightspace.settings import Settings
from weightspace.tokenizers import TOKENIZERS, WeightTokenizer


@dataclass(frozen=True)
class EvenTokenizer(WeightTokenizer):
    # Rows start at even places.
    name: ClassVar[str] = "even"

    def row_stride(self, width):
        return width + width % 2


TOKENIZERS["even"] = EvenTokenizer


@register_family
@dataclass(frozen=True)
class GatedConfig(FamilyConfig):
    family: ClassVar[str] = "gated"
    width: int = 4
    activation: Activation = "relu"

    def layers(self):
        pixels = self.image_shape[0] * self.image_shape[1] * self.image_shape[2]
        return {
            "up": nn.Linear(pixels, self.width),
            "gate": nn.Linear(pixels, self.width),
            "head": nn.Linear(self.width, self.classes),
        }

    def forward(self, images, apply):
        x = images.flatten(-3)
        return apply("head", apply("up", x) * apply("gate", x, torch.sigmoid))


class Brightness(ImageEncoder):
    name = digest = "brightness"

    def __init__(self, device):
        self.device = device

    def _encode(self, images):
        return images.mean((2, 3))


IMAGE_ENCODERS["brightness"] = Brightness
TARGETS["fast"] = lambda zoo: np.log10(zoo.index["step"].to_numpy(dtype=np.float64))


@dataclass(frozen=True)
class UntrainedSettings(Settings):
    scale: float = 1.0


class UntrainedSampler:
    settings_class = UntrainedSettings

    def __init__(self, codec, settings):
        self.codec, self.settings = codec, settings

    @classmethod
    def from_sources(cls, name, sources, settings):
        return cls(load_encoder(sources.encoder).codec, settings), {"autoencoder": "tiny"}

    def latents(self, condition, count, generator):
        drawn = from_scratch(condition.family, condition.architecture, count, generator)
        return self.settings.scale * self.codec.encode(drawn, condition.architecture)


@dataclass(frozen=True, eq=False)
class Halved(SamplerStep):
    settings_class = Settings
    settings: Settings

    def latents(self, condition, count, generator):
        return self.sampler.latents(condition, count, generator) / 2


SAMPLERS["untrained"] = UntrainedSampler
STEPS["halved"] = Halved
"""


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Imports a file of extensions, and forgets what it registered."""
    path = tmp_path / "extension.py"
    path.write_text(EXTENSION)
    spec = importlib.util.spec_from_file_location("toy_extension", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy_extension", module)
    before = [dict(registry) for registry in REGISTRIES]
    spec.loader.exec_module(module)
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def gated(extension: None) -> dict:
    return {"family": "gated", "image_shape": [1, 8, 8], "classes": 3}


def test_a_family_runs_and_its_symmetries_are_found(gated: dict) -> None:
    family = family_config(gated)
    assert family is not None
    module = Network(family)
    assert module(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    (group,) = Condition.from_config(gated).architecture.groups
    assert {axis.tensor for axis in group.axes} == {"up.weight", "up.bias", "gate.weight", "gate.bias", "head.weight"}


def test_a_tokenizer_gives_a_checkpoint_back(gated: dict, tmp_path: Path) -> None:
    weightspace.save_checkpoint(Network(family_config(gated)).state_dict(), tmp_path / "model.safetensors")
    checkpoint = weightspace.open_checkpoint(tmp_path / "model.safetensors")
    tokenizer = weightspace.get_tokenizer("even", 16)
    tokens = tokenizer.tokenize(checkpoint.tensors(), checkpoint.architecture)
    assert tokens.tokens.shape == (4 * 66 // 16 + 1 + 4 * 66 // 16 + 1 + 2, 16)
    restored = tokenizer.detokenize(tokens)
    assert all(torch.equal(tensor, checkpoint.tensor(name)) for name, tensor in restored.items())


def test_a_target_is_read_from_a_zoo_of_a_new_family(extension: None, tmp_path: Path) -> None:
    settings = ZooSettings(
        runs=2,
        architectures=({"family": "gated"},),
        train_sizes=(20,),
        steps=(10,),
        checkpoints=(0.1, 1.0),
        device="cpu",
    )
    zoo = weightspace.train_zoo(settings, tmp_path / "zoo")
    assert [family.family for family in zoo.families] == ["gated"] * 4
    np.testing.assert_allclose(sorted(read_target(zoo, "fast")), [0, 0, 1, 1])


def test_an_image_encoder_sees_a_dataset(extension: None) -> None:
    features = dataset_features(load_images("digits"), open_image_encoder("brightness"), images=20)
    assert features.features.shape == (20, 3)
    assert features.encoder == "brightness"


def test_a_sampler_and_a_step_draw_models(
    extension: None, tiny_clip_joint: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    sources = Sources(load_encoder(tiny_clip_joint), encoder=str(tiny_encoder))
    opened = open_sampler("untrained+halved", sources, {"untrained": {"scale": 2.0}})
    assert opened.sources["autoencoder"] == "tiny" and opened.settings["untrained"] == {"scale": 2.0}
    condition = Condition.from_config({"family": "mlp", "image_shape": [1, 8, 8], "classes": 10, "hidden": [6]})
    flat = sample(opened.sampler, condition, 2, torch.Generator().manual_seed(0))
    plain = open_sampler("untrained", sources).sampler
    assert flat.shape == (2, condition.architecture.numel)
    assert torch.equal(flat, sample(plain, condition, 2, torch.Generator().manual_seed(0)))
