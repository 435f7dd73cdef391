from __future__ import annotations

import pytest
import torch

from weightspace.networks.families import CNNConfig, MLPConfig, Network
from weightspace.networks.infer import infer_architecture
from weightspace.networks.permutation import permute, random_permutations
from weightspace.schema import Architecture, TensorSpec
from weightspace.tokenizers import get_tokenizer
from weightspace.tokenizers.links import token_links


def architecture(config: MLPConfig | CNNConfig) -> Architecture:
    module = Network(config)
    specs = [TensorSpec(name, tuple(value.shape), "F32") for name, value in module.state_dict().items()]
    return infer_architecture(specs, config=config.to_dict())


MLP = architecture(MLPConfig((1, 2, 3), 4, (5, 3)))
CNN = architecture(CNNConfig((1, 8, 8), 4, (3, 5), pooling="none"))


def test_each_weight_is_linked_to_the_channel_that_it_reads() -> None:
    links = token_links(get_tokenizer("channel", 8), MLP)
    assert not links[:5].any()  # the first layer reads inputs
    assert torch.equal(links[5:8], torch.tensor([[1, 2, 3, 4, 5, 0, 0, 0]] * 3))
    assert torch.equal(links[8:], torch.tensor([[6, 7, 8, 0, 0, 0, 0, 0]] * 4))


def test_kernels_and_flattened_maps_belong_to_one_channel() -> None:
    links = token_links(get_tokenizer("channel", 28), CNN)
    assert torch.equal(links[3, :27], torch.tensor([1, 2, 3]).repeat_interleave(9))
    assert torch.equal(links[8, :20], torch.tensor([4, 5, 6, 7, 8]).repeat_interleave(4))
    assert not links[3:8, 27].any()  # biases


def test_rows_of_several_tokens_are_named_by_their_first() -> None:
    links = token_links(get_tokenizer("channel", 4), MLP)  # rows of 7, 6 and 4 entries: 2, 2 and 1 token
    assert torch.equal(links[10:12], torch.tensor([[1, 3, 5, 7], [9, 0, 0, 0]]))
    assert torch.equal(links[-1], torch.tensor([11, 13, 15, 0]))


@pytest.mark.parametrize("model", [MLP, CNN])
def test_what_is_linked_is_what_permutations_move_together(model: Architecture) -> None:
    tokenizer = get_tokenizer("channel", 32)
    flat = torch.randn(1, model.numel, generator=torch.Generator().manual_seed(0))
    moved = permute(flat, random_permutations(model, 1, torch.Generator().manual_seed(1)), model)
    links = token_links(tokenizer, model)
    read = []
    for weights in (flat, moved):
        values = tokenizer.tokenize_batch(weights, model)[0]
        summed = torch.cat([torch.zeros(1), values.sum(1)])[links]
        read.append((values * summed)[-4:].sum(1))  # the outputs stay where they are
    torch.testing.assert_close(read[1], read[0])


def test_only_tokens_of_single_channels_are_linked() -> None:
    assert not token_links(get_tokenizer("dense", 8), MLP).any()
