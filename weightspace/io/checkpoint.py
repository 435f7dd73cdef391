"""Checkpoints: named tensors, read lazily from safetensors, on disk or on the Hub, and written atomically to disk."""

from __future__ import annotations

import difflib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightspace.dtypes import DTYPES, dtype_name
from weightspace.errors import CheckpointError, HubError
from weightspace.files import whole_file
from weightspace.io.folders import Folder, LocalFolder
from weightspace.io.header import (
    MAX_TENSORS,
    Header,
    StoredTensor,
    byte_count,
    header_of,
    headers_of,
    parse_header,
    shown,
    torch_shape,
)
from weightspace.io.hub import HubFolder, HubOptions, HubRepo, open_repo
from weightspace.io.pickles import open_pickle
from weightspace.io.quantization import Quantization, quantization_of
from weightspace.io.reader import ByteSource, MemorySource, Piece, gather
from weightspace.io.refs import is_repo_id, parse_ref
from weightspace.schema import ModelRef, TensorSpec

MAX_SHARDS = 4096
"""Most files of one checkpoint."""

INDEX = ".safetensors.index.json"
"""How the name of a sharded checkpoint's index ends."""

ADAPTER_CONFIG = "adapter_config.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_REFUSAL = (
    "pickles can run any code and are not opened; consent to have plain tensors read from it with --allow-pickle "
    "(allow_pickle=True), or load it where you trust it and write it with safetensors.torch.save_model"
)
FAMOUS_STEMS = ("model", "adapter_model", "diffusion_pytorch_model", "pytorch_lora_weights")
"""Names that libraries give to the weights of a folder, without variant; the first that is there is meant."""

_STORAGE_ORDER = {name: rank for rank, name in enumerate(DTYPES)}


class Checkpoint:
    """Named tensors of one model, read when they are asked for.

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
    ) -> None:
        """Joins the files of one checkpoint; use `open_checkpoint` for files.

        Raises:
            CheckpointError: two files store a tensor of the same name, or there are too many tensors.
        """
        self.where = where
        self.config = config
        self.adapter_config = adapter_config
        self.ref = ref
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
    def quantization(self) -> Quantization | None:
        """How the stored numbers are quantised, or None where they are the weights themselves."""
        return quantization_of(self.specs, self.config)

    def ensure_weights(self) -> None:
        """Refuses a checkpoint whose stored numbers are not the weights.

        Raises:
            CheckpointError: it is quantised; the error names the method and what to do.
        """
        if self.quantization is not None:
            raise CheckpointError(f"{self.where}: {self.quantization.reason}")

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

    def _find(self, name: str) -> tuple[ByteSource, StoredTensor]:
        found = self._stored.get(self._kept.get(name, name))
        if found is None:
            close = difflib.get_close_matches(name, self.specs, n=1)
            mend = f"did you mean {close[0]!r}?" if close else f"it has {len(self.specs)} tensors of other names"
            raise CheckpointError(f"{self.where}: no tensor {shown(name)}; {mend}")
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
        if name is None:
            name = _weights_in(folder, allow_pickle)
        return open_in(folder, name, allow_pickle=allow_pickle)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{shown(str(location))}: cannot be read ({error}); check the path and its permissions"
        ) from error


def open_in(folder: Folder, name: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Opens the safetensors file, index or (after consent) pickle ``name`` of a folder; see `open_checkpoint`."""
    where = folder.title(name)
    files: list[tuple[ByteSource, Header]]
    if name.lower().endswith(_PICKLES):
        if not allow_pickle:
            raise CheckpointError(f"{where}: {_PICKLE_REFUSAL}")
        source = MemorySource(checkpoint_bytes(open_pickle(folder.local_path(name), where=where)), where=where)
        files = [(source, header_of(source))]
    elif name.endswith(INDEX):
        files = _shards(folder, name)
    else:
        opened = folder.open(name)
        files = [(opened, header_of(opened))]
    parent = name.rpartition("/")[0]
    config, adapter_config = (
        folder.read_json(f"{parent}/{file}" if parent else file) for file in ("config.json", ADAPTER_CONFIG)
    )
    return Checkpoint(where, files, config, adapter_config=adapter_config, ref=folder.ref(name))


