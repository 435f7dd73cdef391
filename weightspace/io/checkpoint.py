"""Checkpoints: named tensors, read lazily from safetensors on disk or on the Hub."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightspace.dtypes import DTYPES
from weightspace.errors import ArchitectureError, CheckpointError, SettingsError
from weightspace.io.catalogue import INDEX, Weights, catalogue, read_index
from weightspace.io.folders import Folder
from weightspace.io.header import (
    MAX_TENSORS,
    Header,
    StoredTensor,
    byte_count,
    header_of,
    headers_of,
    shown,
    torch_shape,
)
from weightspace.io.hub import HubOptions
from weightspace.io.hub_repo import HubRepo
from weightspace.io.locations import locate
from weightspace.io.pickles import PICKLES, open_pickle
from weightspace.io.quantization import Quantization, quantization_of
from weightspace.io.reader import ByteSource, MemorySource, Piece, gather
from weightspace.io.writing import checkpoint_bytes, header_bytes
from weightspace.networks.infer import infer_architecture
from weightspace.schema import Architecture, ModelRef, TensorSpec

ADAPTER_CONFIG = "adapter_config.json"

_PICKLE_REFUSAL = (
    "pickles can run any code and are not opened; consent to have plain tensors read from it with --allow-pickle "
    "(allow_pickle=True), or load it where you trust it and write it with safetensors.torch.save_model"
)
FAMOUS_STEMS = ("model", "adapter_model", "diffusion_pytorch_model", "pytorch_lora_weights")
"""Names that libraries give to the weights of a folder, without variant; the first that is there is meant."""


class Checkpoint:
    """Named tensors of one model, read on demand.

    Tensors lie over the source's memory where its alignment allows, so that opening a large file costs nothing and
    reading a local one copies nothing. They may be written to: the file never changes, but later reads from the same
    object see it.

    Attributes:
        where: path or other name, used in errors.
        specs: stored tensors by name, in the order of their bytes in the file (files of a sharded checkpoint by name).
        metadata: free text of the header.
        aliases: ``(alias, kept name)`` of tied tensors that are stored once, as ``safetensors.torch.save_model`` writes
            them into the metadata.
        config: content of the ``config.json`` beside the weights, or None.
        adapter_config: content of the ``adapter_config.json`` beside the weights, or None.
        ref: reference that opens it again, pinned to a commit if it lies on the Hub; None for bytes in memory.
        notes: what was wrong with an index, or with files beside the weights, which are not used then.
        sources: the files that it consists of.
    """

    def __init__(
        self,
        where: str,
        files: Sequence[tuple[ByteSource, Header]],
        config: Mapping[str, Any] | None = None,
        *,
        adapter_config: Mapping[str, Any] | None = None,
        ref: ModelRef | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Joins the files of one checkpoint; use `open_checkpoint` for files.

        Raises:
            CheckpointError: two files store a tensor of the same name, or there are too many tensors.
        """
        self.where = where
        self.config = config
        self.adapter_config = adapter_config
        self.ref = ref
        self.notes = tuple(notes)
        self.sources = tuple(source for source, _ in files)
        self._stored: dict[str, tuple[ByteSource, StoredTensor]] = {}
        metadata: dict[str, str] = {}
        for source, header in files:
            for name, stored in header.tensors.items():
                if name in self._stored:
                    other = self._stored[name][0].where
                    raise CheckpointError(f"{where}: tensor {shown(name)} stands in both {other} and {source.where}")
                self._stored[name] = (source, stored)
            metadata |= header.metadata
        if len(self._stored) > MAX_TENSORS:
            raise CheckpointError(f"{where}: {len(self._stored)} tensors are above the limit of {MAX_TENSORS}")
        self.specs: Mapping[str, TensorSpec] = {name: stored.spec for name, (_, stored) in self._stored.items()}
        self.metadata: Mapping[str, str] = metadata
        self._kept = {
            alias: kept
            for alias, kept in metadata.items()
            if kept in self._stored and alias not in self._stored and alias.isprintable()
        }
        self.aliases: tuple[tuple[str, str], ...] = tuple(sorted(self._kept.items()))

    def __repr__(self) -> str:
        """Returns where it is and how many tensors it has."""
        return f"Checkpoint({self.where!r}, {len(self.specs)} tensors)"

    @cached_property
    def architecture(self) -> Architecture:
        """Layers, their order and symmetries, inferred from the header and the config; see `infer_architecture`.

        Raises:
            ArchitectureError: the config describes a network with other tensors.
            SettingsError: the config names a family of this library and has wrong values.
        """
        try:
            return infer_architecture(self.specs.values(), config=self.config, aliases=self.aliases)
        except (ArchitectureError, SettingsError) as error:
            raise type(error)(f"{self.where}: {error}") from error

    @cached_property
    def quantization(self) -> Quantization | None:
        """How the stored numbers are quantised, or None where they are the weights themselves."""
        return quantization_of(self.specs, self.config)

    @cached_property
    def coverage(self) -> float:
        """Share of what the header lists that floating point entries make up: of the bytes, and of the tensors.

        Empty tensors, as DeepSpeed's ZeRO-3 leaves them, have no bytes, so that they count as tensors.
        """
        floats = [spec for spec in self.specs.values() if spec.dtype.startswith(("F", "BF"))]
        held = sum(1 for spec in floats if spec.numel)
        stored, kept = (sum(byte_count(spec, self.where) for spec in specs) for specs in (self.specs.values(), floats))
        return kept / stored * held / len(floats) if stored and floats else 0.0

    def ensure_weights(self) -> None:
        """Refuses a checkpoint whose stored numbers are not the weights.

        Raises:
            CheckpointError: it is quantised, or its tensors or most of them are empty; the error says what to do.
        """
        if self.quantization is not None:
            raise CheckpointError(f"{self.where}: {self.quantization.reason}")
        floats = [spec for spec in self.specs.values() if spec.dtype.startswith(("F", "BF"))]
        empty = [spec.name for spec in floats if not spec.numel]
        if len(empty) == len(floats):
            raise CheckpointError(f"{self.where}: none of its {len(self.specs)} tensors has floating point entries")
        factors = [name for name in empty if ".lora_" in name]
        if 2 * len(empty) > len(floats) or factors:
            first = shown((factors or empty)[0])
            raise CheckpointError(
                f"{self.where}: {len(empty)} of {len(floats)} tensors such as {first} are empty, "
                "as DeepSpeed ZeRO-3 saves them; gather the weights before saving"
            )

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor, or the tensor that an alias stands for: these bytes and no others.

        The shape is that of its spec, except ``F4``, which torch packs in twos along the last axis.

        Raises:
            CheckpointError: there is no such tensor, or torch has no dtype for it.
        """
        return self.tensors([name])[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Reads ``tensor(name)[start:stop]`` along the first stored axis: these bytes and no others.

        Raises:
            CheckpointError: there is no such tensor, it has no axis, the rows are not all in it, or rows of a tensor
                with less than 8 bits an entry do not begin and end at a byte.
        """
        source, stored = self._find(name)
        spec, where = stored.spec, f"{self.where}: tensor {shown(name)}"
        if not spec.shape:
            raise CheckpointError(f"{where}: a 0-d tensor has no rows; read it whole")
        if not 0 <= start <= stop <= spec.shape[0]:
            raise CheckpointError(f"{where}: rows {start} to {stop} are not within its {spec.shape[0]} rows")
        before, inside = (TensorSpec(spec.name, (rows, *spec.shape[1:]), spec.dtype) for rows in (start, stop - start))
        first = stored.start + byte_count(before, self.where)
        return _read([(inside, Piece(source, first, first + byte_count(inside, self.where)))])[0]

    def entries(self, stretches: Sequence[tuple[str, int, int]]) -> list[Tensor]:
        """Reads stretches of flattened tensors, ``tensor(name).flatten()[start:stop]``: these bytes and no others.

        Args:
            stretches: tensor name, first entry and entry after the last. Many at once are read in few requests.

        Raises:
            CheckpointError: there is no such tensor, an entry of it takes no whole bytes, or it is not that long.
        """
        wanted = []
        for name, start, stop in stretches:
            source, stored = self._find(name)
            size, rest = divmod(byte_count(stored.spec, self.where), max(1, stored.spec.numel))
            if rest or not 0 <= start <= stop <= stored.spec.numel:
                raise CheckpointError(
                    f"{self.where}: tensor {shown(name)}: no entries {start} to {stop} of whole bytes in "
                    f"{stored.spec.dtype} of shape {stored.spec.shape}"
                )
            spec = TensorSpec(name, (stop - start,), stored.spec.dtype)
            wanted.append((spec, Piece(source, stored.start + size * start, stored.start + size * stop)))
        return _read(wanted)

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Reads several tensors; by default all that are stored, then all aliases.

        Names that stand for the same bytes get the same tensor object.

        Raises:
            CheckpointError: as `tensor`.
        """
        names = [*self.specs, *self._kept] if names is None else list(names)
        kept = list(dict.fromkeys(self._kept.get(name, name) for name in names))
        found = [self._find(name) for name in kept]
        tensors = _read([(stored.spec, Piece(source, stored.start, stored.end)) for source, stored in found])
        read = dict(zip(kept, tensors, strict=True))
        return {name: read[self._kept.get(name, name)] for name in names}

    def to_bytes(self) -> bytes:
        """Returns all tensors as the bytes of one safetensors file; see `checkpoint_bytes`."""
        return checkpoint_bytes(self.tensors(), self.metadata)

    def header_bytes(self) -> bytes:
        """Returns what stands before the data in `to_bytes`; no tensor is read.

        Raises:
            CheckpointError: a tensor cannot be stored.
        """
        for spec in self.specs.values():
            _check_readable(spec, self.where)
        return header_bytes(self.specs.values(), self.metadata, where=self.where)[0]

    def _find(self, name: str) -> tuple[ByteSource, StoredTensor]:
        found = self._stored.get(self._kept.get(name, name))
        if found is None:
            close = difflib.get_close_matches(name, self.specs, n=1)
            fix = f"did you mean {close[0]!r}?" if close else f"it has {len(self.specs)} tensors of other names"
            raise CheckpointError(f"{self.where}: no tensor {shown(name)}; {fix}")
        return found


def open_checkpoint(
    location: str | Path | ModelRef, *, options: HubOptions | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    Args:
        location: on disk a safetensors file, a ``.safetensors.index.json``, or a folder that holds
            ``model.safetensors``, an index with its shards, or one safetensors file of any name; or a repository of the
            Hub as ``org/name[@revision][:path]``, where the path is such a file or folder inside it. What exists on
            disk is never looked for on the Hub. ``config.json`` and ``adapter_config.json`` beside the weights are
            read.
        options: how the Hub is reached.
        allow_pickle: also read plain tensors from a pickled checkpoint, which is read or fetched whole.

    Raises:
        CheckpointError: whatever is missing, malformed, ambiguous or not safetensors, in one line.
        HubError: the Hub cannot deliver it.
    """
    try:
        folder, name = _located(location, options)
        name = _weights_in(folder, allow_pickle) if name is None else name
        return open_in(folder, name, allow_pickle=allow_pickle)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{shown(str(location))}: cannot be read ({error}); check the path and its permissions"
        ) from error


