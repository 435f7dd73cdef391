"""Adapters that PEFT wrote, through tokens and back into PEFT; judged by what the loaded model computes."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from weightspace.errors import CheckpointError
from weightspace.io.adapters import Adapter, read_adapter
from weightspace.io.checkpoint import Checkpoint, open_checkpoint, open_checkpoint_bytes
from weightspace.io.peft import fold_scaling, folded_config, save_adapter, to_peft
from weightspace.io.writing import checkpoint_bytes
from weightspace.networks.infer import infer_architecture
from weightspace.tokenizers import LoraTokenizer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 5)
        self.to_k = nn.Linear(6, 5, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(5, 6)])

    def forward(self, values: Tensor) -> Tensor:
        return self.to_out[0](self.to_q(values).tanh() * self.to_k(values))


class Base(nn.Module):
    """An embedding, convolutions of one group and of two, attention in numbered blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        values = self.grouped(self.conv(self.embed(ids).view(-1, 1, 4, 4)).tanh()).mean((2, 3))
        for block in self.blocks:
            values = values + block(values)
        return self.head(values)


@pytest.fixture
def base() -> Base:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Base()


REAL = os.environ.get("WEIGHTSPACE_DATA")
IDS = torch.arange(10)
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["to_q", "to_k"], "r": 3, "lora_alpha": 7},
    "rslora": {"target_modules": ["to_q", "to_out.0"], "r": 4, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "target_modules": ["to_q", "to_k", "conv"],
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {r"blocks\.1\.to_.*": 4, "blocks.0.to_k": 1},
        "alpha_pattern": {"^blocks.0.to_q": 9, "conv": 2, r"blocks\.(0|1)\.to_k": 5},
        "use_rslora": True,
    },
    "dora": {"target_modules": ["to_q", "to_k"], "r": 2, "lora_alpha": 4, "use_dora": True},
    "bias of B": {"target_modules": ["to_q"], "r": 2, "lora_alpha": 5, "lora_bias": True},
    "all biases": {"target_modules": ["to_q"], "r": 2, "lora_alpha": 4, "bias": "all"},
    "whole modules": {"target_modules": ["to_q"], "r": 2, "modules_to_save": ["head"]},
    "convolutions": {"target_modules": ["conv", "grouped"], "r": 2, "lora_alpha": 6},
    "embedding": {"target_modules": ["embed", "to_q"], "r": 3, "lora_alpha": 4},
    "rank above the sizes": {"target_modules": ["to_q"], "r": 9, "lora_alpha": 40},
}


def trained(base: Base, options: dict[str, Any]) -> PeftModel:
    """An adapter of which every tensor differs from its initial value."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Merging is not supported")
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**options, init_lora_weights=False)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.7 * torch.randn_like(parameter)
    return model


def saved_by_peft(model: PeftModel, folder: Path) -> Checkpoint:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the embedding of a model that is not transformers'
        model.save_pretrained(folder)
    return open_checkpoint(folder)


def through_tokens(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    checkpoint = open_checkpoint_bytes(checkpoint_bytes(tensors), where="here")
    architecture, tokenizer = infer_architecture(checkpoint.specs.values()), LoraTokenizer(8)
    assert checkpoint.specs.keys() == {spec.name for spec in architecture.tensors}
    return tokenizer.detokenize(tokenizer.tokenize(checkpoint.tensors(), architecture))


def loaded_by_peft(base: Base, folder: Path, tensors: dict[str, Tensor]) -> PeftModel:
    """Loads a folder and checks that each of ``tensors`` arrived, which PEFT itself only warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*Merging is not supported")
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arrived = get_peft_model_state_dict(model)
    assert arrived.keys() == tensors.keys()
    assert all(torch.equal(arrived[name], tensors[name]) for name in tensors)
    return model


