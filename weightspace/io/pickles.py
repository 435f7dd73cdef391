"""State dicts in pickles (``.bin``, ``.pt``, ``.pth``), for callers who agreed to read one.

The pickle is never run as a program: ``torch.load(weights_only=True)`` interprets it with a short list of allowed
globals and refuses all others. What that loader does not check is checked before, here and in `pickle_check`: archives
that unpack to more than they are, pickles that ask for memory or take steps without end, tensors that claim more
entries than their file has bytes, and names that could not be printed.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightspace.dtypes import DTYPES
from weightspace.errors import CheckpointError
from weightspace.io.header import MAX_HEADER_BYTES, MAX_TENSORS, shown
from weightspace.io.pickle_check import MAX_PICKLE_BYTES, PickleCheck, UnreadableError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""How the names of pickled weights end."""

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module", "params")
"""Names under which training scripts nest the weights, the most telling first."""

MAX_EXPANSION = 4
"""Most bytes of tensors a byte of file may stand for; views of shared memory make it more than one."""

_ZIP, _PICKLE, _TAR = b"PK\x03\x04", b"\x80", b"ustar"
_MAGIC = 0x1950A86A20F9469CFC6C  # what the files of old versions begin with
_MAX_ENTRIES = MAX_TENSORS + 64  # torch adds a handful of its own
_END, _ZIP64_END, _ZIP64_LOCATOR = 22, 56, 20  # bytes of the records that close a zip archive
_FIX = "load it where you trust it and write it with safetensors.torch.save_model"
_LOG = logging.getLogger(__name__)


def open_pickle(path: Path, *, where: str | None = None) -> dict[str, Tensor]:
    """Reads the tensors of one state dict that ``torch.save`` wrote, on the CPU and without executing anything.

    The weights may stand at the top, under one of `STATE_DICT_KEYS`, or under another key if no second one holds
    tensors. What is no tensor is left out, and its name logged. Current files are mapped into memory, those of torch
    before 1.6 are read whole. Tensors that share memory in the file share it in the result.

    Args:
        path: a local file.
        where: what the file is called in errors; its path by default.

    Raises:
        CheckpointError: the file is unreadable, damaged or hostile, needs code to be loaded, or holds no tensor or
            several state dicts.
    """
    where = str(path) if where is None else where
    try:
        if not path.is_file():
            problem = "is not a regular file" if path.exists() else "does not exist"
            raise CheckpointError(f"{where}: {problem}; check the path")
        size = path.stat().st_size
        zipped = _is_zip(path, size, where)
        content = _load(path, zipped, where)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error}); check the path and its permissions") from error
    tensors = _tensors_of(_state_dict(content, where), where)
    _check_extent(tensors, size, where)
    return tensors


def _is_zip(path: Path, size: int, where: str) -> bool:
    """Tells a zip archive, which is checked before torch unpacks any of it, from the bare pickles of old versions."""
    with path.open("rb") as file:
        first = file.read(262)
    if first.startswith(_ZIP):
        _check_archive(path, size, where)
        return True
    if first[257:262] == _TAR:
        raise CheckpointError(f"{where}: a legacy tar archive cannot be read safely; {_FIX}")
    if not first.startswith(_PICKLE):
        raise CheckpointError(
            f"{where}: begins with {first[:16]!r}, unlike anything torch.save writes; fetch or export it again"
        )
    return False


def _check_archive(path: Path, size: int, where: str) -> None:
    if (directory := _directory_bytes(path, size, where)) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{where}: {directory} bytes of zip directory are above the limit of {MAX_HEADER_BYTES}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{where}: a damaged zip archive ({error}); fetch or export it again") from error
    if len(entries) > _MAX_ENTRIES:
        raise CheckpointError(f"{where}: {len(entries)} zip entries are above the limit of {_MAX_ENTRIES}")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(f"{where}: a TorchScript archive is a program and not a state dict; {_FIX}")
    for entry in entries:
        if entry.filename.lower().endswith("data.pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{where}: a pickle of {entry.file_size} bytes is above the limit of {MAX_PICKLE_BYTES}; {_FIX}"
            )
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{where}: zip entry {shown(entry.filename)} is compressed, as torch.save never does; export it again"
            )
    if (unpacked := sum(entry.file_size for entry in entries)) > size:
        raise CheckpointError(
            f"{where}: unpacks to {unpacked} bytes, the file has {size}; its zip directory lies, do not load it"
        )


