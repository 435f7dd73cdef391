from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.schema import Architecture, LayerSpec, TensorSpec
from weightspace.tokenizers import ChannelTokenizer


def channels(name: str, *shape: int, bias: bool = True) -> LayerSpec:
    tensors = (TensorSpec(f"{name}.weight", shape, "F32"), *([TensorSpec(f"{name}.bias", shape[:1], "F32")] * bias))
    return LayerSpec(name, "conv" if len(shape) > 2 else "linear", tensors, "channels")


def vectors(name: str, *tensors: TensorSpec) -> LayerSpec:
    return LayerSpec(name, "norm", tensors, "vectors")


def reference(
    model: dict[str, torch.Tensor], architecture: Architecture, size: int
) -> tuple[list[list[float]], list[list[bool]], list[list[int]]]:
    """Builds the tokens of one model row by row, as the definition reads."""
    tokens, mask, positions = [], [], []
    for number, layer in enumerate(architecture.layers):
        tensors = [model[spec.name] for spec in layer.tensors]
        if layer.layout == "vectors":
            rows = [tensor.flatten().tolist() for tensor in tensors]
        else:
            rows = [[*chain.from_iterable(t[c].flatten().tolist() for t in tensors)] for c in range(len(tensors[0]))]
        for channel, row in enumerate(rows):
            for start in range(0, len(row), size):
                piece = row[start : start + size]
                padding = size - len(piece)
                positions.append([len(tokens), number, channel])
                tokens.append(piece + [0.0] * padding)
                mask.append([True] * len(piece) + [False] * padding)
    return tokens, mask, positions


def test_rows_are_cut_padded_and_numbered() -> None:
    architecture = Architecture((channels("a", 2, 3), vectors("n", TensorSpec("n.weight", (2,), "F32"))))
    model = {
        "a.weight": torch.tensor([[1.0, 2, 3], [4, 5, 6]]),
        "a.bias": torch.tensor([7.0, 8]),
        "n.weight": torch.tensor([9.0, 10]),
    }
    tokens = ChannelTokenizer(3).tokenize(model, architecture)
    assert tokens.tokens.tolist() == [[1, 2, 3], [7, 0, 0], [4, 5, 6], [8, 0, 0], [9, 10, 0]]
    assert tokens.positions.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 1], [3, 0, 1], [4, 1, 0]]
    assert tokens.mask.tolist() == [[True] * 3, [True, False, False]] * 2 + [[True, True, False]]


@given(
    shapes=st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple), min_size=1, max_size=4),
    bias=st.booleans(),
    width=st.integers(1, 9),
    size=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_equals_the_plain_loop(shapes: list[tuple[int, ...]], bias: bool, width: int, size: int, seed: int) -> None:
    norm = vectors("norm", TensorSpec("norm.weight", (width,), "F32"), TensorSpec("norm.running_mean", (width,), "F32"))
    scalar = vectors("gamma", TensorSpec("gamma", (), "F32"))
    layers = [channels(str(number), *shape, bias=bias) for number, shape in enumerate(shapes)]
    architecture = Architecture((*layers[:1], norm, scalar, *layers[1:]))
    generator = torch.Generator().manual_seed(seed)
    model = {spec.name: torch.randn(spec.shape, generator=generator) for spec in architecture.tensors}
    found = ChannelTokenizer(size).tokenize(model, architecture)
    tokens, mask, positions = reference(model, architecture, size)
    assert found.tokens.tolist() == tokens
    assert found.mask.tolist() == mask
    assert found.positions.tolist() == positions


def test_permuting_channels_permutes_tokens() -> None:
    architecture = Architecture((channels("a", 4, 6),))
    generator = torch.Generator().manual_seed(0)
    model = {spec.name: torch.randn(spec.shape, generator=generator) for spec in architecture.tensors}
    order = torch.tensor([2, 0, 3, 1])
    tokenizer = ChannelTokenizer(4)
    before = tokenizer.tokenize(model, architecture).tokens.view(4, 2, 4)
    after = tokenizer.tokenize({name: tensor[order] for name, tensor in model.items()}, architecture).tokens
    assert torch.equal(after.view(4, 2, 4), before[order])


@pytest.mark.parametrize(("width", "stride"), [(1, 8), (7, 8), (8, 8), (9, 16), (17, 24)])
def test_rows_start_at_whole_tokens(width: int, stride: int) -> None:
    assert ChannelTokenizer(8).row_stride(width) == stride
