"""What a pickle of weights would build, worked out before anything is loaded.

A pickle is a program. This one follows it without calling anything: it knows numbers, text, tuples, tensors and their
memory, and treats all else as opaque. A program is refused that calls what is no part of a tensor, claims more memory
than the file has bytes, or takes steps without end.
"""

from __future__ import annotations

import pickle as op
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from weightspace.io.header import MAX_HEADER_BYTES, MAX_TENSORS, shown

MAX_PICKLE_BYTES = 2 * MAX_HEADER_BYTES
"""Most bytes of a pickle, without the tensors' own."""

MAX_STEPS = 50 * MAX_TENSORS
"""Most instructions: a tensor takes about 40."""

_MAX_OBJECTS = 4 * MAX_TENSORS  # lists, dicts and the like; a tensor takes one
_MAX_STACK = 100_000
_MAX_TUPLE, _MAX_KEY = 100_000, 64  # parts, each counted as often as it appears: hashing visits all of them

_CALLS = {
    "collections.OrderedDict",
    "collections.Counter",
    "builtins.set",
    "__builtin__.set",
    "_codecs.encode",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
}
"""What builds tensors and dicts, and allocates nothing of a size that it is given."""

_CONTAINERS = ("collections.", "builtins.", "__builtin__.")
_ITEMSIZES = {"ComplexDouble": 16, "Double": 8, "Long": 8, "ComplexFloat": 8, "Float": 4, "Int": 4, "QInt32": 4}
_ITEMSIZES |= dict.fromkeys(("Half", "BFloat16", "Short"), 2)
_ITEMSIZES |= dict.fromkeys(("Byte", "Char", "Bool", "QUInt8", "QInt8", "QUInt4x2", "QUInt2x4", "Untyped"), 1)

_OPAQUE, _DICT = object(), object()
_ARGUMENT_BYTES = {
    op.BININT: 4,
    op.BININT1: 1,
    op.BININT2: 2,
    op.BINFLOAT: 8,
    op.BINGET: 1,
    op.LONG_BINGET: 4,
    op.BINPUT: 1,
    op.LONG_BINPUT: 4,
    op.PROTO: 1,
}
_LENGTHS = {op.BINUNICODE: 4, op.SHORT_BINSTRING: 1, op.LONG1: 1}
_NEW: dict[bytes, Any] = {
    op.EMPTY_LIST: _OPAQUE,
    op.EMPTY_DICT: _DICT,
    op.EMPTY_SET: _OPAQUE,
    op.NONE: None,
    op.NEWTRUE: True,
    op.NEWFALSE: False,
}
_TUPLES = {op.TUPLE1: 1, op.TUPLE2: 2, op.TUPLE3: 3}


class UnreadableError(Exception):
    """The pickle is damaged or hostile; the text says how."""


def _damage(text: str) -> UnreadableError:
    return UnreadableError(f"the pickle cannot be read as weights ({text})")


def _itemsize(name: str) -> int:
    """Bytes of an entry of a storage class."""
    kind = name.rpartition(".")[2].removesuffix("Storage")
    if kind not in _ITEMSIZES:
        raise _damage(f"{shown(name)} is no storage")
    return _ITEMSIZES[kind]


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    entries: int


class _Parts(tuple[Any, ...]):
    """A tuple that knows how many parts it has when those of inner tuples are counted as often as they appear."""

    weight: int


