"""What every tokenizer does: rows of layers to tokens and back.

A layer is a stack of equal rows (``LayerSpec``), and a tokenizer says how far apart the starts of two rows are in the
token sequence. All else follows: tensors are copied by whole slices between two strided views of the same rows, so that
no index list of the size of the weights is ever built.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weightspace.errors import ArchitectureError, SettingsError, TokenError
from weightspace.networks.flat import flat_dtype, flatten, restore, split_off, unflatten
from weightspace.schema import Architecture, LayerSpec, TensorSpec, WeightTokens

# Masks above this many entries are built anew for each use: a cache must not hold on to the memory of huge models.
LARGEST_CACHED_MASK = 1 << 23


@dataclass(frozen=True)
class TokenLayout:
    """What the tokens of one architecture have in common. The tensors are shared between models: do not write to them.

    Attributes:
        mask: ``(n, d)``, true where an entry is a weight and not padding.
        positions: ``(n, 3)`` columns token, layer, channel: running number, layer number, row of the layer that the
            token's first entry belongs to.
    """

    mask: Bool[Tensor, "n d"]
    positions: Int[Tensor, "n 3"]


@dataclass(frozen=True)
class TokenWindow:
    """A stretch of a model's token sequence.

    Attributes:
        tokens: ``(n, d)`` entries; zero where ``mask`` is false.
        mask: ``(n, d)``, true where an entry is a weight and not padding.
        positions: ``(n, 3)`` as in `TokenLayout`: the running number counts from the model's first token.
    """

    tokens: Float[Tensor, "n d"]
    mask: Bool[Tensor, "n d"]
    positions: Int[Tensor, "n 3"]


ReadEntries = Callable[[Sequence[tuple[str, int, int]]], Sequence[Tensor]]
"""Reads stretches of flattened tensors: tensor name, first entry, entry after the last."""


@dataclass(frozen=True)
class _WindowPart:
    """Entries ``start`` to ``stop`` of a flattened tensor: row r, column c stands at ``origin + r * stride + c``."""

    tensor: str
    start: int
    stop: int
    width: int
    stride: int
    origin: int

    def places(self) -> Int[Tensor, " entries"]:
        """Returns where the entries stand in the flattened token sequence."""
        entries = torch.arange(self.start, self.stop)
        return self.origin + entries // self.width * self.stride + entries % self.width


@dataclass(frozen=True)
class _Block:
    """Equal rows, ``stride`` entries apart: a layer in the layout "channels", or one tensor in the layout "vectors".

    Attributes:
        tensors: the tensors that lie side by side in a row, in this order.
        widths: entries a row of each tensor.
        start: first entry in the flattened token sequence.
        end: first entry after the block and the padding that follows it.
        layer: number of the layer.
        row: number of the first row within the layer.
    """

    tensors: tuple[TensorSpec, ...]
    widths: tuple[int, ...]
    rows: int
    stride: int
    start: int
    end: int
    layer: int
    row: int

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def padding(self) -> int:
        """Entries between the last row and ``end``."""
        return self.end - self.start - self.rows * self.stride


@dataclass(frozen=True)
class WeightTokenizer(ABC):
    """Turns the tensors of a model into tokens of ``token_size`` entries, and back bit for bit.

    Floating point tensors of any width become tokens, exactly: in float64 where one of them is F64, in float32
    otherwise. All else (integers, booleans, complex numbers, empty tensors) is carried beside the tokens as
    ``Architecture.exclusions`` says. A layer starts a new token.

    Subclasses set ``name`` and say in ``row_stride`` where rows start.
    """

    token_size: int
    name: ClassVar[str]
    exact: ClassVar[bool] = True
    """Whether every tensor comes back bit for bit; otherwise the class says what does."""

    def __post_init__(self) -> None:
        """Checks the token size.

        Raises:
            SettingsError: ``token_size`` is below 1.
        """
        if self.token_size < 1:
            raise SettingsError(f"token_size: {self.token_size} is no size; take 1 or more, e.g. 64")

    @abstractmethod
    def row_stride(self, width: int) -> int:
        """Returns how many entries after a row of ``width`` entries the next row of the layer starts; >= ``width``."""

    def applies_to(self, architecture: Architecture) -> bool:
        """Whether models of this architecture have what sets this tokenizer apart from the others."""
        return True

    def arrange(self, architecture: Architecture) -> Architecture:
        """Returns the architecture whose rows become tokens: the model's, unless a tokenizer transforms tensors."""
        return architecture

    def transform(
        self, tensors: dict[str, Float[Tensor, "models ..."]], architecture: Architecture
    ) -> Mapping[str, Float[Tensor, "models ..."]]:
        """Returns the tensors whose rows become tokens, with the entries that `arrange` describes."""
        return tensors

    def _blocks(self, architecture: Architecture) -> tuple[_Block, ...]:
        # The key is the layers, not the digest: the digest is equal for layers in another order.
        return _blocks(self, self.arrange(architecture).layers)

    def token_count(self, architecture: Architecture) -> int:
        """Returns the number of tokens of a model, without building a mask."""
        return _length(self._blocks(architecture)) // self.token_size

    def layout(self, architecture: Architecture) -> TokenLayout:
        """Returns mask and positions of the tokens; cached, except for huge models.

        Raises:
            ArchitectureError: a layer's tensors do not form rows.
        """
        blocks = self._blocks(architecture)
        build = _layout if _length(blocks) <= LARGEST_CACHED_MASK else _layout.__wrapped__
        return build(blocks, self.token_size)

    def tokenize(self, tensors: Mapping[str, Tensor], architecture: Architecture) -> WeightTokens:
        """Turns one model into tokens.

        Args:
            tensors: the model by name, of any strides, excluded tensors included; aliases may be there or not.
            architecture: its specs.

        Raises:
            ArchitectureError: a tensor is missing, unknown, or has another shape or dtype.
            TokenError: a tensor that becomes tokens holds NaN or infinite entries.
        """
        passthrough = split_off(tensors, architecture)
        layout = self.layout(architecture)
        flat = flatten(tensors, architecture).detach()
        _ensure_finite(flat, tensors, architecture)
        tokens = self.tokenize_batch(flat[None], architecture)[0]
        return WeightTokens(tokens, layout.mask, layout.positions, architecture, passthrough)

    def tokenize_windows(
        self, read: ReadEntries, architecture: Architecture, windows: Sequence[tuple[int, int]]
    ) -> list[TokenWindow]:
        """Turns stretches of the token sequence into tokens, from the entries in them and no others.

        Args:
            read: reads stretches of flattened tensors, as `Checkpoint.entries` does; it is called once.
            architecture: of the model.
            windows: first token and token after the last, for each window; within ``token_count(architecture)``.

        Raises:
            ArchitectureError: a layer's tensors do not form rows.
            TokenError: an entry is NaN or infinite.
        """
        blocks = self._blocks(architecture)
        plans = [_window_parts(blocks, self.token_size * start, self.token_size * stop) for start, stop in windows]
        contents = iter(read([(part.tensor, part.start, part.stop) for plan in plans for part in plan]))
        found = []
        for (start, stop), plan in zip(windows, plans, strict=True):
            entries = torch.zeros(self.token_size * (stop - start), dtype=flat_dtype(architecture))
            mask = torch.zeros(len(entries), dtype=torch.bool)
            for part in plan:
                content = next(contents).to(entries.dtype)
                if not _finite(content):
                    raise TokenError(
                        f"{part.tensor}: entries {part.start} to {part.stop} hold NaN or infinite values; "
                        "replace them with torch.nan_to_num or leave this model out"
                    )
                places = part.places() - self.token_size * start
                entries[places] = content
                mask[places] = True
            positions = _positions(blocks, torch.arange(start, stop), self.token_size)
            shape = (stop - start, self.token_size)
            found.append(TokenWindow(entries.view(shape), mask.view(shape), positions))
        return found

    def window_entries(self, architecture: Architecture, windows: Sequence[tuple[int, int]]) -> Mapping[str, int]:
        """Counts the entries of each tensor that `tokenize_windows` reads for these windows."""
        blocks = self._blocks(architecture)
        counts: dict[str, int] = {}
        for start, stop in windows:
            for part in _window_parts(blocks, self.token_size * start, self.token_size * stop):
                counts[part.tensor] = counts.get(part.tensor, 0) + part.stop - part.start
        return counts

    def detokenize(self, tokens: WeightTokens) -> dict[str, Tensor]:
        """Turns tokens into the tensors of a model as they were stored: dtypes, aliases and excluded tensors included.

        Raises:
            TokenError: the tokens have another shape than the architecture gives.
            ArchitectureError: an excluded tensor is not in ``tokens.passthrough``.
        """
        flat = self.detokenize_batch(tokens.tokens[None], tokens.architecture)[0]
        return restore(flat, tokens.architecture, tokens.passthrough)

    def tokenize_batch(
        self, flat: Float[Tensor, "models params"], architecture: Architecture
    ) -> Float[Tensor, "models n d"]:
        """Turns flat weight vectors of one architecture into tokens, in the dtype and on the device of ``flat``.

        Entries are not checked to be finite: that is done where models enter, by ``tokenize`` and by the zoo.

        Raises:
            ArchitectureError: the vectors have another length than the architecture.
        """
        sources = self.transform(unflatten(flat, architecture), architecture)
        tokens = flat.new_empty(len(flat), self.token_count(architecture), self.token_size)
        for spec, target in _targets(tokens, self._blocks(architecture)):
            target.copy_(sources[spec.name].reshape(target.shape))
        return tokens

    def detokenize_batch(
        self, tokens: Float[Tensor, "models n d"], architecture: Architecture
    ) -> Float[Tensor, "models params"]:
        """Turns tokens of one architecture into flat weight vectors; differentiable, padding gets no gradient.

        The vectors are those of `arrange`; a tokenizer that transforms tensors undoes it.

        Raises:
            TokenError: the tokens have another shape than the architecture gives.
        """
        blocks = self._blocks(architecture)
        expected = (_length(blocks) // self.token_size, self.token_size)
        if tuple(tokens.shape[1:]) != expected:
            raise TokenError(
                f"tokens: expected shape {expected} a model, found {tuple(tokens.shape[1:])}; "
                "detokenize with the tokenizer and the architecture that made them"
            )
        sources = [source.flatten(1) if tokens.requires_grad else source for source in _sources(tokens, blocks)]
        if tokens.requires_grad and sources:
            return torch.cat(sources, dim=1)
        flat = tokens.new_empty(len(tokens), architecture.numel)
        for target, source in zip(unflatten(flat, self.arrange(architecture)).values(), sources, strict=True):
            target.view(source.shape).copy_(source)
        return flat


@lru_cache(maxsize=64)
def _blocks(tokenizer: WeightTokenizer, layers: tuple[LayerSpec, ...]) -> tuple[_Block, ...]:
    """Lays out all layers one after another, each from the start of a token."""
    blocks: list[_Block] = []
    start = 0
    for number, layer in enumerate(layers):
        row = 0
        for rows, tensors in _stacks(layer):
            widths = tuple(tensor.numel // rows for tensor in tensors)
            stride = tokenizer.row_stride(sum(widths))
            blocks.append(_Block(tensors, widths, rows, stride, start, start + rows * stride, number, row))
            start = blocks[-1].end
            row += rows
        start = math.ceil(start / tokenizer.token_size) * tokenizer.token_size
        blocks[-1] = replace(blocks[-1], end=start)
    return tuple(blocks)


def _stacks(layer: LayerSpec) -> list[tuple[int, tuple[TensorSpec, ...]]]:
    """Returns numbers of rows, each with the tensors that lie side by side in these rows."""
    if layer.layout == "channels":
        stacks = [(math.prod(layer.tensors[0].shape[:1]), layer.tensors)]
    else:
        stacks = [(1, (tensor,)) for tensor in layer.tensors]
    for rows, tensors in stacks:
        for tensor in tensors:
            if not tensor.numel or (rows > 1 and tensor.shape[:1] != (rows,)):
                raise ArchitectureError(
                    f"{tensor.name}: shape {tensor.shape} does not form {rows} rows of layer {layer.name!r}; "
                    "put it in a layer of its own or exclude it"
                )
    return stacks


def _length(blocks: tuple[_Block, ...]) -> int:
    return blocks[-1].end if blocks else 0


@lru_cache(maxsize=32)
def _layout(blocks: tuple[_Block, ...], token_size: int) -> TokenLayout:
    mask = torch.empty(_length(blocks) // token_size, token_size, dtype=torch.bool)
    for _, target in _targets(mask[None], blocks):
        target.fill_(True)
    return TokenLayout(mask, _positions(blocks, torch.arange(len(mask)), token_size))


def _positions(blocks: tuple[_Block, ...], tokens: Int[Tensor, " n"], token_size: int) -> Int[Tensor, "n 3"]:
    """Returns running number, layer and row of the given tokens."""
    first_entries = tokens * token_size
    starts, strides, layers, rows = (
        torch.tensor([(block.start, block.stride, block.layer, block.row) for block in blocks], dtype=torch.int64)
        .view(-1, 4)
        .unbind(1)
    )
    at = torch.searchsorted(starts.contiguous(), first_entries, right=True) - 1
    channels = rows[at] + (first_entries - starts[at]) // strides[at]
    return torch.stack([tokens, layers[at], channels], dim=1)


def _window_parts(blocks: tuple[_Block, ...], start: int, stop: int) -> list[_WindowPart]:
    """Finds the entries that stand between two places of the flattened token sequence."""
    parts = []
    first = bisect_right(blocks, start, key=lambda block: block.start) - 1
    for block in blocks[first:]:
        if block.start >= stop:
            break
        low, high = (min(max(place - block.start, 0), block.rows * block.stride) for place in (start, stop))
        column = 0
        for spec, width in zip(block.tensors, block.widths, strict=True):
            begin, end = (
                place // block.stride * width + min(max(place % block.stride - column, 0), width)
                for place in (low, high)
            )
            if begin < end:
                parts.append(_WindowPart(spec.name, begin, end, width, block.stride, block.start + column))
            column += width
    return parts


def _targets(tokens: Tensor, blocks: tuple[_Block, ...]) -> Iterator[tuple[TensorSpec, Tensor]]:
    """Yields a ``(models, rows, width)`` view of uninitialised ``tokens`` for each tensor, and zeroes the padding."""
    entries = tokens.view(len(tokens), tokens.shape[1] * tokens.shape[2])
    for block in blocks:
        end = block.start + block.rows * block.stride
        rows = entries[:, block.start : end].view(len(tokens), block.rows, block.stride)
        column = 0
        for spec, width in zip(block.tensors, block.widths, strict=True):
            yield spec, rows[..., column : column + width]
            column += width
        rows[..., column:].zero_()
        entries[:, end : block.end].zero_()


def _sources(tokens: Tensor, blocks: tuple[_Block, ...]) -> Iterator[Tensor]:
    """Yields the ``(models, rows, width)`` view of ``tokens`` for each tensor."""
    entries = tokens.reshape(len(tokens), tokens.shape[1] * tokens.shape[2])
    # Splits and not slices: the gradient of a split is one concatenation, that of a slice a tensor of the whole size.
    sizes = [size for block in blocks for size in (block.rows * block.stride, block.padding)]
    parts = torch.split(entries, sizes, dim=1)
    for block, part in zip(blocks, parts[::2], strict=True):
        rows = part.view(len(tokens), block.rows, block.stride)
        yield from torch.split(rows, [*block.widths, block.stride - block.width], dim=-1)[:-1]


def _finite(entries: Tensor) -> bool:
    # Extremes carry NaN and infinity, and need neither a second tensor nor a second pass.
    return not entries.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(entries))


def _ensure_finite(flat: Tensor, tensors: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Refuses tensors with NaN or infinite entries, by the name of the first; ``flat`` holds them end to end."""
    if _finite(flat):
        return
    counts = {spec.name: int((~tensors[spec.name].to(torch.float64).isfinite()).sum()) for spec in architecture.tensors}
    name, count = next((name, count) for name, count in counts.items() if count)
    others = sum(1 for other in counts.values() if other) - 1
    also = f" (and {others} more)" if others else ""
    raise TokenError(
        f"{name}: {count} of {tensors[name].numel()} entries are NaN or infinite{also}; "
        "replace them with torch.nan_to_num or leave this model out"
    )
