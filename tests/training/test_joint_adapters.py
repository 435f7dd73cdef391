"""Joint models of LoRA adapters, alone and beside whole models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weightspace.encoder import Encoder
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.writing import save_checkpoint
from weightspace.search.finding import Query, find_models, open_index
from weightspace.search.index import EmbeddingIndex
from weightspace.training.autoencoder import EncoderSettings
from weightspace.training.joint import JointSettings, TowerSettings, train_joint
from weightspace.training.loop import read_history
from weightspace.training.settings import LoopSettings
from weightspace.zoo.importing import import_folder

DATASETS = ("digits", "digits?classes=0-1-2-3-4")
MODELS = 24


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 14), nn.ReLU(), nn.Linear(14, 5))


def save_adapter(folder: Path, seed: int, rank: int) -> Path:
    """Writes an adapter of `network` as PEFT does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(network(), LoraConfig(r=rank, lora_alpha=rank, target_modules=["0", "2"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def save_network(folder: Path, seed: int, order: torch.Tensor | None = None) -> Path:
    """Writes a whole model, its first hidden neurons in another order if need be."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tensors = dict(network().state_dict())
    if order is not None:
        tensors |= {name: tensors[name][order] for name in ("0.weight", "0.bias")}
        tensors["2.weight"] = tensors["2.weight"][:, order]
    folder.mkdir(parents=True)
    save_checkpoint(tensors, folder / "model.safetensors")
    return folder


def mixed_factors(adapter: Path, folder: Path) -> Path:
    """Copies an adapter with other factors of the same updates: (B G, inv(G) A)."""
    generator = torch.Generator().manual_seed(5)
    shutil.copytree(adapter, folder)
    tensors = open_checkpoint(adapter).tensors()
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name].double(), tensors[other].double()
        mix = torch.eye(len(a), dtype=torch.float64)
        mix += 0.3 * torch.randn(mix.shape, generator=generator, dtype=torch.float64)
        tensors |= {name: torch.linalg.solve(mix, a).float(), other: (b @ mix).float()}
    save_checkpoint(tensors, folder / "adapter_model.safetensors")
    return folder


def trained(folder: Path, tiny_clip: Path, tokenizer: str, *, mixed: bool) -> tuple[EmbeddingIndex, Encoder]:
    """Trains a joint model on adapters of two ranks, every second one replaced by a whole model if ``mixed``."""
    rows = []
    for seed in range(MODELS):
        place = folder / "models" / str(seed)
        if mixed and seed % 2:
            file = save_network(place, seed) / "model.safetensors"
        else:
            file = save_adapter(place, seed, (2, 4)[seed // 4 % 2]) / "adapter_model.safetensors"
        facts = {"dataset": DATASETS[seed // 2 % 2], "test_accuracy": seed / MODELS}
        rows.append({"file": str(file.relative_to(folder / "models")), **facts})
    (folder / "models" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_folder(folder / "models", folder / "zoo", on_problem="error")
    encoder = EncoderSettings(tokenizer=tokenizer, hidden_size=16, layers=1, heads=2, window=16)
    settings = JointSettings(
        towers=TowerSettings(encoder=encoder, hidden_size=16, pooling_heads=2, projection_dim=16, bins=4),
        image_encoder=str(tiny_clip),
        sample=20,
        images=10,
        loop=LoopSettings(steps=4, batch_size=8, mixed_precision="no", tracker="none", validate_every=2),
    )
    joint = train_joint(folder / "zoo", folder / "joint", replace(settings, results=("test_accuracy",)))
    assert np.isfinite(list(read_history(joint)[-1].values())).all()
    return open_index(folder / "zoo", joint)


@pytest.fixture(scope="module")
def adapters(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EmbeddingIndex, Encoder]:
    return trained(tmp_path_factory.mktemp("adapters"), tiny_clip, "lora", mixed=False)


@pytest.fixture(scope="module")
def mixed(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EmbeddingIndex, Encoder]:
    return trained(tmp_path_factory.mktemp("mixed"), tiny_clip, "lora", mixed=True)


@pytest.fixture(params=["adapters", "mixed"])
def found(request: pytest.FixtureRequest) -> tuple[EmbeddingIndex, Encoder]:
    index, encoder = request.getfixturevalue(request.param)
    return index, encoder


def distances(encoder: Encoder, one: Path, same: Path, other: Path) -> tuple[float, float]:
    embedded = [torch.nn.functional.normalize(encoder.embed_checkpoint(path), dim=0) for path in (one, same, other)]
    return float((embedded[0] - embedded[1]).norm()), float((embedded[0] - embedded[2]).norm())


def test_all_models_are_found(found: tuple[EmbeddingIndex, Encoder]) -> None:
    index, encoder = found
    assert (len(index), index.left_out) == (MODELS, 0)
    answer = find_models(index, encoder, Query(dataset="digits", result=">=0.5"), k=MODELS)
    assert sorted(answer.rows) == list(range(MODELS))
    assert len(np.unique(answer.scores.round(4))) > MODELS / 2


def test_equal_updates_have_one_embedding(found: tuple[EmbeddingIndex, Encoder], tmp_path: Path) -> None:
    index, encoder = found
    one = save_adapter(tmp_path / "one", 0, 2)
    same, other = mixed_factors(one, tmp_path / "same"), save_adapter(tmp_path / "other", 101, 2)
    near, apart = distances(encoder, one, same, other)
    assert near < 1e-3 * apart
    # The model of the zoo is the same one, by its embedding alone.
    assert find_models(index, encoder, Query(model=str(same))).itself != ()


def test_models_of_all_kinds_share_a_batch(found: tuple[EmbeddingIndex, Encoder], tmp_path: Path) -> None:
    _, encoder = found
    small, large = save_adapter(tmp_path / "small", 1, 2), save_adapter(tmp_path / "large", 2, 4)
    models = [str(small), str(large), str(save_network(tmp_path / "whole", 3))]
    with torch.no_grad():
        together = encoder.model.get_weight_features(**encoder.extractor(models)).pooler_output
    alone = torch.stack([encoder.embed_checkpoint(model) for model in models])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_reordered_neurons_of_a_whole_model_change_little(
    mixed: tuple[EmbeddingIndex, Encoder], tmp_path: Path
) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    one, same = save_network(tmp_path / "one", 7), save_network(tmp_path / "same", 7, order)
    near, apart = distances(mixed[1], one, same, save_network(tmp_path / "other", 8))
    assert near < 0.2 * apart


def test_channels_see_which_factors_are_stored(tiny_clip: Path, tmp_path: Path) -> None:
    _, encoder = trained(tmp_path, tiny_clip, "channel", mixed=True)
    one, other = save_adapter(tmp_path / "one", 100, 2), save_adapter(tmp_path / "other", 101, 2)
    near, apart = distances(encoder, one, mixed_factors(one, tmp_path / "same"), other)
    assert near > 0.2 * apart