def open_in(folder: Folder, name: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Opens the checkpoint that a file of a folder stands for, as `find_checkpoints` names it; see `open_checkpoint`.

    Raises:
        CheckpointError: as `open_checkpoint`, or the file is only a part of a checkpoint.
    """
    parent = name.rpartition("/")[0]
    weights = catalogue(folder, parent).find(name)
    if weights is None:
        weights = read_index(folder, name) if name.endswith(".json") else Weights(name, (name,))
    where = folder.title(weights.name)
    if weights.problem is not None:
        raise CheckpointError(weights.problem)
    pickles = [file for file in weights.files if file.lower().endswith(PICKLES)]
    if pickles and not allow_pickle:
        raise CheckpointError(f"{where}: {_PICKLE_REFUSAL}")
    sources = [_unpickled(folder, file) if file in pickles else folder.open(file) for file in weights.files]
    files = dict(zip(weights.files, zip(sources, headers_of(sources), strict=True), strict=True))
    _check_map(weights.weight_map, files, where)
    notes = [] if weights.note is None else [weights.note]
    config, adapter_config = (
        folder.read_side_file(f"{parent}/{file}" if parent else file, notes) for file in ("config.json", ADAPTER_CONFIG)
    )
    ref = folder.ref(weights.name)
    return Checkpoint(where, list(files.values()), config, adapter_config=adapter_config, ref=ref, notes=notes)


def find_checkpoints(
    location: str | Path | ModelRef, *, options: HubOptions | None = None, allow_pickle: bool = False
) -> tuple[Folder, list[str]]:
    """Lists the checkpoints that a location stands for.

    A file stands for itself, a repository for the weights at its root if these have the name that libraries give them,
    and any other folder for every checkpoint in the tree below it. What makes no whole checkpoint is listed too, and
    `open_in` says why.

    Args:
        location: as for `open_checkpoint`.
        options: how the Hub is reached.
        allow_pickle: take a pickle where there is nothing else.

    Returns:
        A folder, and at least one path inside it of a safetensors file, an index, or the first part of a checkpoint
        without one; or of a pickle in a folder that has nothing else. `open_in` opens them.

    Raises:
        CheckpointError: the location is malformed, does not exist or holds no checkpoint.
        HubError: the Hub cannot list it.
    """
    folder, name = _located(location, options)
    if name is not None:
        return folder, [name]
    if isinstance(folder, HubRepo) and (famous := _famous(catalogue(folder).weights)) is not None:
        return folder, [famous]
    names = [path for path in folder.tree() if path.lower().endswith((".safetensors", ".json", *PICKLES))]
    parents = sorted({path.rpartition("/")[0] for path in names})
    found = sorted(name for parent in parents for name in catalogue(folder, parent).weights)
    if not allow_pickle and all(name.lower().endswith(PICKLES) for name in found):
        return folder, [_weights_in(folder, allow_pickle)]
    return folder, found


def open_checkpoint_bytes(
    blob: bytes | bytearray | memoryview,
    *,
    where: str,
    config: Mapping[str, Any] | None = None,
    adapter_config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Opens the complete bytes of a safetensors file.

    Tensors over ``bytes`` and other read-only memory are copies; tensors over writable memory share it.

    Args:
        blob: the file's content.
        where: what the bytes are called in errors.
        config: content of the ``config.json`` that belongs to them.
        adapter_config: content of the ``adapter_config.json`` that belongs to them.

    Raises:
        CheckpointError: the bytes are no valid safetensors file.
    """
    source = MemorySource(blob, where=where)
    return Checkpoint(where, [(source, header_of(source))], config, adapter_config=adapter_config)


def _located(location: str | Path | ModelRef, options: HubOptions | None) -> tuple[Folder, str | None]:
    found = locate(location, options)
    if found is None:
        raise CheckpointError(f"{location}: no such file or folder; check the path")
    return found


def _read(wanted: Sequence[tuple[TensorSpec, Piece]]) -> list[Tensor]:
    """Reads tensors of the given specs, each from its bytes."""
    for spec, piece in wanted:
        _check_readable(spec, piece.source.where)
    full = [(place, piece) for place, (_, piece) in enumerate(wanted) if piece.start < piece.stop]
    views = dict(zip((place for place, _ in full), gather([piece for _, piece in full]), strict=True))
    return [
        _tensor_over(views[place], spec, piece)
        if place in views
        else torch.empty(torch_shape(spec), dtype=DTYPES[spec.dtype])
        for place, (spec, piece) in enumerate(wanted)
    ]


def _check_readable(spec: TensorSpec, where: str) -> None:
    thing = f"{where}: tensor {shown(spec.name)}"
    if spec.dtype not in DTYPES:
        raise CheckpointError(f"{thing}: torch has no dtype for {spec.dtype}; leave it out")
    if spec.dtype == "F4" and (not spec.shape or spec.shape[-1] % 2):
        raise CheckpointError(
            f"{thing}: torch packs F4 in twos along the last axis, but its shape is {spec.shape}; leave it out"
        )


def _tensor_over(view: memoryview, spec: TensorSpec, piece: Piece) -> Tensor:
    dtype, size = DTYPES[spec.dtype], piece.stop - piece.start
    if len(view) != size:
        raise CheckpointError(f"{piece.source.where}: tensor {shown(spec.name)}: got {len(view)} of {size} bytes")
    if not size:
        return torch.empty(torch_shape(spec), dtype=dtype)
    # torch warns about read-only memory and reads misaligned memory by luck.
    if view.readonly or torch.frombuffer(view, dtype=torch.uint8).data_ptr() % dtype.itemsize:
        view = memoryview(bytearray(view))
    return torch.frombuffer(view, dtype=dtype).reshape(torch_shape(spec))


def _famous(names: Container[str]) -> str | None:
    usual = (f"{stem}{end}" for stem in FAMOUS_STEMS for end in (".safetensors", INDEX))
    return next((name for name in usual if name in names), None)


def _weights_in(folder: Folder, allow_pickle: bool) -> str:
    """Chooses the weights of a folder: those of a well-known name, or the only ones."""
    names = [name for name in catalogue(folder).weights if folder.has(name)]
    if (famous := _famous(names)) is not None:
        return famous
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles and not allow_pickle:
        raise CheckpointError(f"{folder.where}: no safetensors file; only {pickles[0]}: {_PICKLE_REFUSAL}")
    candidates = [name for name in names if name.endswith(".json")] or names
    if len(candidates) > 1:
        shortened = f"{', '.join(candidates[:3])}{', ...' if len(candidates) > 3 else ''}"
        raise CheckpointError(f"{folder.where}: {len(candidates)} checkpoints ({shortened}); name one of the files")
    if not candidates:
        raise CheckpointError(f"{folder.where}: no safetensors file; name a folder that holds one")
    return candidates[0]


def _unpickled(folder: Folder, file: str) -> ByteSource:
    where = folder.title(file)
    return MemorySource(checkpoint_bytes(open_pickle(folder.local_path(file), where=where)), where=where)


def _check_map(weight_map: Mapping[str, str], files: Mapping[str, tuple[ByteSource, Header]], where: str) -> None:
    """Refuses an index whose tensors are not where it says."""
    for tensor, file in weight_map.items():
        if tensor not in files[file][1].tensors:
            holder = next((other for other, (_, header) in files.items() if tensor in header.tensors), None)
            problem = "no shard has it" if holder is None else f"it stands in {shown(holder.rpartition('/')[2])}"
            raise CheckpointError(
                f"{where}: tensor {shown(tensor)} is not in {shown(file.rpartition('/')[2])}: {problem}; fetch the "
                "shards and index again"
            )