def find_checkpoints(
    location: str | Path | ModelRef, *, options: HubOptions | None = None, allow_pickle: bool = False
) -> tuple[Folder, list[str]]:
    """Lists the checkpoints that a location stands for.

    A file stands for itself, a repository for the weights at its root if these have the name that libraries give them,
    and any other folder for every checkpoint in the tree below it.

    Args:
        location: as for `open_checkpoint`.
        options: how the Hub is reached.
        allow_pickle: take a pickle where there is nothing else.

    Returns:
        A folder, and paths inside it of safetensors files and, in place of their shards, of indexes of sharded
        checkpoints, at least one. `open_in` opens them.

    Raises:
        CheckpointError: the location is malformed, does not exist or holds no checkpoint.
        HubError: the Hub cannot list it.
    """
    folder, name = _located(location, options)
    if name is not None:
        return folder, [name]
    if isinstance(folder, HubFolder) and (famous := _famous_weights(folder)) is not None:
        return folder, [famous]
    found = [path for path in folder.tree() if path.endswith((".safetensors", INDEX))]
    shards = tuple(path.removesuffix(INDEX) + "-" for path in found if path.endswith(INDEX))
    names = [path for path in found if path.endswith(INDEX) or not path.startswith(shards)]
    return folder, names or [_weights_in(folder, allow_pickle)]


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