def _directory_bytes(path: Path, size: int, where: str) -> int:
    """Reads how long the list of entries is, before it is parsed."""
    with path.open("rb") as file:
        file.seek(max(0, size - _END - _ZIP64_LOCATOR - _ZIP64_END))
        tail = file.read()
    end = tail[-_END:]
    if not end.startswith(b"PK\x05\x06") or end[-2:] != b"\0\0":  # torch writes no comment behind it
        raise CheckpointError(f"{where}: the zip archive has no end; truncated? fetch or export it again")
    if tail[_ZIP64_END:].startswith(b"PK\x06\x07"):
        return int.from_bytes(tail[40:48], "little")
    return int.from_bytes(end[12:16], "little")


def _load(path: Path, zipped: bool, where: str) -> Any:
    try:
        _check_program(path, zipped)
    except OSError:
        raise
    except UnreadableError as error:
        raise CheckpointError(f"{where}: {error}; nothing was executed; {_FIX}") from error
    except Exception as error:  # torch's reader of archives has errors of its own
        raise CheckpointError(f"{where}: {_reason(error)}; nothing was executed; {_FIX}") from error
    try:
        return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except Exception as error:  # a malformed pickle can fail in any way inside of torch's interpreter
        raise CheckpointError(f"{where}: {_reason(error)}; nothing was executed; {_FIX}") from error


def _check_program(path: Path, zipped: bool) -> None:
    """Follows the pickles that torch is about to interpret, read the way torch reads them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if zipped:
            PickleCheck(torch._C.PyTorchFileReader(file).get_record("data.pkl"), size).follow()
            return
        check = PickleCheck(file.read(MAX_PICKLE_BYTES), size)
    if check.follow() == _MAGIC:
        for _ in ("version", "machine", "content", "keys of storages"):
            check.follow()


def _reason(error: Exception) -> str:
    """Says in a few words what torch explains in a page of advice, some of which is to execute the file."""
    text = str(error)
    for pattern in (r"GLOBAL (\S+) was not an allowed global", r"unsupported GLOBAL (\S+)"):
        if match := re.search(pattern, text):
            return f"the pickle asks for {shown(match[1])}, which could run code and is no part of a tensor"
    detail = text.partition("WeightsUnpickler error:")[2].strip() or text
    return f"the pickle cannot be read as weights ({type(error).__name__}: {shown(detail.partition(chr(10))[0])})"


def _state_dict(content: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where}: expected a state dict, got {type(content).__name__}; save model.state_dict()")
    content = _plain(content)
    nested = [key for key, value in content.items() if _holds_tensors(value)]
    usual = [key for key in STATE_DICT_KEYS if key in nested]
    if usual:
        kept = usual[0]
    elif _holds_tensors(content):
        return content
    elif len(nested) == 1:
        kept = nested[0]
    elif nested:
        raise CheckpointError(f"{where}: holds {len(nested)} state dicts {shown(nested)}; save the one that is meant")
    else:
        raise CheckpointError(f"{where}: holds no tensor under any name; save model.state_dict()")
    _log_left_out(content, [kept], where)
    return _plain(content[kept])


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(value[key], Tensor) for key in value)


def _plain(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy without the attributes that a pickle may set, as ``items``, on an ordered dict."""
    return {key: content[key] for key in content}


def _tensors_of(state: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{where}: {len(tensors)} tensors are above the limit of {MAX_TENSORS}")
    _log_left_out(state, tensors, where)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, where)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _log_left_out(content: Mapping[Any, Any], kept: Any, where: str) -> None:
    if left_out := [key for key in content if key not in kept]:
        _LOG.info("%s: left out %s", where, shown(left_out))


def _check_tensor(name: Any, tensor: Tensor, where: str) -> None:
    if not isinstance(name, str) or not name.isprintable():
        raise CheckpointError(f"{where}: tensor name {shown(name)} is not printable text; rename it")
    thing = f"{where}: tensor {shown(name)}"
    kinds = {
        "without data": tensor.is_meta,
        "quantized": tensor.is_quantized,
        "nested": tensor.is_nested,
        str(tensor.layout): tensor.layout != torch.strided,
    }
    if kind := next((kind for kind, holds in kinds.items() if holds), None):
        raise CheckpointError(f"{thing} is {kind}; make it a dense tensor first")
    if tensor.dtype not in DTYPES.values():
        raise CheckpointError(f"{thing}: {tensor.dtype} cannot be stored as safetensors; convert it")


def _check_extent(tensors: Mapping[str, Tensor], size: int, where: str) -> None:
    """Refuses tensors that a few bytes blow up by strides of zero, or by memory that the file does not fill."""
    views = {(t.data_ptr(), t.shape, t.stride(), t.dtype): t.numel() * t.itemsize for t in tensors.values()}
    if (claimed := sum(views.values())) > MAX_EXPANSION * size:
        raise CheckpointError(
            f"{where}: its tensors claim {claimed} bytes, the file has {size}; make them contiguous and save them again"
        )
