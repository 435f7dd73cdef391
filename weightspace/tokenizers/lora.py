"""Tokens of LoRA adapters that do not depend on which of the many equal factors are stored."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.errors import TokenError
from weightspace.io.adapters import LoraPair, find_pairs
from weightspace.networks.flat import flat_dtype, unflatten
from weightspace.schema import Architecture, LayerSpec, TensorSpec
from weightspace.tokenizers.base import ReadEntries, TokenWindow
from weightspace.tokenizers.rows import ChannelTokenizer


@dataclass(frozen=True)
class LoraTokenizer(ChannelTokenizer):
    """A row ``[a_k | b_k]`` for each rank-one component of a module's update; other tensors as `ChannelTokenizer` does.

    A model without factors has exactly the tokens of `ChannelTokenizer`, so that adapters and whole models can share an
    encoder.

    Components come in the form of `canonical_factors`, the largest first, so that ``(B G, inv(G) A)`` has the tokens of
    ``(B, A)`` up to rounding, and a rank that is not used is rows of zeros. What comes back from tokens is the same
    update with other factors. Tensors that are no factors (whole modules, magnitudes, biases) come back bit for bit.

    Factors are found by names and shapes (`find_pairs`); A and B of a module count as one layer. Scaling is no part of
    the tensors: `weightspace.io.peft.fold_scaling` makes adapters of different alpha comparable. ``detokenize_batch``
    is differentiable everywhere, ``tokenize_batch`` where singular values differ and are not zero.
    """

    name: ClassVar[str] = "lora"
    exact: ClassVar[bool] = False

    def applies_to(self, architecture: Architecture) -> bool:
        """Whether there is a pair of factors among the tensors."""
        return bool(_arrange(architecture.layers).pairs)

    def arrange(self, architecture: Architecture) -> Architecture:
        """Returns the architecture with the rows ``[a_k | b_k]``; the same object where there are no factors."""
        arranged = _arrange(architecture.layers)
        return replace(architecture, layers=arranged.layers) if arranged.pairs else architecture

    def transform(
        self, tensors: dict[str, Float[Tensor, "models ..."]], architecture: Architecture
    ) -> Mapping[str, Float[Tensor, "models ..."]]:
        """Brings the factors of each pair into canonical form, B transposed."""
        return tensors | _canonical(tensors, _arrange(architecture.layers).pairs)

    def tokenize_windows(
        self, read: ReadEntries, architecture: Architecture, windows: Sequence[tuple[int, int]]
    ) -> list[TokenWindow]:
        """Turns stretches of the token sequence into tokens; both factors of each module in them are read whole."""
        partners = _partners(architecture)
        dtype = flat_dtype(architecture)

        def read_canonical(stretches: Sequence[tuple[str, int, int]]) -> list[Tensor]:
            pairs = tuple(dict.fromkeys(partners[name] for name, _, _ in stretches if name in partners))
            factors = [spec for pair in pairs for spec in (pair.a, pair.b)]
            others = [stretch for stretch in stretches if stretch[0] not in partners]
            contents = read([*((spec.name, 0, spec.numel) for spec in factors), *others])
            whole = {spec.name: content.to(dtype)[None] for spec, content in zip(factors, contents, strict=False)}
            for name, content in whole.items():
                if not content.isfinite().all():
                    raise TokenError(f"{name}: holds NaN or infinite entries; leave this adapter out")
            canonical, rest = _canonical(whole, pairs), iter(contents[len(factors) :])
            return [canonical[n].flatten()[i:j] if n in canonical else next(rest) for n, i, j in stretches]

        return super().tokenize_windows(read_canonical, architecture, windows)

    def window_entries(self, architecture: Architecture, windows: Sequence[tuple[int, int]]) -> Mapping[str, int]:
        """Counts the entries of each tensor that `tokenize_windows` reads for these windows."""
        counts = super().window_entries(architecture, windows)
        partners = _partners(architecture)
        touched = dict.fromkeys(partners[name] for name in counts if name in partners)
        return {**counts, **{spec.name: spec.numel for pair in touched for spec in (pair.a, pair.b)}}

    def detokenize_batch(
        self, tokens: Float[Tensor, "models n d"], architecture: Architecture
    ) -> Float[Tensor, "models params"]:
        """Turns tokens of one architecture into flat weight vectors; see `WeightTokenizer.detokenize_batch`."""
        flat = super().detokenize_batch(tokens, architecture)
        if not self.applies_to(architecture):
            return flat
        tensors = unflatten(flat, self.arrange(architecture))
        for pair in _arrange(architecture.layers).pairs:
            groups, rank, _, outputs = _sizes(pair)
            tensors[pair.b.name] = tensors[pair.b.name].reshape(len(tokens), groups, rank, outputs).mT
        return torch.cat([tensors[spec.name].reshape(len(tokens), spec.numel) for spec in architecture.tensors], dim=1)


def canonical_factors(
    a: Float[Tensor, "*batch rank inputs"], b: Float[Tensor, "*batch outputs rank"]
) -> tuple[Float[Tensor, "*batch rank inputs"], Float[Tensor, "*batch outputs rank"]]:
    """Returns ``sqrt(S) V^T`` and ``U sqrt(S)`` of the singular value decomposition ``b @ a = U S V^T``.

    ``b = Q R`` and ``a^T = P T`` leave the decomposition of ``R T^T``, which is rank x rank: the product itself is not
    formed. Of the two signs that a pair of singular vectors can have, that one is taken that makes the sum of the cubes
    of ``[a_k | b_k]`` positive. Singular values that are nothing but rounding, below rank times the dtype's precision
    of the largest, become zero. Where singular values are equal, or a sum of cubes is zero, more than one answer is
    right, and equal products may get different factors.
    """
    rank = a.shape[-2]
    left, left_mix = torch.linalg.qr(b.double())
    right, right_mix = torch.linalg.qr(a.double().mT)
    u, singular, vt = torch.linalg.svd(left_mix @ right_mix.mT, full_matrices=False)
    least = rank * torch.finfo(a.dtype).eps * singular.amax(-1, keepdim=True)
    root = torch.where(singular > least, singular, 0.0).sqrt().unsqueeze(-2)
    rows, columns = (right @ (vt.mT * root)).mT, left @ (u * root)
    skew = rows.pow(3).sum(-1) + columns.pow(3).sum(-2)
    sign = torch.where(skew < 0, -1.0, 1.0)
    rows, columns = rows * sign.unsqueeze(-1), columns * sign.unsqueeze(-2)
    # A rank above the number of inputs or outputs has components that cannot be used.
    unused = rank - singular.shape[-1]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, unused))
    columns = torch.nn.functional.pad(columns, (0, unused))
    return rows.to(a.dtype), columns.to(b.dtype)


def _canonical(tensors: Mapping[str, Tensor], pairs: Sequence[LoraPair]) -> dict[str, Tensor]:
    """Returns the canonical A and the transpose of the canonical B of each pair, row after row."""
    found: dict[str, Tensor] = {}
    # Modules of equal shapes are brought into canonical form together.
    alike: dict[tuple[int, int, int, int], list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        alike[_sizes(pair)].append(pair)
    for (groups, rank, inputs, outputs), members in alike.items():
        a = torch.stack([tensors[pair.a.name].reshape(-1, groups, rank, inputs) for pair in members])
        b = torch.stack([tensors[pair.b.name].reshape(-1, groups, outputs, rank) for pair in members])
        for pair, rows, columns in zip(members, *canonical_factors(a, b), strict=True):
            found |= {pair.a.name: rows, pair.b.name: columns.mT}
    return found


@dataclass(frozen=True)
class _Arrangement:
    """Layers with A and the transpose of B side by side, and the pairs that they are made of."""

    layers: tuple[LayerSpec, ...]
    pairs: tuple[LoraPair, ...]


@lru_cache(maxsize=64)
def _arrange(layers: tuple[LayerSpec, ...]) -> _Arrangement:
    pairs, _ = find_pairs(tensor for layer in layers for tensor in layer.tensors)
    by_factor = {pair.a.name: pair for pair in pairs}
    factors = by_factor.keys() | {pair.b.name for pair in pairs}
    arranged: list[LayerSpec] = []
    for layer in layers:
        arranged += [_paired(by_factor[spec.name]) for spec in layer.tensors if spec.name in by_factor]
        rest = tuple(spec for spec in layer.tensors if spec.name not in factors)
        if len(rest) == len(layer.tensors):
            arranged.append(layer)
        elif rest:
            arranged.append(LayerSpec(rest[0].name, "vector", rest, "vectors"))
    return _Arrangement(tuple(arranged), pairs)


def _partners(architecture: Architecture) -> dict[str, LoraPair]:
    """Returns the pair that each factor belongs to, by the factor's name."""
    return {spec.name: pair for pair in _arrange(architecture.layers).pairs for spec in (pair.a, pair.b)}


def _paired(pair: LoraPair) -> LayerSpec:
    # Rows as in any layer of channels, though the second tensor has more than the one axis of a bias.
    _, _, _, outputs = _sizes(pair)
    transposed = TensorSpec(pair.b.name, (pair.rank, outputs), pair.b.dtype)
    return LayerSpec(pair.module, "other", (pair.a, transposed), "channels")


def _sizes(pair: LoraPair) -> tuple[int, int, int, int]:
    """Groups, and each group's rank, inputs and outputs."""
    groups = pair.groups
    return groups, pair.rank // groups, math.prod(pair.a.shape[1:]), pair.b.shape[0] // groups
