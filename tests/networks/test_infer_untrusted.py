"""A config.json is a stranger's: nothing is sized by it before it is compared with the tensors."""

from __future__ import annotations

import pytest
import torch

from weightspace.errors import ArchitectureError, SettingsError
from weightspace.networks.families import CNNConfig, FamilyConfig, MLPConfig
from weightspace.networks.infer import infer_architecture
from weightspace.schema import TensorSpec

MLP = MLPConfig((1, 2, 2), 3, (4,))


def specs(family: FamilyConfig, prefix: str = "") -> list[TensorSpec]:
    return [TensorSpec(prefix + name, shape, "F32") for name, shape in family.shapes().items()]


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": [10**12]},
        {"hidden": [10**18], "classes": 10**18},
        {"hidden": [10**30]},
        {"hidden": [4] * 10**5},
        {"image_shape": [1, 10**6, 10**6]},
        {"classes": 10**9},
    ],
)
def test_sizes_that_the_tensors_contradict_are_refused(change: dict[str, object]) -> None:
    with pytest.raises((ArchitectureError, SettingsError), match=r"the config describes|mlp config: ") as caught:
        infer_architecture(specs(MLP), config=MLP.to_dict() | change)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module.module."])
def test_wrapped_networks_of_the_families_have_their_order_and_groups(prefix: str) -> None:
    family = CNNConfig((1, 8, 8), 3, (4, 5))
    plain = infer_architecture(specs(family), config=family.to_dict())
    wrapped = infer_architecture(specs(family, prefix), config=family.to_dict())
    assert wrapped.ordered and wrapped.notes == plain.notes
    assert [layer.name for layer in wrapped.layers] == [prefix + layer.name for layer in plain.layers]
    assert [[axis.tensor for axis in group.axes] for group in wrapped.groups] == [
        [prefix + axis.tensor for axis in group.axes] for group in plain.groups
    ]
    assert torch.is_grad_enabled()
