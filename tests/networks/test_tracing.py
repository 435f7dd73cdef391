from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weightspace.errors import ArchitectureError
from weightspace.networks import operations
from weightspace.networks.infer import architecture_of
from weightspace.networks.tracing import trace, verify_groups
from weightspace.schema import GroupAxis, PermutationGroup


def axes_of(groups: tuple[PermutationGroup, ...]) -> list[set[tuple[str, int, int]]]:
    return [{(a.tensor, a.axis, a.block) for a in group.axes} for group in groups]


def verified(module: nn.Module, example: torch.Tensor) -> tuple[PermutationGroup, ...]:
    """The traced groups; all of them must hold, so that tracing itself is right and not only its filter."""
    groups = trace(module, example)[0]
    assert verify_groups(module, groups, example, torch.Generator().manual_seed(3)) == groups
    return groups


class Lambda(nn.Module):
    """Submodules and a forward function over them."""

    def __init__(self, forward: Callable, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def test_conv_batchnorm_flatten_linear() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(16, 7),
        nn.BatchNorm1d(7),
        nn.Tanh(),
        nn.Linear(7, 2),
    )
    first, second, third = axes_of(verified(module, IMAGES))
    norm = ("weight", "bias", "running_mean", "running_var")
    assert first == {("0.weight", 0, 1), ("0.bias", 0, 1), ("4.weight", 1, 1), *((f"1.{n}", 0, 1) for n in norm)}
    assert second == {("4.weight", 0, 1), ("8.weight", 1, 4)}
    assert third == {("8.weight", 0, 1), ("8.bias", 0, 1), ("11.weight", 1, 1), *((f"9.{n}", 0, 1) for n in norm)}


def test_batchnorm_behind_flatten_moves_in_blocks() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 2))
    (group,) = axes_of(verified(module, IMAGES))
    assert {("0.weight", 0, 1), ("2.running_var", 0, 64), ("2.weight", 0, 64), ("3.weight", 1, 64)} <= group


def test_global_pooling_and_view_with_traced_sizes() -> None:
    def forward(m: Lambda, x: torch.Tensor) -> torch.Tensor:
        x = F.avg_pool2d(F.leaky_relu(m.conv(x)), 2)
        return m.out(x.view(x.size(0), -1)) + m.mean(x.mean((2, 3)))

    module = Lambda(forward, conv=nn.Conv2d(3, 4, 3), out=nn.Linear(36, 2), mean=nn.Linear(4, 2))
    (group,) = axes_of(verified(module, IMAGES))
    assert group == {("conv.weight", 0, 1), ("conv.bias", 0, 1), ("out.weight", 1, 9), ("mean.weight", 1, 1)}


def test_residual_sum_joins_its_sides() -> None:
    def forward(m: Lambda, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        x = x + m.down(torch.relu(m.up(m.norm(x))))
        return m.head(x)

    parts = {"stem": (5, 6), "up": (6, 9), "down": (9, 6), "head": (6, 2)}
    module = Lambda(forward, norm=nn.LayerNorm(6), **{name: nn.Linear(*size) for name, size in parts.items()})
    stream, inner = axes_of(verified(module, ROWS))
    assert stream == {
        *{("stem.weight", 0, 1), ("stem.bias", 0, 1), ("norm.weight", 0, 1), ("norm.bias", 0, 1)},
        *{("up.weight", 1, 1), ("down.weight", 0, 1), ("down.bias", 0, 1), ("head.weight", 1, 1)},
    }
    assert inner == {("up.weight", 0, 1), ("up.bias", 0, 1), ("down.weight", 1, 1)}


def test_residual_from_the_input_fixes_the_channels() -> None:
    module = Lambda(lambda m, x: m.out(x + m.fc(x)), fc=nn.Linear(5, 5), out=nn.Linear(5, 2))
    assert trace(module, ROWS)[0] == ()


def test_concatenation_is_left_out_and_the_rest_kept() -> None:
    def forward(m: Lambda, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(m.a(x))
        return m.out(torch.cat([torch.relu(m.b(h)), h * 0 + 1], dim=1))

    module = Lambda(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 3), out=nn.Linear(7, 2))
    assert verified(module, ROWS) == ()

    def kept(m: Lambda, x: torch.Tensor) -> torch.Tensor:
        return m.out(torch.cat([m.b(torch.relu(m.a(x))), x], dim=1))

    module = Lambda(kept, a=nn.Linear(5, 4), b=nn.Linear(4, 3), out=nn.Linear(8, 2))
    assert axes_of(verified(module, ROWS)) == [{("a.weight", 0, 1), ("a.bias", 0, 1), ("b.weight", 1, 1)}]


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolution_passes_channels_through(multiplier: int) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4 * multiplier, 3, groups=4), nn.SiLU(), nn.Conv2d(4 * multiplier, 2, 1)
    )
    (group,) = axes_of(verified(module, IMAGES))
    assert group == {
        *{("0.weight", 0, 1), ("0.bias", 0, 1), ("1.weight", 0, multiplier), ("1.bias", 0, multiplier)},
        ("3.weight", 1, multiplier),
    }


