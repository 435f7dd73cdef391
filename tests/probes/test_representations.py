from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from weightspace.errors import SettingsError, ZooError
from weightspace.networks.flat import unflatten
from weightspace.networks.permutation import permute, random_permutations
from weightspace.probes import representations as module
from weightspace.probes import statistics
from weightspace.probes.representations import (
    CodeFeatures,
    FeatureBlock,
    Features,
    WeightBlock,
    baselines,
    collect_weights,
    fit_codes,
)
from weightspace.probes.statistics import weight_invariants, weight_statistics
from weightspace.schema import Architecture, GroupAxis, LayerSpec, PermutationGroup, TensorSpec
from weightspace.zoo.dataset import ZooBatch


def layer(name: str, *shape: int) -> LayerSpec:
    tensors = (TensorSpec(f"{name}.weight", shape, "F32"), TensorSpec(f"{name}.bias", shape[:1], "F32"))
    return LayerSpec(name, "conv" if len(shape) == 4 else "linear", tensors, "channels")


def group(size: int, writer: str, reader: str, block: int = 1) -> PermutationGroup:
    axes = (GroupAxis(f"{writer}.weight", 0), GroupAxis(f"{writer}.bias", 0), GroupAxis(f"{reader}.weight", 1, block))
    return PermutationGroup(size, axes)


MLP = Architecture((layer("a", 6, 5), layer("b", 3, 6)), (group(6, "a", "b"),))
CNN = Architecture(
    (layer("a", 4, 1, 3, 3), layer("b", 6, 4, 3, 3), layer("c", 2, 24)),
    (group(4, "a", "b"), group(6, "b", "c", block=4)),
)
SCALE = Architecture((LayerSpec("scale", "vector", (TensorSpec("scale", (), "F32"),), "vectors"), layer("a", 2, 3)))


def weights(architecture: Architecture, models: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(models, architecture.numel, generator=torch.Generator().manual_seed(seed))


def permuted(flat: Tensor, architecture: Architecture, seed: int = 1) -> Tensor:
    drawn = random_permutations(architecture, len(flat), torch.Generator().manual_seed(seed))
    return permute(flat, drawn, architecture)


def test_statistics_are_the_published_seven_a_tensor() -> None:
    flat = weights(CNN, 3)
    computed = weight_statistics(flat, CNN)
    assert computed.shape == (3, 14 * len(CNN.layers))
    for number, tensor in enumerate(unflatten(flat, CNN).values()):
        values = tensor.flatten(1).double().numpy()
        expected = [values.mean(1), values.var(1), *np.percentile(values, [1, 25, 50, 75, 99], axis=1)]
        np.testing.assert_allclose(computed[:, 7 * number : 7 * number + 7], np.stack(expected, axis=1), rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([MLP, CNN]), st.integers(0, 1000))
def test_permuting_neurons_changes_neither_statistics_nor_invariants(architecture: Architecture, seed: int) -> None:
    flat = weights(architecture, 4, seed)
    moved = permuted(flat, architecture, seed + 1)
    assert not torch.equal(flat, moved)
    assert torch.equal(weight_statistics(flat, architecture), weight_statistics(moved, architecture))
    before, after = weight_invariants(flat, architecture), weight_invariants(moved, architecture)
    # a singular value of zero is the root of a rounding error
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-6)


def test_invariants_change_when_neurons_are_torn_apart() -> None:
    flat = weights(MLP, 2)
    torn = flat.clone()
    torn[:, :30] = permuted(flat, MLP)[:, :30]  # the first kernel is permuted, its readers are not
    assert not torch.allclose(weight_invariants(flat, MLP), weight_invariants(torn, MLP), rtol=1e-3)


def test_invariants_hold_the_named_numbers() -> None:
    flat = weights(MLP, 2)
    tensors = {name: value.double() for name, value in unflatten(flat, MLP).items()}
    first, second = tensors["a.weight"], tensors["b.weight"]
    computed = weight_invariants(flat, MLP).double()
    product = torch.linalg.svdvals(second @ first).flip(1)
    torch.testing.assert_close(computed[:, -3:], product, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(computed[:, 2:7], torch.linalg.svdvals(first).flip(1), rtol=1e-5, atol=1e-6)
    shape = np.stack([stats.skew(first.flatten(1), axis=1), stats.kurtosis(first.flatten(1), axis=1)], axis=1)
    np.testing.assert_allclose(computed[:, :2], shape, rtol=1e-5)
    rows = first.norm(dim=2).quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1.0]).double(), dim=1).T
    torch.testing.assert_close(computed[:, 7:12], rows, rtol=1e-5, atol=1e-6)


def test_product_follows_a_flattened_map_block_by_block() -> None:
    flat = weights(CNN, 2)
    tensors = {name: value.double() for name, value in unflatten(flat, CNN).items()}
    read = tensors["c.weight"].unflatten(2, (6, 4)).movedim(2, 1).flatten(2)
    product = torch.linalg.svdvals(read.mT @ tensors["b.weight"].flatten(2)).flip(1)
    computed = weight_invariants(flat, CNN).double()[:, -6:]
    torch.testing.assert_close(computed, product[:, -6:], rtol=1e-5, atol=1e-5)


