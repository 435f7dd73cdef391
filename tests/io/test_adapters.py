from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weightspace.errors import CheckpointError
from weightspace.io.adapter_config import match_patterns
from weightspace.io.adapters import Adapter, find_pairs, is_untrained, read_adapter
from weightspace.io.checkpoint import Checkpoint, open_checkpoint, open_checkpoint_bytes
from weightspace.io.writing import checkpoint_bytes
from weightspace.schema import TensorSpec

REAL = os.environ.get("WEIGHTSPACE_DATA")
ROOT = "base_model.model."
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q", "v"]}


def specs(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> list[TensorSpec]:
    return [TensorSpec(name, shape, dtype) for name, shape in shapes.items()]


def peft(*modules: str, rank: int = 2) -> dict[str, tuple[int, ...]]:
    return {
        f"{ROOT}{module}.lora_{factor}.weight": shape
        for module in modules
        for factor, shape in (("A", (rank, 6)), ("B", (5, rank)))
    }


def opened(shapes: dict[str, tuple[int, ...]], **values: Tensor) -> Checkpoint:
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()} | values
    return open_checkpoint_bytes(checkpoint_bytes(tensors), where="here")


def adapter(shapes: dict[str, tuple[int, ...]], **changes: Any) -> Adapter:
    return read_adapter(opened(shapes), CONFIG | changes)


@pytest.mark.parametrize(
    ("a", "b", "module", "naming", "component"),
    [
        ("base_model.model.h.0.q.lora_A.weight", "base_model.model.h.0.q.lora_B.weight", "h.0.q", "peft", ""),
        # The component of a pipeline is only looked for where PEFT's own root is missing.
        (
            "base_model.model.transformer.h.q.lora_A.weight",
            "base_model.model.transformer.h.q.lora_B.weight",
            "transformer.h.q",
            "peft",
            "",
        ),
        ("q.lora_A.default.weight", "q.lora_B.default.weight", "q", "peft", ""),
        ("unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight", "unet.mid.to_q", "diffusers", "unet"),
        (
            "text_encoder_2.q.lora_linear_layer.down.weight",
            "text_encoder_2.q.lora_linear_layer.up.weight",
            "text_encoder_2.q",
            "diffusers",
            "text_encoder_2",
        ),
        ("mid.to_q.lora.down.weight", "mid.to_q.lora.up.weight", "mid.to_q", "diffusers", ""),
        (
            "mid.attn1.processor.to_out_lora.down.weight",
            "mid.attn1.processor.to_out_lora.up.weight",
            "mid.attn1.to_out.0",
            "diffusers",
            "",
        ),
        (
            "mid.attn1.processor.add_k_proj_lora.down.weight",
            "mid.attn1.processor.add_k_proj_lora.up.weight",
            "mid.attn1.add_k_proj",
            "diffusers",
            "",
        ),
        (
            "lora_te1_text_q_proj.lora_down.weight",
            "lora_te1_text_q_proj.lora_up.weight",
            "lora_te1_text_q_proj",
            "kohya",
            "te1",
        ),
        ("unet:11:down", "unet:11:up", "unet:11", "cloneofsimo", "unet"),
    ],
)
def test_pairs_are_found_under_every_naming(a: str, b: str, module: str, naming: str, component: str) -> None:
    (pair,), problems = find_pairs(specs({b: (5, 2), a: (2, 6), "other.weight": (3, 3)}))
    assert (pair.module, pair.naming, pair.component, pair.kind) == (module, naming, component, "linear")
    assert (pair.a.name, pair.b.name, pair.rank, pair.groups) == (a, b, 2, 1)
    assert problems == {}


def test_kinds_groups_and_what_belongs_to_a_pair() -> None:
    pairs, problems = find_pairs(
        specs(
            {
                "conv.lora_A.weight": (4, 3, 3, 3),
                "conv.lora_B.weight": (6, 2, 1, 1),
                "embed.lora_embedding_A": (2, 30),
                "embed.lora_embedding_B": (8, 2),
                "q.lora_A.weight": (2, 6),
                "q.lora_B.weight": (5, 2),
                "q.lora_B.bias": (5,),
                "q.lora_magnitude_vector": (5,),
                "q.alpha": (),
            }
        )
    )
    conv, embed, q = pairs
    assert (conv.kind, conv.rank, conv.groups) == ("conv", 4, 2)
    assert (embed.kind, embed.rank, embed.groups) == ("embedding", 2, 1)
    assert (q.bias, q.magnitude, q.alpha) == ("q.lora_B.bias", "q.lora_magnitude_vector", "q.alpha")
    assert len(q.names) == 5 and not problems


