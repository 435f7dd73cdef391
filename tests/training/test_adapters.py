"""Encoders of LoRA adapters: what is one update is one embedding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from weightspace.encoder import load_encoder
from weightspace.io.writing import save_checkpoint
from weightspace.training.autoencoder import train_autoencoder
from weightspace.zoo.importing import import_folder

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": "org/base"}


def adapter(seed: int, mixed_by: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Two modules; factors are (B G, G^-1 A) where ``mixed_by`` is G."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in ("query", "value"):
        a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 24), (24, 4)))
        if mixed_by is not None:
            a, b = torch.linalg.solve(mixed_by, a), b @ mixed_by
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.float()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.float()
    return tensors


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_checkpoint(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize("tokenizer", ["lora", "channel"])
def test_equivalent_factors_have_one_embedding_with_the_lora_tokenizer_alone(
    tmp_path: Path, tiny_encoder_settings: Any, tokenizer: str
) -> None:
    rows = []
    for seed in range(24):
        save(tmp_path / "adapters" / str(seed), adapter(seed))
        rows.append({"file": f"{seed}/adapter_model.safetensors", "test_accuracy": seed / 24})
    (tmp_path / "adapters" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_folder(tmp_path / "adapters", tmp_path / "zoo", on_problem="error")
    settings = replace(
        tiny_encoder_settings,
        encoder=replace(tiny_encoder_settings.encoder, tokenizer=tokenizer),
        loop=replace(tiny_encoder_settings.loop, steps=5),
    )
    encoder = load_encoder(train_autoencoder(tmp_path / "zoo", tmp_path / "encoder", settings))
    mix = torch.eye(4, dtype=torch.float64) + 0.3 * torch.randn(
        4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    one, same, other = (
        encoder.embed_checkpoint(save(tmp_path / name, tensors))
        for name, tensors in (("one", adapter(100)), ("same", adapter(100, mix)), ("other", adapter(101)))
    )
    apart = float((one - other).norm())
    assert apart > 0.1
    assert (float((one - same).norm()) < 1e-3 * apart) is (tokenizer == "lora")
