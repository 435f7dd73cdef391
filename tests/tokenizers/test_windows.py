from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightspace.errors import SettingsError, TokenError
from weightspace.io.checkpoint import Checkpoint, open_checkpoint_bytes
from weightspace.io.writing import checkpoint_bytes
from weightspace.networks.infer import infer_architecture
from weightspace.schema import Architecture
from weightspace.tokenizers import get_tokenizer
from weightspace.tokenizers.sampling import STRATA, _runs, sample_windows

EXACT = ["channel", "dense"]


def model() -> tuple[Checkpoint, Architecture]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "conv.weight": (5, 3, 3, 3),
        "conv.bias": (5,),
        "norm.weight": (5,),
        "norm.bias": (5,),
        "norm.running_mean": (5,),
        "norm.running_var": (5,),
        "fc.weight": (7, 45),
        "fc.bias": (7,),
        "scale": (),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["fc.weight"] = tensors["fc.weight"].to(torch.bfloat16)
    tensors["fc.bias"] = tensors["fc.bias"].to(torch.float16)
    tensors["steps"] = torch.tensor(3)
    checkpoint = open_checkpoint_bytes(checkpoint_bytes(tensors), where="model")
    return checkpoint, infer_architecture(checkpoint.specs.values())


CHECKPOINT, ARCHITECTURE = model()


@pytest.mark.parametrize("name", EXACT)
@given(token_size=st.integers(1, 60), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_window_is_a_stretch_of_all_tokens(name: str, token_size: int, ends: tuple[float, float]) -> None:
    tokenizer = get_tokenizer(name, token_size)
    whole = tokenizer.tokenize(CHECKPOINT.tensors(), ARCHITECTURE)
    start, stop = sorted(int(end * len(whole.tokens)) for end in ends)
    window = tokenizer.tokenize_windows(CHECKPOINT.entries, ARCHITECTURE, [(start, stop)])[0]
    assert torch.equal(window.tokens, whole.tokens[start:stop])
    assert torch.equal(window.mask, whole.mask[start:stop])
    assert torch.equal(window.positions, whole.positions[start:stop])


@pytest.mark.parametrize("name", EXACT)
def test_only_entries_of_the_window_are_read(name: str) -> None:
    tokenizer = get_tokenizer(name, 16)
    asked: list[tuple[str, int, int]] = []

    def read(stretches):
        asked.extend(stretches)
        return CHECKPOINT.entries(stretches)

    windows = [(2, 5), (9, 12)]
    found = tokenizer.tokenize_windows(read, ARCHITECTURE, windows)
    assert sum(stop - start for _, start, stop in asked) == sum(int(window.mask.sum()) for window in found)
    counts = tokenizer.window_entries(ARCHITECTURE, windows)
    assert sum(counts.values()) == sum(int(window.mask.sum()) for window in found)


def test_entries_that_are_not_finite_are_named() -> None:
    content = {"fc.weight": torch.ones(4, 8), "fc.bias": torch.ones(4)}
    content["fc.weight"][2, 3] = torch.inf
    checkpoint = open_checkpoint_bytes(checkpoint_bytes(content), where="model")
    architecture = infer_architecture(checkpoint.specs.values())
    tokenizer = get_tokenizer("channel", 9)
    tokenizer.tokenize_windows(checkpoint.entries, architecture, [(0, 2)])
    with pytest.raises(TokenError, match=r"fc.weight: entries 16 to 32 hold NaN or infinite values"):
        tokenizer.tokenize_windows(checkpoint.entries, architecture, [(2, 4)])


class TestSampling:
    def wide(self, layers: int = 40) -> Architecture:
        from weightspace.schema import TensorSpec

        specs = [TensorSpec(f"layers.{i}.weight", (1000, 500), "BF16") for i in range(layers)]
        return infer_architecture([*specs, TensorSpec("norm.weight", (500,), "F32")])

    def test_a_model_within_the_budget_is_taken_whole(self) -> None:
        tokenizer = get_tokenizer("channel", 16)
        sample = sample_windows(tokenizer, ARCHITECTURE, window=4, max_bytes=10**6)
        assert sample.runs == ((0, tokenizer.token_count(ARCHITECTURE)),)
        assert sample.share == 1.0
        assert sample.read_bytes == 4 * (135 + 5 + 20 + 1) + 2 * (315 + 7)

    @pytest.mark.parametrize("name", EXACT)
    @pytest.mark.parametrize("max_bytes", [30_000, 10**6, 10**7])
    def test_the_budget_holds_and_is_used(self, name: str, max_bytes: int) -> None:
        sample = sample_windows(get_tokenizer(name, 64), self.wide(), window=32, max_bytes=max_bytes)
        assert 0.9 * max_bytes <= sample.read_bytes <= max_bytes
        assert len(sample.runs) <= STRATA
        assert sample.share == sample.read_bytes / (40 * 1_000_000 + 2000)

    def test_runs_are_whole_windows_in_all_depths(self) -> None:
        architecture, tokenizer = self.wide(), get_tokenizer("channel", 64)
        sample = sample_windows(tokenizer, architecture, window=32, max_bytes=10**6)
        assert all(start % 32 == 0 and stop % 32 == 0 for start, stop in sample.runs)
        assert all(before[1] <= after[0] for before, after in zip(sample.runs, sample.runs[1:], strict=False))
        tokens_a_layer = tokenizer.token_count(architecture) / 40
        held = [0.0] * 41
        for start, stop in sample.runs:
            held[int(start / tokens_a_layer)] += stop - start
        assert min(held[:40]) > 0.5 * max(held)

    def test_the_seed_decides(self) -> None:
        tokenizer = get_tokenizer("dense", 64)
        first, again, other = (
            sample_windows(tokenizer, self.wide(), window=32, max_bytes=10**6, seed=seed) for seed in (0, 0, 1)
        )
        assert first == again
        assert first.runs != other.runs

    def test_every_window_is_as_likely_as_any_other(self) -> None:
        drawn = torch.zeros(100)
        for seed in range(2000):
            for start, stop in _runs(100, 20, seed):
                drawn[start:stop] += 1
        assert (drawn - 400).abs().max() < 5 * (2000 * 0.2 * 0.8) ** 0.5  # five standard deviations

    def test_a_budget_below_one_window(self) -> None:
        with pytest.raises(
            SettingsError, match=r"max_bytes: 100 bytes hold no window of 32 tokens; allow at least \d+"
        ):
            sample_windows(get_tokenizer("dense", 64), self.wide(), window=32, max_bytes=100)