@pytest.mark.parametrize(
    ("shapes", "dtype", "problem"),
    [
        ({"m.lora_A.weight": (2, 6)}, "F32", "has no B"),
        ({"m.lora_up.weight": (5, 2)}, "F32", "has no A"),
        ({"m.lora_A.weight": (2, 6), "m.lora_B.weight": (5, 3)}, "F32", r"A \(2, 6\) and B \(5, 3\), which have no"),
        ({"m.lora_A.weight": (4, 6), "m.lora_B.weight": (6, 2)}, "F32", "which have no product"),
        ({"m.lora_A.weight": (4, 6), "m.lora_B.weight": (5, 2, 1)}, "F32", "which have no product"),
        ({"m.lora_A.weight": (2, 6, 3, 3), "m.lora_B.weight": (5, 2, 3, 3)}, "F32", "which have no product"),
        ({"m.lora_A.weight": (2, 6), "m.lora_B.weight": (5, 2)}, "I8", r"a factor of shape \(2, 6\) and dtype I8"),
        ({"m.lora_A.weight": (0, 6), "m.lora_B.weight": (5, 0)}, "F32", r"a factor of shape \(0, 6\)"),
        ({"m.lora_A.weight": (12,), "m.lora_B.weight": (5, 2)}, "F32", r"a factor of shape \(12,\)"),
        (
            {"m.lora_A.weight": (2, 6), "m.lora_B.weight": (5, 2), "m.lora_E": (2, 1)},
            "F32",
            "has 'm.lora_E' beside its factors: its update is not B A",
        ),
        (
            {"m.lora_down.weight": (2, 6), "m.lora_up.weight": (5, 2), "m.lora_mid.weight": (2, 2)},
            "F32",
            "has 'm.lora_mid.weight' beside",
        ),
        ({"m.lora_A.weight": (2, 6), "m.lora_B.weight": (5, 2), "m.lora_down.weight": (2, 6)}, "F32", "two of a kind"),
        (
            {"m.experts.lora_A.weight": (2, 6), "m.experts.lora_B.weight": (5, 2)},
            "F32",
            "several parameters or experts",
        ),
    ],
)
def test_factors_that_are_no_pair_are_named(shapes: dict[str, tuple[int, ...]], dtype: str, problem: str) -> None:
    pairs, problems = find_pairs(specs(shapes, dtype))
    assert pairs == () and len(problems) == 1
    blob = checkpoint_bytes(
        {n: torch.ones(s).to(torch.int8 if dtype == "I8" else torch.float32) for n, s in shapes.items()}
    )
    with pytest.raises(CheckpointError, match=f"here: no pair of LoRA factors: 'm[.exprts]*' .*{problem}"):
        read_adapter(open_checkpoint_bytes(blob, where="here"), None)
    # Beside a pair, they are a finding.
    found = read_adapter(opened(shapes | peft("q")), CONFIG) if dtype == "F32" else None
    assert found is None or (len(found.pairs) == 1 and len(found.mismatches) == 1)


def test_models_without_factors_are_refused() -> None:
    with pytest.raises(
        CheckpointError, match="no pair of LoRA factors: none of its 1 tensors is named as one; read it as"
    ):
        read_adapter(opened({"fc.weight": (3, 2)}), None)


def test_alpha_and_scaling_are_pefts() -> None:
    modules = ("h.0.q", "h.1.q", "h.10.q", "h.0.v")
    found = adapter(peft(*modules), alpha_pattern={r"h\.1.*\.q": 6, "h.0.q": 4, "q": 1})
    assert found.alpha == {"h.0.q": 4, "h.1.q": 6, "h.10.q": 6, "h.0.v": 8}
    assert found.scaling == {"h.0.q": 2, "h.1.q": 3, "h.10.q": 3, "h.0.v": 4}
    assert found.mismatches == () and found.notes == ()
    assert adapter(peft("q"), use_rslora=True).scaling["q"] == pytest.approx(8 / 2**0.5)
    ranks = peft("h.0.q") | peft("h.1.q", rank=4)
    patterned = adapter(ranks, rank_pattern={"^h.1.q": 4}, target_modules="all-linear")
    assert patterned.scaling == {"h.0.q": 4, "h.1.q": 2} and not patterned.mismatches


