from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from weightspace.errors import CheckpointError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.quantization import quantization_of
from weightspace.io.writing import save_checkpoint
from weightspace.schema import TensorSpec

REAL = os.environ.get("WEIGHTSPACE_DATA")

Stored = dict[str, tuple[str, tuple[int, ...]]]


def specs(stored: Stored) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, shape, dtype) for name, (dtype, shape) in stored.items()}


def layer(**leaves: str) -> dict[str, TensorSpec]:
    """One layer after an unquantised embedding; ``__`` stands for a dot."""
    stored: Stored = {"model.embed.weight": ("BF16", (32, 16))}
    for leaf, dtype in leaves.items():
        stored[f"model.layers.0.q_proj.{leaf.replace('__', '.')}"] = (dtype, (16, 16))
    return specs(stored)


LAYOUTS = [
    ("gptq", layer(qweight="I32", qzeros="I32", scales="F16", g_idx="I32")),
    ("awq", layer(qweight="I32", qzeros="I32", scales="F16")),
    ("packed integers", layer(qweight="I32", scales="F16")),
    (
        "bitsandbytes-4bit",
        layer(
            weight="U8",
            weight__absmax="F32",
            weight__quant_map="F32",
            weight__quant_state__bitsandbytes__nf4="U8",
        ),
    ),
    ("bitsandbytes-4bit", layer(weight="BF16", weight__absmax="U8", weight__quant_map="F32")),
    ("bitsandbytes-8bit", layer(weight="I8", SCB="F32")),
    ("compressed-tensors", layer(weight_packed="I32", weight_scale="BF16", weight_shape="I64")),
    ("nvfp4", layer(weight="U8", weight_scale="F8_E4M3", weight_scale_2="F32", input_scale="F32")),
    ("mxfp4", layer(gate_up_proj_blocks="U8", gate_up_proj_scales="U8", gate_up_proj_bias="BF16")),
    ("hqq", layer(W_q="U8", scale="F16", zero="F16")),
    ("hqq", layer(W_q="F32", scale="F16", zero="F16")),
    ("aqlm", layer(codes="I16", codebooks="F16", scales="F16")),
    ("vptq", layer(indices="I32", centroids__weight="F16")),
    ("quanto", layer(weight___data="I8", weight___scale="F16", input_scale="F16")),
    ("torchao", layer(_weight_qdata="I8", _weight_scale="F32")),
    ("eetq", layer(weight="I8", weight_scales="F16")),
    ("higgs", layer(weight="U8", scales="F16", tables="F16", tables2="F32")),
    ("metal", layer(weight="U32", scales="BF16", qbiases="BF16")),
    ("mlx", layer(weight="U32", scales="BF16", biases="BF16")),
    ("spqr", layer(dense_weights="I32", row_offsets="I32", col_vals="I32", in_perm="I64")),
    ("fp_quant", layer(qweight="U8", scales="U8", forward_hadamard_matrix="BF16")),
    ("fp_quant", layer(dqweight="BF16", forward_hadamard_matrix="BF16")),
    ("exl2", layer(q_weight="I32", q_scale="I32", q_groups="I16")),
    ("exl3", layer(trellis="I16", suh="F16", svh="F16")),
    ("quip", layer(Qidxs="I64", SU="F16", SV="F16")),
    ("svdquant", layer(qweight="I8", wscales="BF16")),
    ("fp8", layer(weight="F8_E4M3", weight_scale="F32", input_scale="F32")),
    ("fp8", layer(weight="F8_E4M3", weight_scale_inv="F32")),
    ("fp8", layer(weight="F8_E4M3", scale="F8_E8M0")),
    ("fp8", layer(weight="F8_E5M2", scale_weight="F32")),
    ("fp8", layer(experts__down_proj="F8_E4M3", experts__down_proj_scale_inv="F32")),
    ("fp4", layer(weight="F4", weight_scale="F8_E4M3")),
    ("int8", layer(weight="I8", weight_scale="F32")),
    ("int8", layer(embedding_quantized="I8", embedding_scale="F32")),
    ("packed integers", layer(weight="U8", weight_scale="BF16")),
]

READABLE = [
    layer(weight="BF16", bias="BF16"),
    layer(weight="F8_E4M3", bias="BF16"),
    layer(weight="I8"),
    layer(weight="U8", position_ids="I64"),
    layer(weight="F32", scale="F32"),  # LayerScale
    layer(weight="F32", scales="F32", ls_scale="F32"),
    layer(weight="BF16", weight_scale="F32"),
    layer(weight="BF16", k_scale="F32", v_scale="F32"),  # scales of an fp8 cache
    layer(weight="F8_E4M3", scale="F8_E4M3", weight_scale="F8_E4M3"),  # a whole model cast to fp8
    layer(W_q="F32", W_k="F32", W_v="F32", scale="F32"),  # attention written by hand
    layer(codes="I64", codebooks="F32"),
    layer(indices="I64", weight="F32"),
    {},
]


def name_of(value: Any) -> str | None:
    return value if isinstance(value, str) else None


@pytest.mark.parametrize(("method", "stored"), LAYOUTS, ids=name_of)
def test_a_layout_is_recognised_without_a_config(method: str, stored: dict[str, TensorSpec]) -> None:
    found = quantization_of(stored)
    assert found is not None
    assert found.method == method
    assert "'model.layers.0.q_proj." in found.evidence
    assert "'model.embed" not in found.evidence
    assert found.reason.startswith(f"quantised with {method} ({found.evidence})")
    assert "\n" not in found.reason


