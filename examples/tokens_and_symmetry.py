"""What tokens are: opens a checkpoint, cuts it into tokens and back, and reorders its neurons.

    python examples/tokens_and_symmetry.py

Reordering the hidden neurons of a network changes every weight matrix and not the function. The library finds these
symmetries in the names and shapes of a file, and its encoders give both files the same embedding.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from weightspace import (
    WeightAutoencoderConfig,
    WeightAutoencoderModel,
    WeightFeatureExtractor,
    get_tokenizer,
    open_checkpoint,
    save_checkpoint,
)
from weightspace.networks.flat import flatten, unflatten
from weightspace.networks.permutation import permute, random_permutations


def main() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 4 * 4, 10)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        save_checkpoint(network.state_dict(), path)
        checkpoint = open_checkpoint(path)
        tensors = checkpoint.tensors()

    architecture = checkpoint.architecture
    for layer in architecture.layers:
        print(f"{layer.name}: {layer.kind}, {layer.rows} rows of {layer.width}")
    for group in architecture.groups:
        print(f"{group.size} channels move together on", ", ".join(f"{a.tensor} axis {a.axis}" for a in group.axes))

    # Tokens and back, bit for bit.
    tokenizer = get_tokenizer("channel", token_size=32)
    tokens = tokenizer.tokenize(tensors, architecture)
    restored = tokenizer.detokenize(tokens)
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())
    print(f"{tuple(tokens.tokens.shape)} tokens, {int(tokens.mask.sum())} weights in them, restored bit for bit")

    # Other weights, the same function.
    flat = flatten(tensors, architecture).unsqueeze(0)
    permutations = random_permutations(architecture, 1, torch.Generator().manual_seed(1))
    permuted = permute(flat, permutations, architecture)
    images = torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        before = network(images)
        network.load_state_dict({name: value[0] for name, value in unflatten(permuted, architecture).items()})
        after = network(images)
    moved = (permuted != flat).float().mean()
    print(f"{moved:.0%} of the entries moved, outputs differ by {(before - after).abs().max():.1e}")
    assert torch.allclose(before, after, atol=1e-5)

    # Embeddings pool over the tokens of a layer without regard to their order; here by an encoder with random weights.
    config = WeightAutoencoderConfig(token_size=32, hidden_size=32, intermediate_size=64)
    encoder = WeightAutoencoderModel(config).eval()
    inputs = WeightFeatureExtractor("channel", 32).batch(torch.cat([flat, permuted]), architecture)
    with torch.no_grad():
        one, other = encoder.get_weight_features(**inputs).pooler_output
    print(f"embeddings of {len(one)} numbers, cosine similarity {torch.cosine_similarity(one, other, dim=0):.6f}")


if __name__ == "__main__":
    main()