def test_without_a_config_alpha_is_a_scalar_or_the_rank() -> None:
    shapes = {f"lora_unet_{m}.lora_{p}.weight": s for m in "ab" for p, s in (("down", (4, 6)), ("up", (5, 4)))}
    found = read_adapter(opened(shapes, **{"lora_unet_a.alpha": torch.tensor(1.0)}), None)
    assert found.scaling == {"lora_unet_a": 0.25, "lora_unet_b": 1} and not found.notes and not found.other
    for alpha in (torch.tensor(torch.nan), torch.ones(2), torch.tensor(1j)):
        broken = read_adapter(opened(shapes, **{"lora_unet_a.alpha": alpha}), None)
        assert broken.mismatches == ("'lora_unet_a' has an alpha that is no finite number",)


def test_what_lies_beside_the_pairs() -> None:
    shapes = peft("q") | {
        f"{ROOT}head.out.weight": (3, 5),
        f"{ROOT}q.base_layer.bias": (5,),
        f"{ROOT}ahead.weight": (1,),
    }
    found = adapter(
        shapes, modules_to_save=["head", "score"], base_model_name_or_path="org/base", target_modules=["q", "k"]
    )
    assert found.saved == (f"{ROOT}head.out.weight",)
    assert set(found.other) == {f"{ROOT}q.base_layer.bias", f"{ROOT}ahead.weight"}
    assert found.base_model == "org/base"
    assert found.mismatches == () and found.notes == (
        "target_modules names 'k', but it has no factors",
        "modules_to_save names 'score', but it has no tensors",
    )
    assert adapter(peft("q"), base_model_name_or_path="").base_model is None
    odd = adapter(peft("q"), base_model_name_or_path="a\x1b[31m")
    assert (
        odd.base_model is None
        and odd.notes[-1] == r"the base model's name 'a\x1b[31m' is left out: it is not printable"
    )


