from __future__ import annotations

from weightspace.networks.layers import group_layers
from weightspace.schema import LayerSpec, TensorSpec


def group(**shapes: tuple[int, ...]) -> tuple[LayerSpec, ...]:
    return group_layers(TensorSpec(name, shape, "F32") for name, shape in shapes.items())


def test_a_layer_goes_by_what_its_tensors_have_in_common() -> None:
    assert [layer.name for layer in group(**{"fc.weight": (3, 2), "fc.bias": (3,), "cls_token": (2,)})] == [
        "cls_token",
        "fc",
    ]


def test_names_of_layers_are_unique_whatever_the_names_of_tensors() -> None:
    nested = group(**{"a.a": (3,), "a.a.weight": (3, 2), "a.a.weight.weight": (2, 2)})
    assert [layer.name for layer in nested] == ["a.a", "a.a.weight", "a.a.weight.weight"]
    beside = group(
        **{"a.weight": (2, 3), "a.gamma": (4,), "a.beta": (4,), "a.running_mean": (5,), "a.running_var": (5,)}
    )
    assert [layer.name for layer in beside] == ["a", "a.running_mean", "a.weight"]
    assert [len(layer.tensors) for layer in beside] == [2, 2, 1]


def test_the_kind_does_not_depend_on_a_clash_of_names() -> None:
    kinds = {layer.name: layer.kind for layer in group(**{"norm": (3,), "norm.weight": (3,)})}
    assert kinds == {"norm": "vector", "norm.weight": "norm"}
