from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightspace.dtypes import dtype_name
from weightspace.errors import TokenError
from weightspace.io.adapters import find_pairs
from weightspace.io.checkpoint import Checkpoint, open_checkpoint, open_checkpoint_bytes
from weightspace.io.writing import checkpoint_bytes
from weightspace.networks.flat import flatten
from weightspace.networks.infer import infer_architecture
from weightspace.schema import Architecture, TensorSpec
from weightspace.tokenizers import ChannelTokenizer, LoraTokenizer
from weightspace.tokenizers.links import token_links
from weightspace.tokenizers.lora import canonical_factors

REAL = os.environ.get("WEIGHTSPACE_DATA")
Q, V = "base_model.model.attn.q", "base_model.model.attn.v"


def architecture_of(tensors: dict[str, Tensor]) -> Architecture:
    return infer_architecture(TensorSpec(n, tuple(t.shape), dtype_name(t.dtype)) for n, t in tensors.items())


def adapter(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two modules of 12 inputs, 9 outputs and rank 3, with a whole module, a magnitude and a bias beside them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"{Q}.lora_A.weight": (3, 12),
        f"{Q}.lora_B.weight": (9, 3),
        f"{Q}.lora_B.bias": (9,),
        f"{Q}.lora_magnitude_vector": (9,),
        f"{V}.lora_A.weight": (3, 12),
        f"{V}.lora_B.weight": (9, 3),
        "base_model.model.head.weight": (5, 9),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def separated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names with updates whose singular values are far apart: no rounding can swap or turn them."""
    changed = dict(tensors)
    for module in (Q, V):
        a, b = (tensors[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
        u, _, vt = torch.linalg.svd(b @ a, full_matrices=False)
        scale = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64).sqrt()
        changed[f"{module}.lora_A.weight"] = (scale[:, None] * vt[:3]).to(
            a_dtype := tensors[f"{Q}.lora_A.weight"].dtype
        )
        changed[f"{module}.lora_B.weight"] = (u[:, :3] * scale).to(a_dtype)
    return changed


def mixed(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """``(B G, inv(G) A)`` with a random G of condition 4, rounded to the stored dtype."""
    generator = torch.Generator().manual_seed(seed)
    changed = dict(tensors)
    for module in (Q, V):
        a, b = (tensors[f"{module}.lora_{factor}.weight"] for factor in "AB")
        turns = [torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0] for _ in range(2)]
        mix = turns[0] @ torch.diag(torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)) @ turns[1]
        changed[f"{module}.lora_A.weight"] = (torch.linalg.inv(mix) @ a.double()).to(a.dtype)
        changed[f"{module}.lora_B.weight"] = (b.double() @ mix).to(b.dtype)
    return changed


def updates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A of every module, in float64; by groups of outputs where there are several."""
    found = {}
    pairs, _ = find_pairs(TensorSpec(n, tuple(t.shape), dtype_name(t.dtype)) for n, t in tensors.items())
    for pair in pairs:
        a = tensors[pair.a.name].double().flatten(1).unflatten(0, (pair.groups, -1))
        b = tensors[pair.b.name].double().flatten(1).unflatten(0, (pair.groups, -1))
        found[pair.module] = b @ a
    return found


def assert_same_updates(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    one, other = updates(found), updates(expected)
    assert one.keys() == other.keys()
    for module, update in other.items():
        assert (one[module] - update).norm() <= tolerance * update.norm()


def test_rows_are_components_and_modules_are_layers() -> None:
    tensors = {
        "m.lora_A.weight": torch.tensor([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]]),
        "m.lora_B.weight": torch.tensor([[0.0, 2.0], [3.0, 0.0]]),
        "head.weight": torch.tensor([[5.0, 6.0], [7.0, 8.0]]),
    }
    tokens = LoraTokenizer(3).tokenize(tensors, architecture_of(tensors))
    # B A = 9 e_2 e_2^T + 4 e_1 e_1^T: components of size 3 and 2 on either side.
    expected = [[5, 6, 0], [7, 8, 0], [0, 3, 0], [0, 3, 0], [2, 0, 0], [2, 0, 0]]
    torch.testing.assert_close(tokens.tokens, torch.tensor(expected, dtype=torch.float32))
    assert tokens.mask[3].tolist() == [True, True, False]
    assert tokens.positions.tolist() == [[0, 0, 0], [1, 0, 1], [2, 1, 0], [3, 1, 0], [4, 1, 1], [5, 1, 1]]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2), ("float16", 4e-3)])