def test_grouped_convolution_and_group_norm_stay_fixed() -> None:
    grouped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1))
    assert axes_of(verified(grouped, IMAGES)) == [{("2.weight", 0, 1), ("2.bias", 0, 1), ("3.weight", 1, 1)}]
    halves = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    assert verified(halves, IMAGES) == ()
    whole = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1))
    assert ("1.bias", 0, 1) in axes_of(verified(whole, IMAGES))[0]


def test_layernorm_over_channels_and_positions() -> None:
    def forward(m: Lambda, x: torch.Tensor) -> torch.Tensor:
        tokens = m.patch(x).flatten(2).transpose(1, 2) + m.positions
        return m.head((m.norm(tokens) * m.gamma).mean(dim=1))

    module = Lambda(
        forward,
        patch=nn.Conv2d(3, 6, 4, stride=4),
        positions=nn.Parameter(torch.zeros(1, 4, 6)),
        norm=nn.LayerNorm(6),
        gamma=nn.Parameter(torch.ones(6)),
        head=nn.Linear(6, 2),
    )
    channels = next(group for group in axes_of(verified(module, IMAGES)) if ("patch.weight", 0, 1) in group)
    assert {("positions", 2, 1), ("norm.weight", 0, 1), ("gamma", 0, 1), ("head.weight", 1, 1)} <= channels


def test_transposed_convolution_prelu_and_upsampling() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.PReLU(4),
        nn.Upsample(scale_factor=2),
        nn.ConvTranspose2d(4, 5, 2, stride=2),
        nn.InstanceNorm2d(5, affine=True),
        nn.Conv2d(5, 1, 1),
    )
    first, second = axes_of(verified(module, IMAGES))
    assert first == {("0.weight", 0, 1), ("0.bias", 0, 1), ("1.weight", 0, 1), ("3.weight", 0, 1)}
    assert {("3.weight", 1, 1), ("3.bias", 0, 1), ("4.weight", 0, 1), ("5.weight", 1, 1)} <= second


def test_embedding_columns_move_and_rows_stay() -> None:
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    assert axes_of(verified(module, torch.tensor([[1, 2], [3, 4]]))) == [{("0.weight", 1, 1), ("1.weight", 1, 1)}]


def test_functional_layers_and_plain_matrix_products() -> None:
    def forward(m: Lambda, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ m.a + m.bias) @ m.b

    parts = {"a": (5, 4), "bias": (4,), "b": (4, 2)}
    module = Lambda(forward, **{name: nn.Parameter(torch.randn(shape)) for name, shape in parts.items()})
    assert axes_of(verified(module, ROWS)) == [{("a", 1, 1), ("bias", 0, 1), ("b", 0, 1)}]


def test_tied_weights_only_move_where_all_uses_agree() -> None:
    shared = nn.Linear(4, 4)
    consistent = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), shared, nn.ReLU(), shared, nn.Linear(4, 2))
    (group,) = axes_of(verified(consistent, ROWS))
    assert {("0.weight", 0, 1), ("2.weight", 0, 1), ("2.weight", 1, 1), ("5.weight", 1, 1)} <= group

    autoencoder = Lambda(lambda m, x: F.linear(torch.relu(m.enc(x)), m.enc.weight.T), enc=nn.Linear(5, 3))
    assert axes_of(verified(autoencoder, ROWS)) == [{("enc.weight", 0, 1), ("enc.bias", 0, 1)}]

    first, last = nn.Linear(5, 5), nn.Linear(5, 5)
    last.weight = first.weight
    inputs_too = nn.Sequential(first, nn.ReLU(), last)
    assert trace(inputs_too, ROWS)[0] == ()
    architecture = architecture_of(inputs_too, ROWS)
    assert architecture.aliases == (("2.weight", "0.weight"),)
    assert {t.name for t in architecture.tensors} == {"0.weight", "0.bias", "2.bias"}


def test_what_is_not_understood_stays_fixed() -> None:
    module = Lambda(lambda m, x: m.b(m.a(x).cumsum(1)), a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    assert trace(module, ROWS)[0] == ()
    module = Lambda(lambda m, x: m.b(m.a(x)[:, [0, 0, 1, 2]]), a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    assert trace(module, ROWS)[0] == ()
    gated = nn.Sequential(nn.Linear(5, 8), nn.GLU(), nn.Linear(4, 2))
    assert axes_of(verified(gated, ROWS)) == []


def test_attention_stays_fixed_but_the_rest_of_a_transformer_moves() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True)
    module = nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 2))
    groups = axes_of(verified(module, torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))))
    assert {("1.linear1.weight", 0, 1), ("1.linear1.bias", 0, 1), ("1.linear2.weight", 1, 1)} in groups