def adapter_of(
    tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, scaling: float | None = None
) -> Adapter:
    checkpoint = open_checkpoint_bytes(checkpoint_bytes(tensors, metadata), where="here")
    return read_adapter(checkpoint, None, scaling=scaling)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_peft_computes_the_same_with_what_came_back(base: Base, options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(base, options)
    checkpoint = saved_by_peft(model, tmp_path / "theirs")
    adapter = read_adapter(checkpoint, checkpoint.adapter_config)
    assert adapter.mismatches == () and adapter.namings == ("peft",)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
    for pair in adapter.pairs:
        assert adapter.scaling[pair.module] == pytest.approx(layers[pair.module].scaling["default"], rel=1e-12)
        assert pair.rank == layers[pair.module].r["default"]
    assert {pair.module for pair in adapter.pairs} == {
        name for name, layer in layers.items() if hasattr(layer, "lora_A")
    }

    expected, without = model(IDS), base(IDS)
    assert (expected - without).abs().max() > 0.05
    tensors = through_tokens(checkpoint.tensors())
    assert any(not torch.equal(tensors[name], value) for name, value in checkpoint.tensors().items())
    assert checkpoint.adapter_config is not None
    save_adapter(tensors, checkpoint.adapter_config, tmp_path / "ours")
    torch.testing.assert_close(loaded_by_peft(base, tmp_path / "ours", tensors)(IDS), expected, rtol=1e-4, atol=1e-5)

    folded = through_tokens(fold_scaling(adapter, checkpoint.tensors()))
    config = folded_config(checkpoint.adapter_config)
    save_adapter(folded, config, tmp_path / "folded")
    again = loaded_by_peft(base, tmp_path / "folded", folded)
    torch.testing.assert_close(again(IDS), expected, rtol=1e-4, atol=1e-5)
    described = read_adapter(open_checkpoint(tmp_path / "folded"), config)
    assert set(described.scaling.values()) == {1.0}


def test_merged_weights_are_the_same(base: Base, tmp_path: Path) -> None:
    model = trained(base, CONFIGS["patterns"])
    checkpoint = saved_by_peft(model, tmp_path / "theirs")
    tensors = through_tokens(checkpoint.tensors())
    save_adapter(tensors, checkpoint.adapter_config or {}, tmp_path / "ours")
    merged = loaded_by_peft(base, tmp_path / "ours", tensors).merge_and_unload().state_dict()
    for name, expected in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(REAL is None, reason="WEIGHTSPACE_DATA names no folder of real checkpoints")
@pytest.mark.parametrize(
    "file",
    [
        "AguLeon__LoRA_RoBERTa_AGNews/results_checkpoint-1000/adapter_model.safetensors",
        "SARAELSAFTY__Movies-_with_lora/model/adapter_model.safetensors",
        "catundchat__stable-diffusion-v1.5-lora/root/pytorch_lora_weights.safetensors",
    ],
)
def test_real_factors_give_the_same_weights(file: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(Path(str(REAL)) / "lora" / file)
    adapter = read_adapter(checkpoint, checkpoint.adapter_config)
    pairs = adapter.pairs[:6]
    base = nn.Module()
    for pair in pairs:
        parent, _, leaf = pair.module.rpartition(".")
        holder = base
        for part in parent.split("."):
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        holder.add_module(leaf, nn.Linear(pair.a.shape[1], pair.b.shape[0], bias=False))
    start = {name: value.clone() for name, value in base.state_dict().items()}
    stored = checkpoint.tensors(name for pair in pairs for name in pair.names)
    few = read_adapter(open_checkpoint_bytes(checkpoint_bytes(stored), where="few"), checkpoint.adapter_config)
    converted, config = to_peft(few, stored)
    tensors = through_tokens(converted)
    save_adapter(tensors, config | {"task_type": None, "modules_to_save": None, "bias": "none"}, tmp_path)
    merged = loaded_by_peft(base, tmp_path, tensors).merge_and_unload().state_dict()
    for pair in pairs:
        expected = adapter.scaling[pair.module] * stored[pair.b.name].double() @ stored[pair.a.name].double()
        name = f"{pair.module}.weight"
        torch.testing.assert_close((merged[name] - start[name]).double(), expected, rtol=1e-4, atol=1e-7)


def renamed(model: PeftModel, names: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
    """The factors of a PEFT model under the names ``names[module]`` of A and B."""
    stored = get_peft_model_state_dict(model)
    return {
        new: stored[f"base_model.model.{module}.lora_{factor}.weight"].clone()
        for module, pair in names.items()
        for factor, new in zip("AB", pair, strict=True)
    }


MODULES = ("blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q", "blocks.1.to_k", "blocks.0.to_out.0", "blocks.1.to_out.0")
TARGETS = {"target_modules": ["to_q", "to_k", "to_out.0"], "r": 3, "rank_pattern": {"blocks.1.to_k": 2}}


@pytest.mark.parametrize(
    ("naming", "template"),
    [
        ("diffusers", "unet.{parent}.processor.{leaf}_lora.{direction}.weight"),
        ("diffusers", "unet.{module}.lora.{direction}.weight"),
        ("diffusers", "text_encoder.{module}.lora_linear_layer.{direction}.weight"),
        ("diffusers", "unet.{module}.lora_{letter}.weight"),
        ("kohya", "lora_unet_{flat}.lora_{direction}.weight"),
        ("peft", "{module}.lora_{letter}.default.weight"),
    ],
)
def test_other_namings_become_pefts(base: Base, naming: str, template: str, tmp_path: Path) -> None:
    model = trained(base, TARGETS | {"lora_alpha": 3, "alpha_pattern": {"blocks.1.to_k": 2}})
    names = {}
    for module in MODULES:
        parent, leaf = module.removesuffix(".0").rsplit(".", 1)
        parts = {"module": module, "parent": parent, "leaf": leaf, "flat": module.replace(".", "_")}
        names[module] = tuple(template.format(direction=d, letter=x, **parts) for d, x in (("down", "A"), ("up", "B")))
    tensors = renamed(model, names)
    adapter = adapter_of(tensors)
    assert adapter.namings == (naming,) and set(adapter.unknown) == set(adapter.scaling)
    assert adapter.notes == ("no config, tensor or metadata states alpha of 6 modules: their scaling is unknown",)
    with pytest.raises(CheckpointError, match=r"here: the scaling of 6 modules such as .* is unknown"):
        fold_scaling(adapter, tensors)
    with pytest.raises(CheckpointError, match=r"here: the scaling of 6 modules such as .* is unknown"):
        to_peft(adapter, tensors, modules=dict(base.named_modules()))
    adapter = read_adapter(open_checkpoint_bytes(checkpoint_bytes(tensors), where="here"), None, scaling=1.0)
    assert not adapter.unknown
    assert adapter.notes == ("nothing states the scaling of 6 modules: it is taken to be 1",)
    converted, config = to_peft(adapter, tensors, modules=dict(base.named_modules()))
    save_adapter(converted, config, tmp_path / "ours")
    loaded = loaded_by_peft(base, tmp_path / "ours", converted)
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=1e-5, atol=1e-6)


def test_alpha_of_kohya_becomes_alpha_of_peft(base: Base, tmp_path: Path) -> None:
    model = trained(base, TARGETS | {"lora_alpha": 1.5, "alpha_pattern": {"blocks.0.to_q": 6}})
    flat = {module: f"lora_unet_{module.replace('.', '_')}" for module in MODULES}
    tensors = renamed(model, {m: (f"{f}.lora_down.weight", f"{f}.lora_up.weight") for m, f in flat.items()})
    tensors |= {f"{f}.alpha": torch.tensor(6.0 if m == "blocks.0.to_q" else 1.5) for m, f in flat.items()}
    adapter = adapter_of(tensors, {"ss_sd_model_name": "sd-v1-5.safetensors"})
    assert adapter.base_model == "sd-v1-5.safetensors" and adapter.components == ("unet",) and not adapter.notes
    assert adapter.scaling["lora_unet_blocks_0_to_q"] == 2 and adapter.scaling["lora_unet_blocks_1_to_k"] == 0.75
    converted, config = to_peft(adapter, tensors, modules=dict(base.named_modules()))
    save_adapter(converted, config, tmp_path / "ours")
    loaded = loaded_by_peft(base, tmp_path / "ours", converted)
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=1e-5, atol=1e-6)

    folded = fold_scaling(adapter, tensors)
    assert folded["lora_unet_blocks_0_to_q.alpha"] == 3
    assert set(adapter_of(folded).scaling.values()) == {1.0}
    assert torch.equal(
        folded["lora_unet_blocks_0_to_q.lora_up.weight"], 2 * tensors["lora_unet_blocks_0_to_q.lora_up.weight"]
    )


def test_equal_updates_of_other_alpha_have_equal_tensors_once_folded() -> None:
    factors = {"m.lora_A.weight": torch.randn(2, 5), "m.lora_B.weight": torch.randn(4, 2)}
    other = {"m.lora_A.weight": factors["m.lora_A.weight"], "m.lora_B.weight": factors["m.lora_B.weight"] / 4}
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["m"]}
    folded = []
    for tensors, alpha in ((factors, 2), (other, 8)):
        checkpoint = open_checkpoint_bytes(checkpoint_bytes(tensors), where="here")
        folded.append(fold_scaling(read_adapter(checkpoint, config | {"lora_alpha": alpha}), tensors))
    assert all(torch.equal(folded[0][name], folded[1][name]) for name in factors)