@pytest.mark.parametrize("seed", range(10))
def test_equivalent_factors_give_equal_tokens(dtype: str, tolerance: float, seed: int) -> None:
    tensors = separated(adapter(seed, getattr(torch, dtype)))
    other = mixed(tensors, seed + 100)
    architecture, tokenizer = architecture_of(tensors), LoraTokenizer(8)
    assert (other[f"{Q}.lora_A.weight"] - tensors[f"{Q}.lora_A.weight"]).abs().max() > 0.1
    expected, found = (tokenizer.tokenize(model, architecture).tokens for model in (tensors, other))
    assert (found - expected).abs().max() < tolerance
    channel = ChannelTokenizer(8)
    apart = channel.tokenize(tensors, architecture).tokens - channel.tokenize(other, architecture).tokens
    assert apart.abs().max() > 0.1


def test_another_update_gives_other_tokens() -> None:
    tensors = separated(adapter())
    other = tensors | {f"{Q}.lora_B.weight": -tensors[f"{Q}.lora_B.weight"]}
    architecture, tokenizer = architecture_of(tensors), LoraTokenizer(8)
    difference = tokenizer.tokenize(tensors, architecture).tokens - tokenizer.tokenize(other, architecture).tokens
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
def test_updates_come_back_and_all_else_bit_for_bit(dtype: torch.dtype, tolerance: float) -> None:
    tensors = adapter(dtype=dtype)
    architecture, tokenizer = architecture_of(tensors), LoraTokenizer(7)
    restored = tokenizer.detokenize(tokenizer.tokenize(tensors, architecture))
    assert {n: (t.shape, t.dtype) for n, t in restored.items()} == {n: (t.shape, t.dtype) for n, t in tensors.items()}
    assert_same_updates(restored, tensors, tolerance)
    beside = [name for name in tensors if "lora_A" not in name and not name.endswith("lora_B.weight")]
    assert len(beside) == 3 and all(torch.equal(restored[name], tensors[name]) for name in beside)


def test_tokens_of_what_came_back_are_the_same() -> None:
    tensors = separated(adapter())
    architecture, tokenizer = architecture_of(tensors), LoraTokenizer(7)
    tokens = tokenizer.tokenize(tensors, architecture)
    again = tokenizer.tokenize(tokenizer.detokenize(tokens), architecture)
    torch.testing.assert_close(again.tokens, tokens.tokens)


@given(
    rank=st.integers(1, 6),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    zero_rows=st.integers(0, 6),
    seed=st.integers(0, 2**31),
)
def test_canonical_factors_have_the_same_product(
    rank: int, inputs: int, outputs: int, zero_rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, rank, inputs, generator=generator), torch.randn(2, outputs, rank, generator=generator)
    a[:, :zero_rows] = 0
    rows, columns = canonical_factors(a, b)
    assert rows.shape == a.shape and columns.shape == b.shape
    torch.testing.assert_close(columns.double() @ rows.double(), b.double() @ a.double(), rtol=1e-5, atol=1e-5)
    # Each component is balanced, components are orthogonal and sorted, and those that are not used are zero.
    gram = rows.double() @ rows.double().mT
    torch.testing.assert_close(gram, columns.double().mT @ columns.double(), rtol=1e-4, atol=1e-5)
    sizes = gram.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(gram, torch.diag_embed(sizes), rtol=0, atol=1e-5)
    assert (sizes.diff(dim=1) < 1e-5).all()
    used = min(rank - min(zero_rows, rank), inputs, outputs)
    assert not rows[:, used:].any() and not columns[:, :, used:].any()
    assert (rows.double().pow(3).sum(2) + columns.double().pow(3).sum(1) > -1e-6).all()


def test_untrained_modules_are_rows_of_zeros() -> None:
    tensors = adapter()
    tensors[f"{Q}.lora_B.weight"].zero_()
    architecture, tokenizer = architecture_of(tensors), LoraTokenizer(64)
    tokens = tokenizer.tokenize(tensors, architecture)
    module = tokens.tokens[tokens.positions[:, 1] == 0]
    assert module.shape == (3, 64) and not module.any()
    assert not updates(tokenizer.detokenize(tokens))["attn.q"].any()


def test_convolutions_embeddings_and_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "conv.lora_A.weight": (4, 3, 3, 3),
        "conv.lora_B.weight": (6, 4, 1, 1),
        "grouped.lora_A.weight": (4, 3, 3, 3),
        "grouped.lora_B.weight": (6, 2, 1, 1),
        "merged.lora_A.weight": (4, 12),
        "merged.lora_B.weight": (8, 2, 1),
        "embed.lora_embedding_A": (2, 20),
        "embed.lora_embedding_B": (7, 2),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    architecture, tokenizer = architecture_of(tensors), LoraTokenizer(16)
    tokens = tokenizer.tokenize(tensors, architecture)
    assert int(tokens.mask.sum()) == architecture.numel
    assert tokens.positions[:, 1].unique().tolist() == [0, 1, 2, 3]
    restored = tokenizer.detokenize(tokens)
    assert_same_updates(restored, tensors, 1e-6)
    assert {module: update.shape for module, update in updates(restored).items()} == {
        "conv": (1, 6, 27),
        "grouped": (2, 3, 27),
        "merged": (2, 4, 12),
        "embed": (1, 7, 20),
    }
    assert not torch.allclose(restored["grouped.lora_A.weight"], tensors["grouped.lora_A.weight"])