def test_smooth_kernels_are_told_from_rough_ones() -> None:
    ramp = torch.linspace(1, 2, 9).view(3, 3).repeat(4, 1, 1)
    smooth, rough = torch.zeros(1, CNN.numel), torch.zeros(1, CNN.numel)
    smooth[0, :36] = ramp.flatten()
    rough[0, :36] = ramp.flatten() * torch.tensor([1.0, -1.0]).repeat(18)
    # skew, kurtosis, 4 singular values, 5 + 5 norms, then one number a spatial axis
    assert (weight_invariants(smooth, CNN)[0, 16:18] < 0.2).all()
    assert (weight_invariants(rough, CNN)[0, 16:18] > 0.2).all()


def test_scalars_constants_and_diverged_weights_stay_finite() -> None:
    flat = torch.stack([torch.zeros(SCALE.numel), torch.ones(SCALE.numel), weights(SCALE, 1)[0] * 1e25])
    for described in (weight_statistics(flat, SCALE), weight_invariants(flat, SCALE)):
        assert torch.isfinite(described).all()
        assert described.dtype == torch.float32


def test_models_are_described_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = weights(CNN)
    whole = weight_statistics(flat, CNN)
    monkeypatch.setattr(statistics, "CHUNK_ENTRIES", 2 * CNN.numel)
    assert torch.equal(weight_statistics(flat, CNN), whole)


def test_long_spectra_are_read_off_at_sixteen_ranks() -> None:
    wide = Architecture((layer("a", 40, 50),))
    flat = weights(wide, 2)
    values = torch.linalg.svdvals(flat[:, :2000].view(2, 40, 50).double())
    computed = weight_invariants(flat, wide).double()[:, 2:18]
    torch.testing.assert_close(computed[:, [0, 15]], values[:, [39, 0]], rtol=1e-4, atol=1e-6)
    assert (computed.diff(dim=1) > 0).all()


@pytest.mark.parametrize("incremental", [False, True])
def test_linear_codes_invert_what_lies_in_their_span(incremental: bool) -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(3, 20))
    train, test = rng.normal(size=(90, 3)) @ plane + 1, rng.normal(size=(5, 3)) @ plane + 1
    codes = fit_codes((train[i : i + 7] for i in range(0, 90, 7)), 3, incremental=incremental)
    assert codes.transform(test).shape == (5, 3)
    np.testing.assert_allclose(codes.inverse_transform(codes.transform(test)), test, atol=1e-8)


def test_incremental_codes_do_not_depend_on_how_the_stream_is_cut() -> None:
    data = np.random.default_rng(0).normal(size=(200, 30)).astype(np.float32)
    one = fit_codes([data], 4, incremental=True)
    other = fit_codes(np.split(data, [1, 2, 50, 199]), 4, incremental=True)
    np.testing.assert_allclose(one.transform(data), other.transform(data), atol=1e-4)


def test_codes_shrink_to_what_the_data_allow_and_refuse_what_they_cannot_do() -> None:
    assert fit_codes([np.eye(5)], 64).transform(np.eye(5)).shape == (5, 5)
    assert fit_codes([np.eye(5)], 64, incremental=True).transform(np.eye(5)).shape == (5, 5)
    for incremental in (False, True):
        with pytest.raises(ZooError, match="PCA: 1 training models"):
            fit_codes([np.ones((1, 3))], 2, incremental=incremental)
    with pytest.raises(ZooError, match="no model"):
        fit_codes([], 2, incremental=True)
    with pytest.raises(SettingsError, match="size: 0"):
        fit_codes([np.eye(3)], 0)


def block(architecture: Architecture, rows: list[int]) -> WeightBlock:
    flat = weights(architecture, len(rows))
    return WeightBlock(architecture, np.array(rows), flat, permuted(flat, architecture))


def test_mixed_architectures_stand_side_by_side_with_indicators() -> None:
    one, other = block(MLP, [0, 2, 4]), block(CNN, [3, 1])
    features = baselines([one, other])["W"].fit(np.array([0]))
    matrix = features.features(np.array([3, 0, 1]))
    assert matrix.shape == (3, MLP.numel + CNN.numel + 2)
    assert features.dimensions == CNN.numel
    np.testing.assert_array_equal(matrix[0, MLP.numel : -2], other.flat[0])
    np.testing.assert_array_equal(matrix[1, : MLP.numel], one.flat[0])
    np.testing.assert_array_equal(matrix[2, MLP.numel : -2], other.flat[1])
    np.testing.assert_array_equal(matrix[:, -2:], [[0, 1], [1, 0], [0, 1]])
    assert not matrix[0, : MLP.numel].any() and not matrix[1, MLP.numel : -2].any()
    moved = features.permuted_features(np.array([3]))
    assert other.permuted is not None
    np.testing.assert_array_equal(moved[0, MLP.numel : -2], other.permuted[0])