class TestConversionIsRefused:
    def pairs(self, *modules: str) -> dict[str, Tensor]:
        parts = {"down": (2, 4), "up": (3, 2)}
        joint = {True: ":", False: ".lora_"}
        return {
            f"{m}{joint[':' in m]}{part}{'' if ':' in m else '.weight'}": torch.ones(shape)
            for m in modules
            for part, shape in parts.items()
        }

    def test_of_numbered_modules(self) -> None:
        tensors = self.pairs("unet:0", "unet:1")
        with pytest.raises(CheckpointError, match=r"here: 'unet:0' numbers its module and does not name it; keep"):
            to_peft(adapter_of(tensors), tensors)

    def test_of_names_without_dots_and_no_module_names(self) -> None:
        tensors = self.pairs("lora_unet_mid_to_q")
        with pytest.raises(CheckpointError, match="'lora_unet_mid_to_q' could be 0 of the base model's modules"):
            to_peft(adapter_of(tensors), tensors)
        with pytest.raises(CheckpointError, match="could be 2 of the base model's modules"):
            to_peft(adapter_of(tensors), tensors, modules=["mid.to_q", "mid.to.q"])

    def test_of_several_networks_at_once(self) -> None:
        tensors = self.pairs("lora_te_a", "lora_unet_b")
        adapter = adapter_of(tensors, scaling=1.0)
        with pytest.raises(CheckpointError, match=r"factors of te, unet, .* e\.g\. component='unet'"):
            to_peft(adapter, tensors, modules=["a", "b"])
        with pytest.raises(CheckpointError, match="no component 'vae'; take one of 'te', 'unet'"):
            to_peft(adapter, tensors, component="vae")
        converted, config = to_peft(adapter, tensors, component="te", modules=["a"])
        assert set(converted) == {"base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"}
        assert config["target_modules"] == ["a"]

    def test_of_tensors_without_a_place(self) -> None:
        tensors = self.pairs("unet.a") | {"<s1>": torch.ones(4)}
        with pytest.raises(CheckpointError, match="1 tensors such as '<s1>' have no place in a PEFT adapter; leave"):
            to_peft(adapter_of(tensors), tensors)