def test_batches_equal_their_models_and_carry_gradients_back() -> None:
    models = [adapter(seed) for seed in range(3)]
    architecture, tokenizer = architecture_of(models[0]), LoraTokenizer(5)
    flat = torch.stack([flatten(model, architecture) for model in models])
    tokens = tokenizer.tokenize_batch(flat, architecture)
    assert torch.equal(tokens, torch.stack([tokenizer.tokenize(model, architecture).tokens for model in models]))
    assert tokenizer.tokenize_batch(flat[:0], architecture).shape == (0, *tokens.shape[1:])
    assert tokenizer.detokenize_batch(tokens[:0], architecture).shape == (0, architecture.numel)

    tokens.requires_grad_()
    back = tokenizer.detokenize_batch(tokens, architecture)
    assert torch.equal(back, tokenizer.detokenize_batch(tokens.detach(), architecture))
    numbers = torch.arange(1.0, back.numel() + 1).view(back.shape)
    (back * numbers).sum().backward()
    mask = tokenizer.layout(architecture).mask
    assert tokens.grad is not None and not tokens.grad[:, ~mask].any()
    assert torch.equal(tokens.grad[:, mask].sort().values, numbers.sort().values)


def test_windows_are_stretches_of_all_tokens_and_read_whole_modules() -> None:
    tensors = adapter()
    checkpoint = open_checkpoint_bytes(checkpoint_bytes(tensors), where="here")
    architecture, tokenizer = architecture_of(tensors), LoraTokenizer(4)
    whole = tokenizer.tokenize(tensors, architecture)
    read: list[tuple[str, int, int]] = []

    def entries(stretches: list[tuple[str, int, int]]) -> list[Tensor]:
        read.extend(stretches)
        return checkpoint.entries(stretches)

    for start in range(len(whole.tokens)):
        read.clear()
        window = [(start, min(start + 2, len(whole.tokens)))]
        (found,) = tokenizer.tokenize_windows(entries, architecture, window)
        part = slice(*window[0])
        torch.testing.assert_close(found.tokens, whole.tokens[part])
        assert torch.equal(found.mask, whole.mask[part]) and torch.equal(found.positions, whole.positions[part])
        counts: dict[str, int] = {}
        for name, first, last in read:
            counts[name] = counts.get(name, 0) + last - first
        assert counts == tokenizer.window_entries(architecture, window)
    tensors[f"{Q}.lora_A.weight"][0, 0] = torch.nan
    broken = open_checkpoint_bytes(checkpoint_bytes(tensors), where="here")
    with pytest.raises(TokenError, match=r"attn\.q\.lora_A\.weight: holds NaN or infinite entries; leave this adapter"):
        tokenizer.tokenize_windows(broken.entries, architecture, [(0, len(whole.tokens))])


def test_models_without_factors_have_the_tokens_of_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (6, 9), "0.bias": (6,), "2.weight": (3, 6), "x.lora_A.weight": (2, 3)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    architecture, tokenizer = architecture_of(tensors), LoraTokenizer(4)
    assert not tokenizer.applies_to(architecture) and tokenizer.applies_to(architecture_of(adapter()))
    found, expected = (one.tokenize(tensors, architecture) for one in (tokenizer, ChannelTokenizer(4)))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.mask, expected.mask) and torch.equal(found.positions, expected.positions)
    assert tokenizer.token_count(architecture) == len(expected.tokens)
    assert torch.equal(token_links(tokenizer, architecture), token_links(ChannelTokenizer(4), architecture))
    assert all(torch.equal(value, tensors[name]) for name, value in tokenizer.detokenize(found).items())


@pytest.mark.skipif(REAL is None, reason="WEIGHTSPACE_DATA names no folder of real checkpoints")
def test_real_adapters_return_their_updates() -> None:
    root = Path(str(REAL)) / "lora"
    one_each = {file.relative_to(root).parts[0]: file for file in sorted(root.rglob("*.safetensors"))}
    assert len(one_each) > 3
    for file in one_each.values():
        checkpoint: Checkpoint = open_checkpoint(file)
        architecture = infer_architecture(checkpoint.specs.values(), aliases=checkpoint.aliases)
        assert not architecture.groups
        tensors, tokenizer = checkpoint.tensors(), LoraTokenizer(64)
        restored = tokenizer.detokenize(tokenizer.tokenize(tensors, architecture))
        tolerance = 1e-6 if all(spec.dtype == "F32" for spec in architecture.tensors) else 1e-3
        assert_same_updates(restored, tensors, tolerance)
