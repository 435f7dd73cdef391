from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.schema import Architecture, LayerSpec, TensorSpec
from weightspace.tokenizers import ChannelTokenizer, DenseTokenizer


def layers_of(shapes: list[tuple[int, ...]]) -> Architecture:
    """A layer with a bias for each shape of two axes or more, else a layer of two vectors."""
    layers = []
    for number, shape in enumerate(shapes):
        other = shape[:1] if len(shape) > 1 else shape
        tensors = (TensorSpec(f"{number}.weight", shape, "F32"), TensorSpec(f"{number}.bias", other, "F32"))
        layers.append(LayerSpec(str(number), "other", tensors, "channels" if len(shape) > 1 else "vectors"))
    return Architecture(tuple(layers))


def reference(
    model: dict[str, torch.Tensor], architecture: Architecture, size: int
) -> tuple[list[list[float]], list[list[bool]], list[list[int]]]:
    """Builds the tokens of one model entry by entry, as the definition reads."""
    tokens, mask, positions = [], [], []
    for number, layer in enumerate(architecture.layers):
        weight, bias = (model[spec.name] for spec in layer.tensors)
        if layer.layout == "vectors":
            rows = [weight.flatten().tolist(), bias.flatten().tolist()]
        else:
            rows = [[*weight[channel].flatten().tolist(), float(bias[channel])] for channel in range(len(weight))]
        entries = [(channel, entry) for channel, row in enumerate(rows) for entry in row]
        for start in range(0, len(entries), size):
            piece = entries[start : start + size]
            padding = size - len(piece)
            positions.append([len(tokens), number, piece[0][0]])
            tokens.append([entry for _, entry in piece] + [0.0] * padding)
            mask.append([True] * len(piece) + [False] * padding)
    return tokens, mask, positions


def test_rows_are_laid_end_to_end() -> None:
    architecture = layers_of([(3, 2), (2,)])
    model = {
        "0.weight": torch.tensor([[1.0, 2], [4, 5], [7, 8]]),
        "0.bias": torch.tensor([3.0, 6, 9]),
        "1.weight": torch.tensor([10.0, 11]),
        "1.bias": torch.tensor([12.0, 13]),
    }
    tokens = DenseTokenizer(4).tokenize(model, architecture)
    assert tokens.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 0, 0], [10, 11, 12, 13]]
    assert tokens.positions.tolist() == [[0, 0, 0], [1, 0, 1], [2, 0, 2], [3, 1, 0]]
    assert tokens.mask.all(dim=1).tolist() == [True, True, False, True]


@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=4).map(tuple), min_size=1, max_size=5),
    size=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_equals_the_plain_loop(shapes: list[tuple[int, ...]], size: int, seed: int) -> None:
    architecture = layers_of(shapes)
    generator = torch.Generator().manual_seed(seed)
    model = {spec.name: torch.randn(spec.shape, generator=generator) for spec in architecture.tensors}
    found = DenseTokenizer(size).tokenize(model, architecture)
    tokens, mask, positions = reference(model, architecture, size)
    assert found.tokens.tolist() == tokens
    assert found.mask.tolist() == mask
    assert found.positions.tolist() == positions


@given(
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=4).map(tuple), min_size=1, max_size=5),
    size=st.integers(1, 40),
)
@settings(deadline=None)
def test_only_the_last_token_of_a_layer_is_padded(shapes: list[tuple[int, ...]], size: int) -> None:
    architecture = layers_of(shapes)
    tokenizer = DenseTokenizer(size)
    layout = tokenizer.layout(architecture)
    for number, layer in enumerate(architecture.layers):
        mask = layout.mask[layout.positions[:, 1] == number]
        assert len(mask) == -(-layer.numel // size)
        assert mask[:-1].all()
    assert tokenizer.token_count(architecture) <= ChannelTokenizer(size).token_count(architecture)