@pytest.mark.parametrize(("method", "stored"), LAYOUTS, ids=name_of)
def test_a_layout_that_lacks_one_of_its_parts_is_another_or_none(method: str, stored: dict[str, TensorSpec]) -> None:
    found = quantization_of(stored)
    assert found is not None
    beside = found.evidence.rpartition(" beside ")[2].strip("'")
    rest = quantization_of({name: spec for name, spec in stored.items() if name != beside})
    assert rest is None or rest.evidence != found.evidence


@pytest.mark.parametrize("stored", READABLE, ids=lambda stored: "-".join(stored) or "nothing")
@pytest.mark.parametrize("config", [None, {}, {"quantization_config": None}, {"quantization_config": {}}])
def test_tensors_that_are_what_they_say_are_not_quantised(
    stored: dict[str, TensorSpec], config: dict[str, Any] | None
) -> None:
    assert quantization_of(stored, config) is None


@pytest.mark.parametrize(
    ("config", "method", "evidence"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq", "quantization_config.quant_method"),
        ({"quantization_config": {"quant_method": "Intel/Auto-Round"}}, "auto-round", "quant_method"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}},
            "bitsandbytes-4bit",
            "quantization_config.load_in_4bit",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes-8bit", "quantization_config.load_in_8bit"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "modelopt", "quant_method"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", "compression_config."),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8", "quantization_config."),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx", "quantization.bits"),
        ({"bits": 4, "group_size": 128, "desc_act": False}, "gptq", "bits"),  # quantize_config.json
        ({"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq", "w_bit"),  # quant_config.json
        ({"producer": {}, "quantization": {"quant_algo": "FP8"}}, "modelopt", "quantization.quant_algo"),
        ({"load_in_4bit": True}, "bitsandbytes-4bit", "load_in_4bit"),
        ({"quantization_config": {"quant_method": "newest"}}, "newest", "quant_method"),
    ],
)
def test_a_config_names_the_method_of_tensors_in_few_bits(config: dict[str, Any], method: str, evidence: str) -> None:
    stored = layer(kernel="U8", bias="F16")
    found = quantization_of(stored, config)
    assert found is not None
    assert found.method == method
    assert evidence in found.evidence
    assert "'model.layers.0.q_proj.kernel' in U8" in found.evidence


def test_a_config_names_the_method_better_than_the_tensors() -> None:
    found = quantization_of(layer(W_q="U8", meta="U8"), {"quantization_config": {"quant_method": "sinq"}})
    assert found is not None
    assert found.method == "sinq"
    assert "quant_method" in found.evidence
    assert "W_q" in found.evidence


def test_every_method_of_transformers_is_refused_by_its_name() -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    for method in QuantizationMethod:
        found = quantization_of(layer(weight="U8"), {"quantization_config": {"quant_method": method.value}})
        assert found is not None
        assert found.method == method.value


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8", "nvfp4"])
def test_a_config_alone_proves_nothing(method: str) -> None:
    config = {"quantization_config": {"quant_method": method, "load_in_4bit": method == "bitsandbytes"}}
    dequantised = layer(weight="BF16", position_ids="I64", attn__bias="U8", relative_position_index="I32")
    assert quantization_of(dequantised, config) is None


@pytest.mark.parametrize(
    ("config", "mend"),
    [
        ({}, "read the unquantised model,"),
        ({"_name_or_path": "org/base"}, "read the unquantised 'org/base',"),
        ({"_name_or_path": "org/base-GPTQ-4bit"}, "read the unquantised model,"),
        ({"_name_or_path": "/home/me/models/base"}, "read the unquantised model,"),
        ({"_name_or_path": ["org/base"]}, "read the unquantised model,"),
    ],
)
def test_the_refusal_of_a_checkpoint_says_what_to_do(config: dict[str, Any], mend: str, tmp_path: Path) -> None:
    words, halves = torch.zeros(16, 16, dtype=torch.int32), torch.ones(16, 16, dtype=torch.float16)
    parts = {"qweight": words, "qzeros": words.clone(), "scales": halves, "g_idx": words.clone()}
    save_checkpoint({f"q_proj.{name}": tensor for name, tensor in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path).ensure_weights()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}")
    assert ": quantised with gptq ('q_proj.qweight' beside " in message
    assert "scales and zero points by group, not the weights" in message
    assert mend in message
    assert message.endswith("dequantise it with gptqmodel and save it as safetensors")


@pytest.mark.parametrize(
    "settings",
    [[], "gptq", 4, {"quant_method": ["gptq"]}, {"quant_method": None}, {"quant_method": ""}, {"load_in_4bit": "yes"}],
)
def test_malformed_settings_state_nothing(settings: Any) -> None:
    assert quantization_of(layer(weight="I8"), {"quantization_config": settings}) is None


def test_hostile_names_stay_one_short_line() -> None:
    config = {"quantization_config": {"quant_method": "x\x1b[2J\n" * 10_000}}
    found = quantization_of(layer(**{"weight" + "y" * 10_000: "I8"}), config)
    assert found is not None
    assert found.reason.isprintable()
    assert len(found.reason) < 1000


@pytest.mark.skipif(not REAL, reason="WEIGHTSPACE_DATA names no folder of real checkpoints")
def test_no_real_checkpoint_is_taken_for_a_quantised_one() -> None:
    def weights() -> Iterator[Path]:
        yield from sorted(Path(REAL or "").rglob("*.safetensors"))

    for path in weights():
        checkpoint = open_checkpoint(path)
        assert quantization_of(checkpoint.specs, checkpoint.config) is None, path