@pytest.mark.parametrize(
    ("shapes", "changes", "mismatch"),
    [
        (peft("a.q", "b.q"), {"r": 3}, "'a.q' (and 1 more) has rank 2 where the config says 3"),
        (peft("q"), {"rank_pattern": {"q": 5}}, "'q' has rank 2 where the config says 5"),
        (peft("q", "k"), {}, "'k' is not among target_modules"),
        (peft("q"), {"use_dora": True}, "'q' has no magnitude where use_dora is True"),
        (peft("q") | {f"{ROOT}q.lora_magnitude_vector": (5,)}, {}, "'q' has a magnitude where use_dora is False"),
        (peft("q"), {"lora_bias": True}, "'q' has no bias where lora_bias is True"),
        (peft("q") | {f"{ROOT}q.lora_B.bias": (5,)}, {}, "'q' has a bias where lora_bias is False"),
        (peft("q") | {f"{ROOT}v.lora_A.weight": (2, 6)}, {}, "'v' has no B"),
        (peft("q"), {"alpha_pattern": {"(a+)+": 1}}, "'(a+)+' is a pattern that could take too long to evaluate"),
    ],
)
def test_what_config_and_tensors_disagree_on(
    shapes: dict[str, tuple[int, ...]], changes: dict[str, Any], mismatch: str
) -> None:
    assert adapter(shapes, **changes).mismatches == (mismatch,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "LOHA"},
            "here: adapter_config.json: peft_type is 'LOHA'; only LORA adapters have factors B and A",
        ),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora makes the factors block-diagonal"),
        ({"r": 0}, "r is 0; it must be a whole number of 1 or more"),
        ({"r": True}, "r is True"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; it must be a finite number"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern is {'q': 0}; it must map module names to numbers"),
        ({"alpha_pattern": ["q"]}, r"alpha_pattern is \['q'\]"),
        ({"target_modules": [1]}, r"target_modules is \[1\]; it must be a list of module names"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head'"),
        ({"modules_to_save": ["head"] * 101}, "modules_to_save names 101 modules, above the limit of 100"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        adapter(peft("q"), **changes)


def test_patterns_are_matched_as_by_peft_and_never_for_long() -> None:
    modules = [f"model.layers.{number}.self_attn.q_proj" for number in range(12)]
    patterns = {
        "layers.1.self_attn.q_proj": 1,
        r"model\.layers\.[23]\.self_attn\.(?:q_proj|k_proj)": 2,
        r"^layers.*": 3,
        r".*layers\.\d+\.self_attn.*": 4,
    }
    found, refused = match_patterns({text: float(value) for text, value in patterns.items()}, modules)
    assert [found[module] for module in modules] == [4, 1, 2, 2, *[4] * 8] and not refused

    hostile = [
        "a" * 2000 + "*",
        "(a|aa)+b",
        "(.*)*b",
        ".*" * 30 + "b",
        "(a|a)" * 60 + "b",
        "(?=a)b",
        "a{9999}",
        "[",
        "(a",
    ]
    started = time.process_time()
    found, refused = match_patterns(dict.fromkeys(hostile, 1.0), ["a" * 500] * 500)
    assert time.process_time() - started < 1
    assert not found and list(refused) == hostile


@pytest.mark.parametrize(("zeros", "untrained"), [("B", True), ("A", True), ("", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_adapters_that_add_nothing_are_flagged(zeros: str, untrained: bool, dtype: torch.dtype) -> None:
    tensors = {name: torch.ones(shape).to(dtype) for name, shape in peft("q", "v").items()}
    for module in ("q", "v") if zeros else ():
        name = f"{ROOT}{module}.lora_{zeros}.weight"
        tensors[name] = torch.zeros_like(tensors[name], dtype=torch.float32).to(dtype)
    checkpoint = open_checkpoint_bytes(checkpoint_bytes(tensors), where="here")
    found = read_adapter(checkpoint, CONFIG)
    assert is_untrained(found, checkpoint) is untrained
    assert is_untrained(found, tensors) is untrained


def test_one_module_with_an_update_is_training_and_only_what_is_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = peft("q", "k", "v")
    checkpoint = opened(shapes, **{f"{ROOT}q.lora_B.weight": torch.zeros(5, 2)})
    read: list[str] = []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: (read.append(name), tensor(self, name))[1])
    found = read_adapter(checkpoint, CONFIG)
    assert not read
    assert not is_untrained(found, checkpoint)
    assert len(read) <= 3


@pytest.mark.skipif(REAL is None, reason="WEIGHTSPACE_DATA names no folder of real checkpoints")
def test_real_adapters() -> None:
    root = Path(str(REAL)) / "lora"
    namings = set()
    for record in json.loads((root / "manifest.json").read_text())["items"]:
        file, labels = root / record["file"], record["labels"]
        checkpoint = open_checkpoint(file, allow_pickle=file.suffix == ".bin")
        found = read_adapter(checkpoint, checkpoint.adapter_config)
        namings |= set(found.namings)
        assert found.mismatches == () and found.base_model == labels["base_model"]
        assert not is_untrained(found, checkpoint)
        if labels["r"]:
            assert 2 * len(found.pairs) == record["n_lora_tensors"]
            assert {pair.rank // pair.groups for pair in found.pairs} == {labels["r"]}
            assert set(found.scaling.values()) == {labels["lora_alpha"] / labels["r"]}
            assert bool(found.saved) == bool(labels["modules_to_save"])
        else:
            assert sum(len(pair.names) for pair in found.pairs) + len(found.other) == record["n_tensors"]
            assert {name for name in found.other if not name.startswith("<s")} == set()
    assert namings == {"peft", "diffusers", "cloneofsimo"}


def stated(naming: str, metadata: dict[str, str], rank: int = 2) -> Adapter:
    """An adapter of two networks whose alpha only the metadata can tell."""
    down, up = ("lora_A", "lora_B") if "." in naming else ("lora_down", "lora_up")
    shapes = {f"{naming}{part}q.{down}.weight": (rank, 6) for part in "ab"}
    shapes |= {f"{naming}{part}q.{up}.weight": (5, rank) for part in "ab"}
    blob = checkpoint_bytes({name: torch.ones(shape) for name, shape in shapes.items()}, metadata)
    return read_adapter(open_checkpoint_bytes(blob, where="here"), None)


@pytest.mark.parametrize(
    ("naming", "metadata", "scaling"),
    [
        ("lora_unet_", {"ss_network_alpha": "8", "ss_network_dim": "2"}, 4),
        ("lora_unet_", {"ss_network_alpha": "1e0", "ss_network_dim": "Dynamic"}, 0.5),
        ("x.", {"lora_alpha": "3.5"}, 1.75),
        ("x.", {"network_alpha": "2", "rank": "2"}, 1),
        ("text_encoder_2.", {"text_encoder_2.lora_alpha": "6", "text_encoder.lora_alpha": "1"}, 3),
        ("transformer_2.", {"meta": json.dumps({"transformer_2.r": 2, "transformer_2.lora_alpha": 4})}, 2),
        (
            "unet.",
            {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.use_rslora": True})},
            2**1.5,
        ),
        ("unet.", {"c": json.dumps({"r": 9, "lora_alpha": 4, "rank_pattern": {"^aq": 2, "bq": 2}})}, 2),
        ("x.", {"lora_alpha": "8", "lora_adapter_metadata": "{"}, 4),
    ],
)
def test_alpha_stated_in_metadata_is_used(naming: str, metadata: dict[str, str], scaling: int | float) -> None:
    found = stated(naming, metadata)
    assert list(found.scaling.values()) == pytest.approx([scaling, scaling])
    assert not found.unknown and not found.notes


@pytest.mark.parametrize(
    ("naming", "metadata"),
    [
        ("lora_unet_", {}),
        ("lora_unet_", {"ss_network_alpha": "None"}),
        ("x.", {"lora_alpha": "1e999"}),
        ("x.", {"lora_alpha": "nan"}),
        ("x.", {"lora_alpha": "9" * 5000}),
        ("x.", {"alpha": "", "rank": "2"}),
        ("x.", {"lora_alpha": "8", "rank": "4"}),  # the tensors have another rank: whose alpha is it?
        ("unet.", {"text_encoder.lora_alpha": "8"}),
        ("unet.", {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": None})}),
        ("unet.", {"lora_adapter_metadata": '{"lora_alpha": ' + "[" * 10**5}),
    ],
)
def test_alpha_that_nothing_usable_states_is_unknown(naming: str, metadata: dict[str, str]) -> None:
    found = stated(naming, metadata)
    assert set(found.unknown) == {pair.module for pair in found.pairs}
    assert "2 modules: their scaling is unknown" in found.notes[-1]


def test_scalars_go_before_metadata_and_a_config_before_both() -> None:
    shapes = {"lora_unet_a.lora_down.weight": (4, 6), "lora_unet_a.lora_up.weight": (5, 4)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()} | {"lora_unet_a.alpha": torch.tensor(2.0)}
    blob = checkpoint_bytes(tensors, {"ss_network_alpha": "16"})
    assert list(read_adapter(open_checkpoint_bytes(blob, where="here"), None).scaling.values()) == [0.5]
    blob = checkpoint_bytes({name: torch.ones(shape) for name, shape in peft("q").items()}, {"lora_alpha": "16"})
    assert read_adapter(open_checkpoint_bytes(blob, where="here"), CONFIG | {"lora_alpha": 6}).scaling == {"q": 3}


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf")])
def test_numbers_too_large_for_a_float_are_refused(value: int | float) -> None:
    with pytest.raises(CheckpointError, match=r"lora_alpha is .*; it must be a finite number") as caught:
        adapter(peft("q"), lora_alpha=value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_wrappers_are_no_part_of_the_module_and_peft_would_not_load_them(prefix: str) -> None:
    found = adapter({prefix + name: shape for name, shape in peft("h.q").items()})
    assert [pair.module for pair in found.pairs] == ["h.q"]
    assert f"is stored as '{prefix}base_model.model.h.q.lora_A.weight', a name that PEFT does not look for" in str(
        found.mismatches
    )
    inner = adapter({name.replace("h.q", "h._orig_mod.q"): shape for name, shape in peft("h.q").items()})
    assert [pair.module for pair in inner.pairs] == ["h.q"] and "PEFT does not look for" in str(inner.mismatches)
