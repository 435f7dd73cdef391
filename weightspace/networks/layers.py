"""Tensor names and shapes -> layers: which tensors belong together, and what they are."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from weightspace.schema import LayerKind, LayerSpec, TensorSpec

_NORM_NAME = re.compile(r"norm|(^|[._])(bn|ln|gn)\d*$", re.IGNORECASE)
_EMBEDDING_NAME = re.compile(r"embed|(^|[._])(emb|wte|wpe)\d*$", re.IGNORECASE)
_CONV_AXES = (3, 4, 5)
_NORM_COMPANIONS = {
    "weight": ("bias", "running_mean", "running_var"),
    "gamma": ("beta", "running_mean", "running_var"),
    "running_mean": ("running_var",),
}


def natural_key(name: str) -> tuple[object, ...]:
    """Builds a sort key that puts ``fc2`` before ``fc10``: digits compare as numbers, of any length."""
    parts = re.split(r"([0-9]+)", name)
    digits = [part.lstrip("0") for part in parts[1::2]]
    numbers = [*((len(part), part) for part in digits), (-1, "")]
    # Texts and numbers take turns, so that keys only ever compare like with like; the name tells 1 from 01.
    return (*(item for pair in zip(parts[::2], numbers, strict=True) for item in pair), name)


def exclusion_reason(spec: TensorSpec) -> str | None:
    """Says why a tensor cannot become tokens, or None if it can: only non-empty floats of at least one byte do."""
    if spec.numel == 0:
        return f"empty tensor of shape {spec.shape}"
    if spec.dtype == "BOOL":
        return "booleans, not floating point"
    if spec.dtype[0] in "IU":
        return f"integers ({spec.dtype}), not floating point"
    if spec.dtype[0] == "C":
        return f"complex numbers ({spec.dtype})"
    if spec.dtype in ("F64", "F32", "F16", "BF16") or spec.dtype.startswith("F8_"):
        return None
    return f"{spec.dtype} is no floating point type of whole bytes"


def group_layers(specs: Iterable[TensorSpec]) -> tuple[LayerSpec, ...]:
    """Groups tensors into layers by their names, in natural order of the layers' names; every tensor is in one layer.

    A weight takes the bias beside it (``fc.weight``, ``fc.bias``; ``rnn.weight_ih_l0``, ``rnn.bias_ih_l0``) if that has
    an entry for each row; a norm layer is its scale, shift and running statistics; whatever is left stands alone. A
    layer goes by what its tensors' names have in common, or by its first tensor where something else has that name.
    """
    free = {spec.name: spec for spec in sorted(specs, key=lambda spec: natural_key(spec.name))}
    taken, layers = set(free), []
    # Weights claim their companions first, so that a bias is alone only where no weight wants it.
    for name in (*filter(_leads, free), *free):
        if name in free:
            first = free.pop(name)
            found = [companion for companion in _companions(first) if companion in free]
            fitting = [companion for companion in found if first.shape and free[companion].shape == first.shape[:1]]
            layers.append(_layer((first, *map(free.pop, fitting)), taken))
            taken.add(layers[-1].name)
    return tuple(sorted(layers, key=lambda layer: natural_key(layer.name)))


def _leads(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return "weight" in leaf or leaf == "gamma"


def _companions(spec: TensorSpec) -> list[str]:
    prefix, dot, leaf = spec.name.rpartition(".")
    is_matrix = "weight" in leaf and len(spec.shape) > 1
    leaves = (leaf.replace("weight", "bias"),) if is_matrix else _NORM_COMPANIONS.get(leaf, ())
    return [f"{prefix}{dot}{other}" for other in leaves]


def _layer(tensors: tuple[TensorSpec, ...], taken: Container[str]) -> LayerSpec:
    """Builds a layer whose name is none of ``taken``, which holds the names of all tensors."""
    first = tensors[0]
    prefix, _, leaf = first.name.rpartition(".")
    named = prefix and (leaf == "weight" or (len(tensors) > 1 and leaf in ("gamma", "running_mean")))
    kind = _kind(tensors, prefix if named else first.name, leaf)
    name = prefix if named and prefix not in taken else first.name
    return LayerSpec(name, kind, tensors, "channels" if len(first.shape) > 1 else "vectors")


def _kind(tensors: tuple[TensorSpec, ...], name: str, leaf: str) -> LayerKind:
    axes = len(tensors[0].shape)
    if axes <= 1:
        is_norm = len(tensors) > 1 or (leaf == "weight" and _NORM_NAME.search(name))
        return "norm" if is_norm else "vector"
    if leaf != "weight":
        return "other"
    if axes in _CONV_AXES:
        return "conv"
    if axes > max(_CONV_AXES):
        return "other"
    return "embedding" if len(tensors) == 1 and _EMBEDDING_NAME.search(name) else "linear"
