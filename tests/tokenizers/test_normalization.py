from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import TokenError
from weightspace.schema import Architecture, LayerSpec, TensorSpec
from weightspace.tokenizers import ChannelTokenizer, TokenNormalizer


def zoo(
    models: int, *, shift: float = 0.0, inputs: int = 5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat weights, tokens and mask of models whose tokens are mostly padding."""
    tensors = (TensorSpec("w", (3, inputs), "F32"), TensorSpec("b", (3,), "F32"))
    architecture = Architecture((LayerSpec("fc", "linear", tensors, "channels"),))
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(models, architecture.numel, generator=generator) * 0.3 + shift
    tokenizer = ChannelTokenizer(16)
    return flat, tokenizer.tokenize_batch(flat, architecture), tokenizer.layout(architecture).mask


def test_statistics_are_those_of_the_weights_without_padding() -> None:
    flat, tokens, mask = zoo(20, shift=2.0)
    normalizer = TokenNormalizer.fit([(tokens, mask)])
    assert normalizer.mean == pytest.approx(flat.double().mean().item(), rel=1e-12)
    assert normalizer.std == pytest.approx(flat.double().std(correction=0).item(), rel=1e-12)
    assert normalizer.mean != pytest.approx(tokens.double().mean().item(), rel=0.1), "padding would be seen here"


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any), shift=st.floats(-1e4, 1e4))
@settings(deadline=None)
def test_chunks_of_several_architectures_give_the_statistics_of_all_at_once(sizes: list[int], shift: float) -> None:
    parts = [zoo(size, shift=shift, inputs=2 + number, seed=number) for number, size in enumerate(sizes)]
    normalizer = TokenNormalizer.fit((tokens, mask) for _, tokens, mask in parts)
    values = np.concatenate([flat.double().numpy().ravel() for flat, _, _ in parts])
    assert normalizer.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-9)
    assert normalizer.std == pytest.approx(values.std(), rel=1e-6)


def test_fitted_on_the_training_split_it_is_the_same_for_every_split() -> None:
    _, train, mask = zoo(50, shift=1.0)
    _, test, _ = zoo(50, shift=3.0, seed=1)
    normalizer = TokenNormalizer.fit([(train, mask)])
    train_entries = normalizer.normalize(train, mask)[:, mask]
    assert train_entries.mean().item() == pytest.approx(0, abs=1e-5)
    assert train_entries.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    shift = normalizer.normalize(test, mask)[:, mask].mean().item()
    assert shift == pytest.approx((test[:, mask].double().mean().item() - normalizer.mean) / normalizer.std, rel=1e-4)
    assert shift > 5, "a second fit on the test split would hide the shift"


def test_padding_stays_zero_and_weights_return() -> None:
    _, tokens, mask = zoo(4, shift=2.0)
    normalizer = TokenNormalizer.fit([(tokens, mask)])
    normalized = normalizer.normalize(tokens, mask)
    assert not normalized[:, ~mask].any()
    assert torch.equal(normalizer.normalize(tokens[0], mask), normalized[0])
    restored = normalizer.denormalize(normalized, mask)
    assert not restored[:, ~mask].any()
    torch.testing.assert_close(restored, tokens, rtol=1e-6, atol=1e-6)


def test_it_is_rebuilt_from_its_fields() -> None:
    normalizer = TokenNormalizer(mean=0.25, std=2.0)
    assert TokenNormalizer(**dataclasses.asdict(normalizer)) == normalizer


def test_statistics_that_cannot_normalise_are_refused() -> None:
    _, tokens, mask = zoo(2)
    with pytest.raises(TokenError, match="no valid entry to fit on; pass the tokens of the training split"):
        TokenNormalizer.fit([(tokens, torch.zeros_like(mask))])
    with pytest.raises(TokenError, match=r"mean 1\.0, std 0\.0; fit on finite weights that are not all equal"):
        TokenNormalizer.fit([(torch.ones_like(tokens), mask)])
    with pytest.raises(TokenError, match="mean nan"):
        TokenNormalizer.fit([(tokens / 0, mask)])