class PickleCheck:
    """Follows the pickles of one file; storages are counted over all of them.

    Args:
        raw: the bytes of the file, or of the pickle in it.
        size: bytes of the whole file, which the storages cannot exceed.
    """

    def __init__(self, raw: bytes | memoryview, size: int) -> None:
        self.raw, self.size, self.at = bytes(raw[:MAX_PICKLE_BYTES]), size, 0
        self.steps = self.objects = self.claimed = self.heaviest = 0
        self.storages: set[Any] = set()
        self.methods: dict[bytes, Callable[[], None]] = {
            op.GLOBAL: self._global,
            op.REDUCE: self._call,
            op.NEWOBJ: self._call,
            op.BUILD: self._build,
            op.BINPERSID: self._storage,
            op.SETITEM: self._set_item,
            op.SETITEMS: self._set_items,
        }

    def follow(self) -> Any:
        """Follows one pickle to its end, and returns what it yields if that is a number or a text."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        while (code := self._read(1)) != op.STOP:
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise _damage(f"more than {MAX_STEPS} instructions")
            self._step(code)
            if len(self.stack) > _MAX_STACK or len(self.marks) > _MAX_STACK:
                raise _damage(f"more than {_MAX_STACK} values on its stack")
        return self._pop()

    def _step(self, code: bytes) -> None:
        if code in _TUPLES:
            self._tuple([self._pop() for _ in range(_TUPLES[code])][::-1])
        elif code in _LENGTHS:
            self._text(code)
        elif code in _ARGUMENT_BYTES:
            self._argument(code)
        elif code in _NEW:
            self.objects += code in (op.EMPTY_LIST, op.EMPTY_DICT, op.EMPTY_SET)
            self.stack.append(_NEW[code])
        elif code == op.MARK:
            self.marks.append(self.stack)
            self.stack = []
        elif code in (op.TUPLE, op.EMPTY_TUPLE):
            self._tuple(self._pop_mark() if code == op.TUPLE else [])
        elif code == op.APPEND:
            self._pop()
        elif code == op.APPENDS:
            self._pop_mark()
        elif code in self.methods:
            self.methods[code]()
        else:
            raise _damage(f"unsupported instruction {code!r}")
        if self.objects > _MAX_OBJECTS:
            raise _damage(f"more than {_MAX_OBJECTS} objects")

    def _read(self, count: int) -> bytes:
        if count > len(self.raw) - self.at:
            raise _damage(f"{count} bytes at byte {self.at}, it has {len(self.raw)}")
        self.at += count
        return self.raw[self.at - count : self.at]

    def _pop(self) -> Any:
        if not self.stack:
            raise _damage("a value is missing")
        return self.stack.pop()

    def _pop_mark(self) -> list[Any]:
        if not self.marks:
            raise _damage("a mark is missing")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _tuple(self, items: Sequence[Any]) -> None:
        made = _Parts(items)
        made.weight = 1 + sum(one.weight if isinstance(one, _Parts) else 1 for one in items)
        if made.weight > _MAX_TUPLE:
            raise _damage(f"a tuple of more than {_MAX_TUPLE} parts")
        self.heaviest = max(self.heaviest, made.weight)
        self.stack.append(made)

    def _text(self, code: bytes) -> None:
        data = self._read(int.from_bytes(self._read(_LENGTHS[code]), "little"))
        if code == op.LONG1:
            self.stack.append(int.from_bytes(data, "little", signed=True))
        else:
            self.stack.append(data.decode(errors="replace"))

    def _argument(self, code: bytes) -> None:
        data = self._read(_ARGUMENT_BYTES[code])
        if code in (op.BINGET, op.LONG_BINGET):
            number = int.from_bytes(data, "little")
            if number not in self.memo:
                raise _damage(f"nothing is kept as number {number}")
            self.stack.append(self.memo[number])
        elif code in (op.BINPUT, op.LONG_BINPUT):
            self.stack.append(self._pop())
            self.memo[int.from_bytes(data, "little")] = self.stack[-1]
        elif code != op.PROTO:
            whole = int.from_bytes(data, "little", signed=code == op.BININT)
            self.stack.append(_OPAQUE if code == op.BINFLOAT else whole)

    def _global(self) -> None:
        names = []
        for _ in range(2):
            end = self.raw.find(b"\n", self.at)
            names.append(self._read(end - self.at if end >= 0 else len(self.raw)).decode(errors="replace"))
            self._read(1)
        self.stack.append(_Global(".".join(names)))

    def _call(self) -> None:
        arguments, called = self._pop(), self._pop()
        if not isinstance(called, _Global):
            raise _damage("it calls what is no function")
        if called.name not in _CALLS:
            raise UnreadableError(
                f"the pickle asks for {shown(called.name)}, which could run code and is no part of a tensor"
            )
        if not isinstance(arguments, _Parts):
            raise _damage(f"arguments of {shown(called.name)} are no tuple")
        if called.name.startswith(_CONTAINERS):
            self.objects += 1
            if any(one is not _DICT for one in arguments) and self.heaviest > _MAX_KEY:
                raise _damage("keys of many parts")  # those of a dict were checked
        elif called.name == "_codecs.encode" and arguments[1:] != ("latin1",):
            raise _damage("bytes in another encoding than latin1")
        elif "_rebuild_tensor" in called.name:
            self._check_tensor(arguments)
        self.stack.append(_DICT if called.name == "collections.OrderedDict" else _OPAQUE)

    def _check_tensor(self, arguments: _Parts) -> None:
        """Refuses a view of more entries than its storage has; a storage in memory would grow to them."""
        if len(arguments) < 4 or not isinstance(arguments[0], _Storage):
            raise _damage("a tensor without a storage")
        offset, sizes, strides = arguments[1:4]
        numbers = [offset, *sizes, *strides] if isinstance(sizes, tuple) and isinstance(strides, tuple) else [None]
        if not all(isinstance(one, int) and one >= 0 for one in numbers) or len(sizes) != len(strides):
            raise _damage("a tensor whose shape is no list of counts")
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if 0 not in sizes and last >= arguments[0].entries:
            raise _damage(f"a tensor reaches entry {last}, its storage has {arguments[0].entries}")

    def _build(self) -> None:
        self._pop()
        if not self.stack or self.stack[-1] is not _DICT:
            raise _damage("it sets the state of what is no dict")

    def _storage(self) -> None:
        pid = self._pop()
        if not isinstance(pid, _Parts) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Global):
            raise _damage("a reference to what is no storage")
        key, entries = pid[2], pid[4]
        if not isinstance(key, str | int) or not isinstance(entries, int) or entries < 0:
            raise _damage(f"a storage of {shown(entries)} entries")
        if key not in self.storages:
            self.storages.add(key)
            self.claimed += entries * _itemsize(pid[1].name)
        if self.claimed > self.size:
            raise _damage(f"its storages claim {self.claimed} bytes, the file has {self.size}")
        self.stack.append(_Storage(entries))

    def _set_item(self) -> None:
        self._pop()
        self._check_key(self._pop())

    def _set_items(self) -> None:
        for key in self._pop_mark()[::2]:
            self._check_key(key)

    def _check_key(self, key: Any) -> None:
        if isinstance(key, _Parts) and key.weight > _MAX_KEY:
            raise _damage("a key of many parts")
