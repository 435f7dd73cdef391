"""The libraries above ``huggingface_hub`` publish to the loopback Hub and load from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub


@pytest.fixture(autouse=True, params=["lfs", "cdn"])
def mode(hub: LoopbackHub, request: pytest.FixtureRequest) -> str:
    hub.mode = request.param
    return hub.mode


@pytest.fixture
def bert() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=16, max_position_embeddings=8, **sizes))


def _equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_transformers(hub: LoopbackHub, bert: torch.nn.Module) -> None:
    from transformers import AutoModel

    bert.push_to_hub("org/bert")  # type: ignore[operator]
    info = HfApi().model_info("org/bert")
    assert info.config == {"architectures": ["BertModel"], "model_type": "bert"}
    assert info.library_name == "transformers" and info.safetensors is not None
    assert info.safetensors.total == sum(parameter.numel() for parameter in bert.parameters())
    assert _equal(AutoModel.from_pretrained("org/bert"), bert)
    assert _equal(AutoModel.from_pretrained("org/bert", revision=info.sha, local_files_only=True), bert)


def test_peft(hub: LoopbackHub, bert: torch.nn.Module) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModel

    bert.push_to_hub("org/bert")  # type: ignore[operator]
    base = AutoModel.from_pretrained("org/bert")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    adapted.push_to_hub("org/lora")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(HfApi().list_repo_files("org/lora"))
    config = HfApi().model_info("org/lora").config
    assert config is not None and config["peft"]["base_model_name_or_path"] == "org/bert"
    assert _equal(PeftModel.from_pretrained(AutoModel.from_pretrained("org/bert"), "org/lora"), adapted)


def test_datasets(hub: LoopbackHub, tmp_path: Path) -> None:
    from datasets import Dataset, load_dataset

    rows = [{"number": number, "blob": bytes([number])} for number in range(20)]
    Dataset.from_list(rows).push_to_hub("org/data", num_shards=2)
    assert "format:parquet" in HfApi().dataset_info("org/data").tags
    assert load_dataset("org/data", split="train").to_list() == rows
    assert list(load_dataset("org/data", split="train", streaming=True)) == rows
    Dataset.from_list(rows[:1]).push_to_hub("org/data", "other", split="test")
    assert load_dataset("org/data", "other", split="test").to_list() == rows[:1]
