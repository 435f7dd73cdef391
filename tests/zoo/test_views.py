from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightspace.errors import SettingsError
from weightspace.networks.families import CNNConfig, initialize, stacked_forward
from weightspace.networks.flat import flatten, unflatten
from weightspace.networks.infer import infer_architecture
from weightspace.schema import Architecture, TensorSpec
from weightspace.zoo.views import Augmentation, corrupt, permuted_views, window_starts

CONFIG = CNNConfig((1, 6, 6), 3, (5, 7), pooling="none")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def population(models: int) -> tuple[torch.Tensor, Architecture]:
    specs = [TensorSpec(name, shape, "F32") for name, shape in CONFIG.shapes().items()]
    architecture = infer_architecture(specs, config=CONFIG.to_dict())
    stacked = initialize(CONFIG, ["kaiming_normal"] * models, generator())
    each = [flatten({name: value[i] for name, value in stacked.items()}, architecture) for i in range(models)]
    return torch.stack(each), architecture


class TestPermutedView:
    def test_the_function_stays_and_the_weights_move(self) -> None:
        flat, architecture = population(4)
        moved = permuted_views(flat, architecture, 1, generator())
        images = torch.rand(4, 9, 1, 6, 6, generator=generator(1))
        before, after = (stacked_forward(CONFIG, unflatten(value, architecture), images) for value in (flat, moved))
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
        assert (moved != flat).any(1).all()
        assert torch.equal(moved.sort(1).values, flat.sort(1).values)

    def test_every_model_and_every_call_has_its_own_permutation(self) -> None:
        flat, architecture = population(1)
        drawn = generator()
        views = permuted_views(flat.repeat(6, 1), architecture, 2, drawn)
        assert len({tuple(view.tolist()) for view in views}) == 12

    def test_the_seed_decides(self) -> None:
        flat, architecture = population(3)
        assert torch.equal(*(permuted_views(flat, architecture, 1, generator(7)) for _ in range(2)))


class TestCorrupt:
    def tokens(self, size: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones(30, 40, size, dtype=torch.bool)
        mask[:, 10:, size // 2 :] = False
        return (torch.rand(mask.shape, generator=generator()) + 1) * mask, mask

    def test_nothing_asked_nothing_done(self) -> None:
        values, mask = self.tokens()
        assert torch.equal(corrupt(values, mask, Augmentation(erase=0.0, noise=0.0), generator()), values)

    @given(erase=st.floats(0.05, 0.9), size=st.integers(2, 40))
    def test_one_stretch_of_a_token_is_erased(self, erase: float, size: int) -> None:
        values, mask = self.tokens(size)
        erased = (corrupt(values, mask, Augmentation(erase=erase, noise=0.0), generator()) == 0) & mask
        whole = erased[:, :10]  # tokens without padding
        assert whole.sum(-1).max() <= erase * size + 1
        begins = (whole & ~torch.nn.functional.pad(whole, (1, 0))[..., :-1]).sum(-1)
        assert begins.max() <= 1
        assert whole.sum() == pytest.approx(300 * erase / 2 * size, rel=0.4, abs=60)

    def test_shares_and_places_differ_between_tokens_and_reach_everywhere(self) -> None:
        values, mask = self.tokens()
        erased = corrupt(values, mask, Augmentation(erase=0.5, noise=0.0), generator())[:, :10] == 0
        assert len(torch.unique(erased.flatten(0, 1), dim=0)) > 60
        assert erased.flatten(0, 1).any(0).all()

    def test_noise_has_the_asked_spread_and_is_never_the_same(self) -> None:
        values, mask = self.tokens()
        added = corrupt(values, mask, Augmentation(erase=0.0, noise=0.3), generator()) - values
        assert float(added[mask].std()) == pytest.approx(0.3, rel=0.02)
        assert len(added[mask].unique()) > 0.99 * int(mask.sum())

    def test_padding_stays_zero(self) -> None:
        values, mask = self.tokens()
        assert not corrupt(values, mask, Augmentation(erase=0.5, noise=1.0), generator())[~mask].any()


class TestWindowStarts:
    def test_sequences_start_each_on_their_own_and_anywhere(self) -> None:
        starts = window_starts([10] * 400, 4, generator())
        assert set(starts) == set(range(7))
        assert max(starts.count(start) for start in set(starts)) < 100

    @given(lengths=st.lists(st.integers(1, 50), max_size=8), window=st.integers(1, 60))
    def test_windows_lie_within_their_sequence(self, lengths: list[int], window: int) -> None:
        for start, length in zip(window_starts(lengths, window, generator()), lengths, strict=True):
            assert 0 <= start <= max(0, length - window)


@pytest.mark.parametrize(
    ("change", "named"), [({"erase": 1.0}, "erase"), ({"erase": -0.1}, "erase"), ({"noise": -1.0}, "noise")]
)
def test_impossible_augmentations_are_refused(change: dict[str, float], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        Augmentation(**change)


def test_noise_that_is_no_number_is_refused() -> None:
    with pytest.raises(SettingsError, match="noise"):
        Augmentation(noise=float("nan"))