def test_shared_columns_are_not_set_side_by_side() -> None:
    embeddings = np.arange(12, dtype=np.float32).reshape(4, 3)
    parts = [np.array([0, 2]), np.array([1, 3])]
    features = Features([FeatureBlock(rows, embeddings[rows], -embeddings[rows]) for rows in parts], shared=True)
    matrix = features.features(np.array([1, 2]))
    np.testing.assert_array_equal(matrix, [[3, 4, 5, 0, 1], [6, 7, 8, 1, 0]])
    np.testing.assert_array_equal(features.permuted_features(np.array([1]))[:, :3], [[-3, -4, -5]])
    single = Features([FeatureBlock(np.arange(4), embeddings)], shared=True)
    np.testing.assert_array_equal(single.features(np.arange(4)), embeddings)
    assert np.isnan(single.permuted_features(np.arange(4))).all()


def test_codes_are_fitted_on_training_models_only() -> None:
    flat = weights(MLP, 40)
    train = np.arange(20)
    spoiled = flat.clone()
    spoiled[20:] *= 1e3
    for incremental in (False, True):
        fitted = [
            CodeFeatures([WeightBlock(MLP, np.arange(40), w)], 4, incremental=incremental).fit(train).features(train)
            for w in (flat, spoiled)
        ]
        np.testing.assert_array_equal(*fitted)


def test_an_architecture_without_training_models_has_no_codes() -> None:
    codes = CodeFeatures([block(MLP, [0, 1, 2]), block(CNN, [3, 4])], 2).fit(np.array([0, 1]))
    matrix = codes.features(np.array([0, 3]))
    assert matrix.shape == (2, 2 + 2)
    np.testing.assert_array_equal(matrix[1], [0, 0, 0, 1])


def test_baselines_describe_permuted_models_too() -> None:
    built = baselines([block(MLP, list(range(30)))], code_size=4)
    rows, train = np.arange(20, 30), np.arange(20)
    assert list(built) == ["W", "s(W)", "s(W)+invariants", "PCA", "IncrementalPCA"]
    for name, representation in built.items():
        fitted = representation.fit(train)
        plain, moved = fitted.features(rows), fitted.permuted_features(rows)
        assert plain.shape == moved.shape == (10, fitted.dimensions)
        assert np.allclose(plain, moved, rtol=1e-3, atol=1e-5) == name.startswith("s(W)")


def test_raw_weights_of_too_many_architectures_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = [block(MLP, [0, 1, 2]), block(CNN, [3, 4])]
    monkeypatch.setattr(module, "LARGEST_MATRIX", 5 * (MLP.numel + CNN.numel))
    assert "W" in baselines(blocks) and not caplog.messages
    monkeypatch.setattr(module, "LARGEST_MATRIX", 5 * (MLP.numel + CNN.numel) - 1)
    assert list(baselines(blocks)) == ["s(W)", "s(W)+invariants", "PCA", "IncrementalPCA"]
    assert "raw weights are left out of the probes: each of 2 architectures" in caplog.text


def test_weights_are_collected_by_architecture() -> None:
    flat = weights(MLP, 4)
    fixed = Architecture((layer("z", 2, 2),))
    batches = [
        ZooBatch(header="", rows=np.array([0, 1]), architecture=MLP, flat=flat[:2]),
        ZooBatch(header="", rows=np.array([2]), architecture=fixed, flat=weights(fixed, 1)),
        ZooBatch(header="", rows=np.array([4, 3]), architecture=MLP, flat=flat[2:]),
    ]
    first, second = collect_weights(batches, torch.Generator().manual_seed(0))
    assert list(first.rows) == [0, 1, 4, 3] and torch.equal(first.flat, flat)
    assert first.permuted is not None and not torch.equal(first.permuted, flat)
    assert torch.equal(first.permuted.sort(dim=1).values, flat.sort(dim=1).values)
    assert second.permuted is None


def test_another_order_of_layers_is_another_block() -> None:
    swapped = Architecture(MLP.layers[::-1], MLP.groups)
    batches = [
        ZooBatch(header="", rows=np.array([i]), architecture=a, flat=weights(a, 1))
        for i, a in enumerate((MLP, swapped))
    ]
    assert len(collect_weights(batches, torch.Generator().manual_seed(0))) == 2


def test_refuses_features_that_do_not_cover_the_models() -> None:
    ones = np.ones((2, 3))
    with pytest.raises(ZooError, match="once each"):
        Features([FeatureBlock(np.array([0, 2]), ones)])
    with pytest.raises(ZooError, match="shape"):
        FeatureBlock(np.arange(3), ones)
    with pytest.raises(ZooError, match="NaN or Inf for 1 of 2 models"):
        FeatureBlock(np.arange(2), np.array([[1.0], [np.nan]]))
    with pytest.raises(ZooError, match="widths"):
        Features(
            [FeatureBlock(np.array([0]), np.ones((1, 2))), FeatureBlock(np.array([1]), np.ones((1, 3)))], shared=True
        )
