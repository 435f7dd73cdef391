"""The contract of every registered tokenizer: a new one is tested by being registered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.dtypes import DTYPES
from weightspace.errors import ArchitectureError, SettingsError, TokenError
from weightspace.networks.flat import TOKENIZED_DTYPES, flatten, restore, unflatten
from weightspace.schema import Architecture, Exclusion, LayerSpec, TensorSpec
from weightspace.tokenizers import TOKENIZERS, WeightTokenizer, base, get_tokenizer

EXCLUDED = {
    "steps": torch.tensor(12, dtype=torch.int64),
    "kept": torch.tensor([True, False]),
    "spectrum": torch.tensor([1 + 2j], dtype=torch.complex64),
    "packed": torch.arange(4).to(torch.uint8).view(torch.float4_e2m1fn_x2),
    "codes": torch.arange(5).to(torch.uint16),
    "empty": torch.zeros(0, 3),
}
WITHOUT_WEIGHT = ("cls_token", "pos_embed", "q_bias", "gamma")
EXACT = [name for name, cls in TOKENIZERS.items() if cls.exact]
SIZES = (1, 4, 7, 64)


@pytest.fixture(params=[(name, size) for name in TOKENIZERS for size in SIZES], ids=lambda p: f"{p[0]}-{p[1]}")
def tokenizer(request: pytest.FixtureRequest) -> WeightTokenizer:
    return get_tokenizer(*request.param)


@pytest.fixture(params=[(name, size) for name in EXACT for size in SIZES], ids=lambda p: f"{p[0]}-{p[1]}")
def exact(request: pytest.FixtureRequest) -> WeightTokenizer:
    """Tokenizers that return every tensor bit for bit; what others return stands in their own tests."""
    return get_tokenizer(*request.param)


def channels(name: str, *shape: int, dtype: str = "F32", bias: bool = True) -> LayerSpec:
    tensors = (TensorSpec(f"{name}.weight", shape, dtype), *([TensorSpec(f"{name}.bias", shape[:1], dtype)] * bias))
    return LayerSpec(name, "conv" if len(shape) > 2 else "linear", tensors, "channels")


FACTORS = ("adapter.lora_A.weight", "adapter.lora_B.weight")
PAIR = (channels("adapter.lora_A", 2, 6, bias=False), channels("adapter.lora_B", 4, 2, bias=False))


def everything(dtype: str = "F32") -> Architecture:
    """All kinds of layers and LoRA's factors, of which the convolution is stored in ``dtype``."""
    norm = tuple(TensorSpec(f"norm.{part}", (5,), "F32") for part in ("weight", "bias", "running_mean", "running_var"))
    return Architecture(
        layers=(
            channels("conv", 5, 2, 3, 3, dtype=dtype),
            LayerSpec("norm", "norm", norm, "vectors"),
            LayerSpec("temperature", "vector", (TensorSpec("temperature", (), "BF16"),), "vectors"),
            *(LayerSpec(name, "vector", (TensorSpec(name, (6,), "F32"),), "vectors") for name in WITHOUT_WEIGHT[2:]),
            *(
                LayerSpec(name, "other", (TensorSpec(name, (1, 3, 6), "F32"),), "channels")
                for name in WITHOUT_WEIGHT[:2]
            ),
            channels("embedding", 4, 3, bias=False),
            channels("head", 3, 20),
            *PAIR,
        ),
        exclusions=tuple(Exclusion(name, "not a float") for name in EXCLUDED),
        aliases=(("decoder.weight", "embedding.weight"), ("steps_again", "steps")),
    )