def save_checkpoint(
    tensors: Mapping[str, Tensor], path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all; an existing file is replaced at the last moment.

    Tensors may be of any strides and on any device. Tensors that are one and the same memory are stored once, and the
    others' names go into the metadata as aliases; views that merely overlap are stored in full. The bytes are those of
    ``safetensors.torch.save``, with the metadata sorted by key.

    Raises:
        CheckpointError: a name, dtype, layout or metadata entry cannot be stored, or the file cannot be written.
    """
    path = Path(path)
    header, stored = _layout(tensors, metadata or {}, where=str(path))
    try:
        with whole_file(path) as partial, partial.open("xb") as file:
            file.write(header)
            for tensor in stored:
                file.write(_bytes_of(tensor))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}); check that its folder exists, is writable and has room"
        ) from error


def checkpoint_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns what `save_checkpoint` writes.

    Raises:
        CheckpointError: a name, dtype, layout or metadata entry cannot be stored.
    """
    header, stored = _layout(tensors, metadata or {}, where="checkpoint")
    return b"".join([header, *map(_bytes_of, stored)])


def joined_bytes(checkpoint: Checkpoint) -> bytes:
    """Returns a checkpoint of any number of files as the bytes of one.

    Raises:
        CheckpointError: a tensor cannot be stored.
    """
    return checkpoint_bytes(checkpoint.tensors(), checkpoint.metadata)


def joined_header(checkpoint: Checkpoint) -> bytes:
    """Returns the bytes that stand before the data in `joined_bytes`; no tensor is read.

    Raises:
        CheckpointError: a tensor cannot be stored.
    """
    for spec in checkpoint.specs.values():
        _check_readable(spec, checkpoint.where)
    return _header(list(checkpoint.specs.values()), checkpoint.metadata, where=checkpoint.where)[0]


def _located(location: str | Path | ModelRef, options: HubOptions | None) -> tuple[Folder, str | None]:
    """Returns a folder, and the name of the file in it if the location is a file."""
    ref = location if isinstance(location, ModelRef) else ModelRef(str(location))
    if isinstance(location, str):
        ref = parse_ref(location)
    path = Path(ref.location)
    if ref.revision is None and ref.subfolder is None:
        if path.is_dir():
            return LocalFolder(path), None
        if path.exists():
            return LocalFolder(path.parent), path.name
    if isinstance(location, Path) or not is_repo_id(ref.location):
        raise CheckpointError(f"{ref}: no such file or folder; check the path")
    try:
        repo = open_repo(ref.location, ref.revision, options)
    except HubError as error:
        if ref.revision is None and ref.subfolder is None:  # it may have been meant as a path
            raise HubError(f"{error}; nor is there a file or folder of that name here") from error
        raise
    return _located_on_hub(repo, ref)


def _located_on_hub(repo: HubRepo, ref: ModelRef) -> tuple[Folder, str | None]:
    path = ref.subfolder or ""
    if path in repo.entries:
        parent, _, name = path.rpartition("/")
        return repo.folder(parent), name
    folder = repo.folder(path)
    if path and not folder.tree():
        raise CheckpointError(f"{ref}: the repository has no file or folder {shown(path)}; check the name")
    return folder, None


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


def _famous_weights(folder: Folder) -> str | None:
    names = (f"{stem}{end}" for stem in FAMOUS_STEMS for end in (".safetensors", INDEX))
    return next((name for name in names if folder.has(name)), None)


def _weights_in(folder: Folder, allow_pickle: bool) -> str:
    """Chooses the weights of a folder: those of a well-known name, or the only ones."""
    famous = _famous_weights(folder)
    if famous is not None:
        return famous
    names = folder.names()
    candidates = [name for name in names if name.endswith(INDEX)]
    candidates = candidates or [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if not candidates and allow_pickle:
        candidates = [name for name in pickles if name in ("pytorch_model.bin", "adapter_model.bin")] or pickles
    if len(candidates) > 1:
        shortened = f"{', '.join(candidates[:3])}{', ...' if len(candidates) > 3 else ''}"
        raise CheckpointError(f"{folder.where}: {len(candidates)} checkpoints ({shortened}); name one of the files")
    if not candidates:
        reason = f"only {pickles[0]}: {_PICKLE_REFUSAL}" if pickles else "name a folder that holds one"
        raise CheckpointError(f"{folder.where}: no safetensors file; {reason}")
    return candidates[0]


def _shards(folder: Folder, index: str) -> list[tuple[ByteSource, Header]]:
    where, parent = folder.title(index), index.rpartition("/")[0]
    weight_map = (folder.read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map must map tensor names to file names, got {shown(weight_map)}")
    for name, file in weight_map.items():
        # Shards stand beside their index; any path could lead out of the folder.
        if not (
            isinstance(file, str)
            and file.endswith(".safetensors")
            and file.isprintable()
            and not set(file) & set("/\\:")
        ):
            raise CheckpointError(
                f"{where}: tensor {shown(name)}: {shown(file)} is not the name of a file in this folder"
            )
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{where}: {len(names)} files are above the limit of {MAX_SHARDS}")
    paths = {name: f"{parent}/{name}" if parent else name for name in names}
    for name, path in paths.items():
        if not folder.has(path):
            raise CheckpointError(f"{where}: shard {shown(name)} is missing; fetch it into the same folder")
    sources = [folder.open(path) for path in paths.values()]
    headers = dict(zip(names, zip(sources, headers_of(sources), strict=True), strict=True))
    holders = {tensor: file for file, (_, header) in headers.items() for tensor in header.tensors}
    for tensor, file in weight_map.items():
        if tensor not in headers[file][1].tensors:
            problem = f"it stands in {shown(holders[tensor])}" if tensor in holders else "no shard has it"
            raise CheckpointError(
                f"{where}: tensor {shown(tensor)} is not in {shown(file)}: {problem}; fetch the shards and index again"
            )
    return list(headers.values())


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, where: str) -> tuple[bytes, list[Tensor]]:
    """Builds the header and the tensors in the order of their bytes."""
    aliases = _aliases(tensors, metadata, where)
    specs = [_spec_of(name, tensor) for name, tensor in tensors.items() if name not in aliases]
    header, names = _header(specs, {**metadata, **aliases}, where=where)
    return header, [tensors[name] for name in names]


def _header(specs: list[TensorSpec], metadata: Mapping[str, str], *, where: str) -> tuple[bytes, list[str]]:
    """Builds the bytes before the data, and the names in the order of their bytes."""
    # Widest dtypes first keeps every tensor aligned; names then make equal models equal headers.
    specs = sorted(specs, key=lambda spec: (-_STORAGE_ORDER[spec.dtype], spec.name.encode(errors="replace")))
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for spec in specs:
        start, end = end, end + byte_count(spec, where)
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (start, end)}
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: a tensor name or metadata text is not valid Unicode ({error})") from error
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    parse_header(header, file_size=len(header) + end, where=where)  # whatever is written can be opened again
    return header, [spec.name for spec in specs]


def _spec_of(name: str, tensor: Tensor) -> TensorSpec:
    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    if dtype == "F4":
        if not shape:
            raise CheckpointError(
                f"tensor {shown(name)}: a 0-d F4 tensor has no last axis to unpack; reshape it to (1,)"
            )
        shape = (*shape[:-1], 2 * shape[-1])
    return TensorSpec(name, shape, dtype)


def _aliases(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> dict[str, str]:
    """Finds names of memory that another name stores; a name that the metadata uses otherwise is stored in full."""
    sharing: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        _check_storable(name, tensor, where)
        # Equal addresses alone are not equal tensors: a conjugated or negated view keeps its base's address.
        if tensor.numel():
            view = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
            sharing[(tensor.device, tensor.data_ptr(), *view)].append(name)
    aliases: dict[str, str] = {}
    for names in sharing.values():
        kept = min(names, key=lambda name: (metadata.get(name) in names, name))
        aliases |= {name: kept for name in names if name != kept and metadata.get(name, kept) == kept}
    return aliases


def _check_storable(name: str, tensor: Tensor, where: str) -> None:
    if name == "__metadata__":
        raise CheckpointError(f"{where}: {name} is safetensors' own key; rename the tensor")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantized" if tensor.is_quantized else "without data" if tensor.is_meta else str(tensor.layout)
        raise CheckpointError(f"{where}: tensor {shown(name)} is {kind}; make it a dense tensor first")
    if tensor.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{where}: tensor {shown(name)}: {tensor.dtype} cannot be stored as safetensors; convert it"
        )


def _bytes_of(tensor: Tensor) -> memoryview:
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().data