class TestSavingIsRefused:
    CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["m"]}  # noqa: RUF012

    def factors(self, stem: str = "base_model.model.m") -> dict[str, Tensor]:
        return {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(3, 2)}

    @pytest.mark.parametrize("stem", ["m", "model.m"])
    def test_where_peft_would_not_find_the_names(self, stem: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"is 'base_model\.model\..*' for PEFT; rename the tensors"):
            save_adapter(self.factors(stem), self.CONFIG, tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"r": 3}, "'m' has rank 2 where the config says 3"),
            ({"use_dora": True}, "'m' has no magnitude where use_dora is True"),
            ({"target_modules": ["n"]}, "'m' is not among target_modules"),
        ],
    )
    def test_where_the_config_is_another_ones(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=f"PEFT would load another adapter: {message}; correct the config"):
            save_adapter(self.factors(), self.CONFIG | change, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_where_the_config_is_no_json(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="the config is not JSON"):
            save_adapter(self.factors(), self.CONFIG | {"extra": object()}, tmp_path)

    def test_where_the_folder_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=r"file/folder: cannot be written \(Not a directory\)"):
            save_adapter(self.factors(), self.CONFIG, tmp_path / "file" / "folder")


def test_tensors_that_share_memory_are_both_stored(tmp_path: Path) -> None:
    factor = torch.randn(2, 3)
    tensors = {
        "base_model.model.a.lora_A.weight": factor,
        "base_model.model.a.lora_B.weight": torch.randn(3, 2),
        "base_model.model.b.lora_A.weight": factor,
        "base_model.model.b.lora_B.weight": torch.randn(3, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a", "b"]}
    save_adapter(tensors, config, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == config
    network = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model = PeftModel.from_pretrained(network, str(tmp_path))
    arrived = get_peft_model_state_dict(model)
    assert arrived.keys() == tensors.keys() and all(torch.equal(arrived[name], tensors[name]) for name in tensors)