def random_model(architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {s.name: torch.randn(s.shape, generator=generator).to(DTYPES[s.dtype]) for s in architecture.tensors}
    return tensors | {exclusion.tensor: EXCLUDED[exclusion.tensor] for exclusion in architecture.exclusions}


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def assert_returned(
    tokenizer: WeightTokenizer, restored: dict[str, torch.Tensor], model: dict[str, torch.Tensor]
) -> None:
    """Every tensor bit for bit; of tokenizers that are not exact, the product of the factors and all else."""
    for key, tensor in model.items():
        assert restored[key].dtype == tensor.dtype and restored[key].shape == tensor.shape
        if tokenizer.exact or key not in FACTORS:
            assert bits(restored[key]) == bits(tensor)
    a, b = FACTORS
    torch.testing.assert_close(restored[b] @ restored[a], model[b] @ model[a])


def rows_of(layer: LayerSpec, model: dict[str, torch.Tensor]) -> Iterator[list[float]]:
    """Yields ``[w_c | b_c]``, or each tensor of the layout "vectors", entry by entry."""
    tensors = [model[spec.name] for spec in layer.tensors]
    if layer.layout == "vectors":
        yield from (tensor.flatten().tolist() for tensor in tensors)
    else:
        yield from (torch.cat([t[row].flatten() for t in tensors]).tolist() for row in range(len(tensors[0])))


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    layers = []
    for number in range(draw(st.integers(0, 5))):
        dtype = draw(st.sampled_from(sorted(TOKENIZED_DTYPES - {"F8_E8M0"})))
        shape = draw(st.lists(st.integers(1, 5), max_size=4).map(tuple))
        if len(shape) > 1 and draw(st.booleans()):
            layers.append(channels(f"layer{number}", *shape, dtype=dtype, bias=draw(st.booleans())))
        else:
            parts = [TensorSpec(f"layer{number}.{part}", shape, dtype) for part in range(draw(st.integers(1, 4)))]
            layers.append(LayerSpec(f"layer{number}", "vector", tuple(parts), "vectors"))
    return Architecture(tuple(layers))


@pytest.mark.parametrize("name", EXACT)
@given(architecture=architectures(), size=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_any_model_returns_bit_for_bit(name: str, architecture: Architecture, size: int, seed: int) -> None:
    tokenizer = get_tokenizer(name, size)
    model = random_model(architecture, seed)
    tokens = tokenizer.tokenize(model, architecture)
    restored = tokenizer.detokenize(tokens)
    assert restored.keys() == model.keys()
    for key, tensor in model.items():
        assert restored[key].dtype == tensor.dtype and restored[key].shape == tensor.shape
        assert bits(restored[key]) == bits(tensor)
    assert tokens.tokens.shape == tokens.mask.shape == (tokenizer.token_count(architecture), size)


@pytest.mark.parametrize("dtype", sorted(TOKENIZED_DTYPES))
def test_every_dtype_every_kind_of_layer_and_all_beside_them(tokenizer: WeightTokenizer, dtype: str) -> None:
    architecture = everything(dtype)
    model = random_model(architecture)
    tokens = tokenizer.tokenize(model, architecture)
    restored = tokenizer.detokenize(tokens)
    assert tokens.tokens.dtype == (torch.float64 if dtype == "F64" else torch.float32)
    assert restored.keys() == model.keys() | {"decoder.weight", "steps_again"}
    assert restored["decoder.weight"] is restored["embedding.weight"]
    assert restored["steps_again"] is restored["steps"] is model["steps"]
    assert_returned(tokenizer, restored, model)


def test_signed_zeros_subnormals_and_extremes_survive(tokenizer: WeightTokenizer) -> None:
    architecture = Architecture((channels("head", 2, 4), *PAIR))
    model = random_model(architecture) | {
        "head.weight": torch.tensor(
            [[-0.0, 0.0, 1e-45, -1e-45], [3.4028234663852886e38, -1e-38, 1.1754944e-38, 1 / 3]]
        ),
        "head.bias": torch.tensor([-0.0, 2**-149]),
    }
    assert_returned(tokenizer, tokenizer.detokenize(tokenizer.tokenize(model, architecture)), model)


def test_every_parameter_becomes_a_token_entry_whatever_its_name(exact: WeightTokenizer) -> None:
    architecture = everything()
    numbers = torch.arange(architecture.numel, dtype=torch.float32)
    numbered = {
        name: tensor.to(torch.bfloat16) if name == "temperature" else tensor
        for name, tensor in unflatten(numbers, architecture).items()
    }
    tokens = exact.tokenize(random_model(architecture) | numbered, architecture)
    entries = tokens.tokens[tokens.mask]
    assert torch.equal(entries.sort().values, numbers)
    for name in WITHOUT_WEIGHT:
        assert torch.isin(numbered[name], entries).all(), f"{name} was dropped"


def test_padding_is_zero_and_the_mask_counts_every_parameter(tokenizer: WeightTokenizer) -> None:
    architecture = everything()
    tokens = tokenizer.tokenize(random_model(architecture), architecture)
    assert int(tokens.mask.sum()) == architecture.numel
    assert bits(tokens.tokens[~tokens.mask]) == [0] * (4 * int((~tokens.mask).sum()))
    assert tokens.mask.any(dim=1).all(), "a token of padding alone"


def test_positions_are_token_layer_and_row(exact: WeightTokenizer) -> None:
    architecture = everything()
    positions = exact.layout(architecture).positions
    assert positions.dtype == torch.int64
    assert positions[:, 0].tolist() == list(range(exact.token_count(architecture)))
    assert positions[:, 1].unique_consecutive().tolist() == list(range(len(architecture.layers)))
    for number, layer in enumerate(architecture.layers):
        rows = positions[positions[:, 1] == number, 2]
        assert rows[0] == 0 and (rows.diff() >= 0).all() and rows[-1] < layer.rows


def test_tokens_start_with_the_row_that_their_position_names(exact: WeightTokenizer) -> None:
    architecture = everything()
    model = random_model(architecture)
    tokens = exact.tokenize(model, architecture)
    for token, (_, layer, channel) in zip(tokens.tokens.tolist(), tokens.positions.tolist(), strict=True):
        rows = list(rows_of(architecture.layers[layer], model))
        assert token[0] in rows[channel]


def test_a_batch_equals_its_models(tokenizer: WeightTokenizer) -> None:
    architecture = everything("BF16")
    models = [random_model(architecture, seed) for seed in range(3)]
    flat = torch.stack([flatten(model, architecture) for model in models])
    tokens = tokenizer.tokenize_batch(flat, architecture)
    assert torch.equal(tokens, torch.stack([tokenizer.tokenize(model, architecture).tokens for model in models]))
    for model, restored in zip(models, tokenizer.detokenize_batch(tokens, architecture), strict=True):
        passthrough = {exclusion.tensor: model[exclusion.tensor] for exclusion in architecture.exclusions}
        assert_returned(tokenizer, restore(restored, architecture, passthrough), model)


def test_a_batch_may_be_empty_strided_or_double(exact: WeightTokenizer) -> None:
    architecture = everything()
    n, d = exact.token_count(architecture), exact.token_size
    assert exact.tokenize_batch(torch.zeros(0, architecture.numel), architecture).shape == (0, n, d)
    flat = torch.randn(architecture.numel, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).t()
    tokens = exact.tokenize_batch(flat, architecture)
    assert tokens.dtype == torch.float64
    assert torch.equal(tokens, exact.tokenize_batch(flat.contiguous(), architecture))
    strided = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(exact.detokenize_batch(strided, architecture), flat)


def test_gradients_reach_weights_and_not_padding(exact: WeightTokenizer) -> None:
    architecture = everything()
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(2, architecture.numel, generator=generator) + 1
    flat = torch.randn(2, architecture.numel, generator=generator, requires_grad=True)
    tokens = exact.tokenize_batch(flat, architecture)
    tokens.retain_grad()
    back = exact.detokenize_batch(tokens, architecture)
    assert torch.equal(back, flat)
    (back * factors).sum().backward()
    assert torch.equal(flat.grad, factors)
    assert torch.equal(tokens.grad, exact.tokenize_batch(factors, architecture))


def test_inputs_of_any_strides_give_the_same_tokens(tokenizer: WeightTokenizer) -> None:
    architecture = everything()
    model = random_model(architecture)
    strided = {
        name: torch.stack([tensor] * 2, dim=-1)[..., 0]
        for name, tensor in model.items()
        if tensor.dim() > 0 and name not in EXCLUDED
    }
    strided["head.weight"] = model["head.weight"].t().contiguous().t()
    strided["conv.weight"] = model["conv.weight"].contiguous(memory_format=torch.channels_last)
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    tokens = tokenizer.tokenize(model | strided, architecture).tokens
    assert torch.equal(tokens, tokenizer.tokenize(model, architecture).tokens)


def test_parameters_that_need_gradients_are_taken_as_values(tokenizer: WeightTokenizer) -> None:
    architecture = Architecture((channels("0", 3, 5), *PAIR))
    parameters = {f"0.{name}": parameter for name, parameter in torch.nn.Linear(5, 3).named_parameters()}
    model = random_model(architecture) | parameters
    tokens = tokenizer.tokenize(model, architecture)
    assert not tokens.tokens.requires_grad
    assert torch.equal(tokenizer.detokenize(tokens)["0.weight"], model["0.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64", "F8_E5M2"])
def test_entries_that_are_not_finite_are_refused(tokenizer: WeightTokenizer, value: float, dtype: str) -> None:
    architecture = everything(dtype)
    model = random_model(architecture)
    broken = model["conv.weight"].double()
    broken[1, 0, 2, 2] = broken[4, 1, 0, 0] = value
    model["conv.weight"] = broken.to(DTYPES[dtype])
    with pytest.raises(TokenError, match=r"conv\.weight: 2 of 90 entries are NaN or infinite; .*nan_to_num"):
        tokenizer.tokenize(model, architecture)
    model["head.bias"] = torch.full((3,), value)
    with pytest.raises(TokenError, match=r"conv\.weight: 2 .* \(and 1 more\)"):
        tokenizer.tokenize(model, architecture)


def test_excluded_tensors_may_hold_nan(tokenizer: WeightTokenizer) -> None:
    architecture = Architecture(PAIR, exclusions=(Exclusion("spectrum", "complex"),))
    model = random_model(architecture) | {"spectrum": torch.tensor([complex("nan")])}
    assert tokenizer.detokenize(tokenizer.tokenize(model, architecture))["spectrum"] is model["spectrum"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, r"head\.weight: missing; expected a tensor of shape \(3, 20\) and dtype F32"),
        ({"head.weight": torch.zeros(20, 3)}, r"head\.weight: expected shape \(3, 20\) .*found \(20, 3\)"),
        ({"head.weight": torch.zeros(3, 20).double()}, r"head\.weight: expected .*F32, found .*F64"),
        ({"steps": None}, "steps: missing"),
        ({"adapter.weight": torch.zeros(2)}, r"adapter\.weight: unknown to the architecture"),
        ({"decoder.weight": torch.zeros(4, 3)}, r"decoder\.weight: tied to embedding\.weight but holds other values"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tokenizer: WeightTokenizer, change: dict[str, torch.Tensor | None], message: str
) -> None:
    architecture = everything()
    model = {name: tensor for name, tensor in (random_model(architecture) | change).items() if tensor is not None}
    with pytest.raises(ArchitectureError, match=message):
        tokenizer.tokenize(model, architecture)


@pytest.mark.parametrize(
    "layer",
    [
        LayerSpec(
            "odd", "other", (TensorSpec("odd.weight", (3, 2), "F32"), TensorSpec("odd.bias", (4,), "F32")), "channels"
        ),
        LayerSpec("odd", "other", (TensorSpec("odd.bias", (0, 2), "F32"),), "channels"),
        LayerSpec("odd", "norm", (TensorSpec("odd.bias", (0,), "F32"),), "vectors"),
    ],
)
def test_layers_that_form_no_rows_are_named(tokenizer: WeightTokenizer, layer: LayerSpec) -> None:
    with pytest.raises(ArchitectureError, match=r"odd\.bias: shape .* of layer 'odd'"):
        tokenizer.layout(Architecture((layer, *PAIR)))


def test_integers_declared_as_layers_are_refused(tokenizer: WeightTokenizer) -> None:
    architecture = Architecture((channels("head", 2, 2, dtype="I64"), *PAIR))
    with pytest.raises(ArchitectureError, match=r"head\.weight: I64 does not become tokens exactly"):
        tokenizer.tokenize({}, architecture)


def test_tokens_of_another_shape_are_refused(tokenizer: WeightTokenizer) -> None:
    architecture = everything()
    n, d = tokenizer.token_count(architecture), tokenizer.token_size
    with pytest.raises(TokenError, match=rf"expected shape \({n}, {d}\) a model, found \({n - 1}, {d}\)"):
        tokenizer.detokenize_batch(torch.zeros(2, n - 1, d), architecture)
    tokens = tokenizer.tokenize(random_model(architecture), architecture)
    with pytest.raises(ArchitectureError, match="steps: not among the tokens"):
        tokenizer.detokenize(dataclasses.replace(tokens, passthrough={}))


def test_vectors_of_another_length_are_refused(tokenizer: WeightTokenizer) -> None:
    architecture = everything()
    with pytest.raises(ArchitectureError, match=rf"expected {architecture.numel} entries a model, found 3"):
        tokenizer.tokenize_batch(torch.zeros(2, 3), architecture)


def test_layouts_are_shared_between_models_of_equal_layers_only(tokenizer: WeightTokenizer) -> None:
    architecture = everything()
    assert tokenizer.layout(architecture).mask is tokenizer.layout(everything()).mask
    reordered = dataclasses.replace(architecture, layers=architecture.layers[::-1])
    assert reordered.digest == architecture.digest
    assert not torch.equal(tokenizer.layout(reordered).positions, tokenizer.layout(architecture).positions)


def test_layouts_of_huge_models_are_not_kept(tokenizer: WeightTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = everything("F16")
    monkeypatch.setattr(base, "LARGEST_CACHED_MASK", 0)
    first, second = tokenizer.layout(architecture), tokenizer.layout(architecture)
    assert first.mask is not second.mask
    assert torch.equal(first.mask, second.mask) and torch.equal(first.positions, second.positions)


def test_no_layers_give_no_tokens(exact: WeightTokenizer) -> None:
    tokens = exact.tokenize({}, Architecture(()))
    assert tokens.tokens.shape == (0, exact.token_size) and tokens.positions.shape == (0, 3)
    assert exact.detokenize(tokens) == {}


def test_unknown_names_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"unknown name 'chanel'; choose one of channel, dense"):
        get_tokenizer("chanel", 8)
    for size in (0, -1):
        with pytest.raises(SettingsError, match=f"token_size: {size} is no size; take 1 or more"):
            get_tokenizer("channel", size)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_are_values_that_carry_their_registered_name(name: str) -> None:
    assert get_tokenizer(name, 8).name == name
    assert get_tokenizer(name, 8) == get_tokenizer(name, 8) != get_tokenizer(name, 9)