LANGUAGE_MODELS = {
    "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=1, n_head=2, n_inner=9)),
    "llama": LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=9,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ),
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("tokens", [[[1, 2, 3], [3, 2, 1]], [[1]]])
def test_language_models(kind: str, tokens: list[list[int]]) -> None:
    module, parts = LANGUAGE_MODELS[kind], {"gpt2": ("c_fc", "c_proj"), "llama": ("up_proj", "down_proj")}[kind]
    architecture = architecture_of(module, torch.tensor(tokens))
    assert architecture.ordered and architecture.notes == ()
    (group,) = architecture.groups
    assert group.size == 9
    assert set(parts) <= {axis.tensor.split(".")[-2] for axis in group.axes}
    assert module.config.use_cache


def test_a_rule_that_does_not_expect_its_operation_fixes_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operations._RULES, "tanh", lambda op: op["self"][:1])
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    assert [group.size for group in verified(module, ROWS)] == [4]
    monkeypatch.setitem(operations._RULES, "tanh", lambda op: op["self"][7])
    assert [group.size for group in verified(module, ROWS)] == [4]


def test_a_module_that_needs_float32_says_so() -> None:
    module = Lambda(lambda m, x: m.fc(x.to(torch.float32)), fc=nn.Linear(5, 4))
    (note,) = architecture_of(module, ROWS).notes
    assert note.startswith("Permutation groups are left out: Lambda does not run in float64 (")


def test_the_module_is_not_changed() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = copy.deepcopy(module.state_dict())
    architecture_of(module, ROWS)
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


class TestVerify:
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))

    def check(self, group: PermutationGroup) -> bool:
        return verify_groups(self.module, [group], ROWS, torch.Generator().manual_seed(0)) == (group,)

    def test_right_groups_pass(self) -> None:
        (group,) = trace(self.module, ROWS)[0]
        assert self.check(group)

    @pytest.mark.parametrize("missing", range(7))
    def test_a_group_without_one_of_its_axes_is_rejected(self, missing: int) -> None:
        # Biases start at zero and norm scales at one: only drawn weights reveal that they are missing.
        (group,) = trace(self.module, ROWS)[0]
        assert len(group.axes) == 7
        assert not self.check(replace(group, axes=group.axes[:missing] + group.axes[missing + 1 :]))

    def test_wrong_channels_are_rejected(self) -> None:
        assert not self.check(PermutationGroup(3, (GroupAxis("3.weight", 0), GroupAxis("3.bias", 0))))
        assert not self.check(PermutationGroup(5, (GroupAxis("0.weight", 1),)))
        assert not self.check(PermutationGroup(2, (GroupAxis("0.weight", 0, 2), GroupAxis("3.weight", 1, 2))))

    def test_groups_that_fit_no_tensor_are_rejected(self) -> None:
        assert not self.check(PermutationGroup(4, (GroupAxis("9.weight", 0),)))
        assert not self.check(PermutationGroup(5, (GroupAxis("0.weight", 0),)))
        assert not self.check(PermutationGroup(4, (GroupAxis("0.weight", 2),)))

    def test_a_wrong_group_among_right_ones_is_dropped(self) -> None:
        (group,) = trace(self.module, ROWS)[0]
        wrong = PermutationGroup(4, (GroupAxis("3.weight", 1),))
        assert verify_groups(self.module, [wrong, group], ROWS, torch.Generator().manual_seed(0)) == (group,)


def test_architecture_of_orders_layers_as_they_run() -> None:
    def forward(m: Lambda, x: torch.Tensor) -> torch.Tensor:
        return m.alpha(m.norm(m.zeta(x)))

    module = Lambda(forward, alpha=nn.Linear(4, 2), norm=nn.BatchNorm1d(4), zeta=nn.Linear(5, 4), spare=nn.Linear(4, 4))
    architecture = architecture_of(module, ROWS)
    assert [layer.name for layer in architecture.layers] == ["zeta", "norm", "alpha", "spare"]
    assert architecture.ordered
    assert len(architecture.groups) == 1
    assert any("spare" in note for note in architecture.notes)
    assert [e.tensor for e in architecture.exclusions] == ["norm.num_batches_tracked"]


def test_untraceable_modules_say_so() -> None:
    def forward(m: Lambda, x: torch.Tensor) -> torch.Tensor:
        return m.fc(x) if float(x.sum()) > 0 else -m.fc(x)

    module = Lambda(forward, fc=nn.Linear(5, 4))
    with pytest.raises(ArchitectureError, match="Lambda cannot be traced"):
        trace(module, ROWS)[0]
    architecture = architecture_of(module, ROWS)
    assert not architecture.ordered
    assert not architecture.groups
    assert "cannot be traced" in architecture.notes[0]
