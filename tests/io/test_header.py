from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.dtypes import DTYPES, dtype_name
from weightspace.errors import CheckpointError
from weightspace.io import header as header_module
from weightspace.io.header import Header, StoredTensor, header_size, parse_header, read_header
from weightspace.schema import TensorSpec

ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def blob(header: Mapping[str, Any] | list[Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parse(raw: bytes) -> Header:
    return parse_header(raw, file_size=len(raw), where="m.safetensors")


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_offsets_are_absolute_and_order_is_that_of_the_bytes() -> None:
    content = {"__metadata__": {"format": "pt"}, "late": entry(offsets=[4, 12]), "early": entry("I16", [2, 1], [0, 4])}
    raw = blob(content, bytes(12))
    header = parse(raw)
    assert header.size == len(raw) - 12
    assert list(header.tensors) == ["early", "late"]
    assert header.tensors["early"] == StoredTensor(TensorSpec("early", (2, 1), "I16"), header.size, header.size + 4)
    assert header.tensors["late"].end == len(raw)
    assert header.metadata == {"format": "pt"}


def test_more_bytes_than_the_header_may_be_given() -> None:
    raw = blob({"a": ONE}, b"x")
    assert parse_header(raw[:-1], file_size=len(raw), where="m") == parse(raw)
    with pytest.raises(CheckpointError, match="header bytes were read"):
        parse_header(raw[:-5], file_size=len(raw), where="m")


@pytest.mark.parametrize(
    ("content", "data"),
    [
        ({}, 0),
        ({"a": ONE | {"more": [1, {"deep": None}]}}, 1),
        ({"__metadata__": None, "a": ONE}, 1),
        ({"a": entry("F32", [], [0, 4])}, 4),
        ({"a": entry("F32", [0, 7], [0, 0]), "b": ONE}, 1),
        ({"b": ONE, "empty at the end": entry("F32", [3, 0], [1, 1])}, 1),
        ({"a": entry("F4", [3, 2], [0, 3])}, 3),
        ({"a": entry("F6_E2M3", [4], [0, 3]), "b": entry("F6_E3M2", [4, 2], [3, 9])}, 9),
        ({"a": entry("F8_E8M0", [2**20], [0, 2**20])}, 2**20),
        ({"": ONE}, 1),
        ({"ünïcode.重み": ONE}, 1),
    ],
)
def test_what_safetensors_accepts_is_accepted(content: dict[str, Any], data: int, tmp_path: Path) -> None:
    raw = blob(content, bytes(data))
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(parse(raw).tensors)
    assert read_header(path) == parse(raw)


@pytest.mark.parametrize(
    ("content", "data", "named"),
    [
        (b"", 0, "not valid JSON"),
        (b"{", 0, "not valid JSON"),
        (b"\xff\xfe{}", 0, "not valid JSON"),
        (b"\xef\xbb\xbf{}", 0, "not valid JSON"),
        (b"{} {}", 0, "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, "not valid JSON"),
        (b"[" * 100_000, 0, "nested too deeply"),
        (b'{"a":' * 50_000, 0, "nested too deeply"),
        ([], 0, "expected a JSON object, got list"),
        (b"null", 0, "expected a JSON object, got NoneType"),
        (b'{"a.weight":1,"a.weight":1}', 0, "key 'a.weight' stands twice"),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1, "key 'dtype' stands twice"),
        ({"a": 7}, 0, "'a': expected dtype, shape and data_offsets, got 7"),
        ({"a": {"dtype": "U8", "shape": [1]}}, 1, "'a': data_offsets is missing"),
        ({"a": entry("F128")}, 8, "unknown dtype 'F128'"),
        ({"a": entry(["F32"])}, 8, "unknown dtype"),
        ({"a": entry("f32")}, 8, "unknown dtype 'f32'"),
        ({"a": entry(shape=2)}, 8, "shape must be a list of sizes, got 2"),
        ({"a": entry(shape=[2.0])}, 8, "shape must be"),
        ({"a": entry(shape=[True, True])}, 8, "shape must be"),
        ({"a": entry(shape=[-1, -2])}, 8, "shape must be"),
        ({"a": entry(shape=["2"])}, 8, "shape must be"),
        ({"a": entry(shape=[2**63])}, 8, "shape must be"),
        ({"a": entry(shape=[2**32, 2**32])}, 8, "overflows"),
        ({"a": entry(shape=[0, 2**62, 8], offsets=[0, 0])}, 0, "overflows"),
        ({"a": entry("U8", [1] * 65, [0, 1])}, 1, "65 axes"),
        ({"a": entry(offsets=[0])}, 8, "data_offsets must be"),
        ({"a": entry(offsets=[0, 4, 8])}, 8, "data_offsets must be"),
        ({"a": entry(offsets=[8, 0])}, 8, "data_offsets must be"),
        ({"a": entry(offsets=[-8, 0])}, 8, "data_offsets must be"),
        ({"a": entry(offsets={"0": 8})}, 8, "data_offsets must be"),
        ({"a": entry(shape=[3])}, 8, "takes 12 bytes, data_offsets span 8"),
        ({"a": entry("F4", [3], [0, 2])}, 2, "ends inside a byte"),
        ({"a": entry("F4", [], [0, 1])}, 1, "ends inside a byte"),
        ({"a": entry("F6_E3M2", [5], [0, 4])}, 4, "ends inside a byte"),
        ({"a": ONE, "b": ONE}, 1, "'b': data_offsets: overlaps"),
        ({"a": entry(offsets=[0, 8]), "b": entry(offsets=[4, 12])}, 12, "'b': data_offsets: overlaps"),
        ({"a": entry(shape=[0], offsets=[4, 4]), "b": entry()}, 8, "'a': data_offsets: overlaps"),
        ({"a": entry(offsets=[1, 9])}, 9, "'a': data_offsets: leaves a hole"),
        ({"a": ONE, "b": entry(offsets=[2, 10])}, 10, "'b': data_offsets: leaves a hole"),
        ({"a": entry()}, 7, "truncated: the tensors need"),
        ({"a": entry(offsets=[0, 2**58], shape=[2**56])}, 8, "truncated: the tensors need"),
        ({"a": entry()}, 9, "1 bytes behind the last tensor"),
        ({"__metadata__": [], "a": ONE}, 1, "__metadata__ must map"),
        ({"__metadata__": {"n": 1}, "a": ONE}, 1, "__metadata__ 'n' must be text, got 1"),
        ({"__metadata__": {"n": "\ud800"}, "a": ONE}, 1, "__metadata__ 'n' is not valid Unicode"),
        ({"a\n\x1b[31m": ONE}, 1, r"'a\\n\\x1b\[31m' has unprintable"),
        ({"a\u202e": ONE}, 1, r"'a\\u202e' has unprintable"),
        ({"\ud800": ONE}, 1, r"'\\ud800' has unprintable"),
    ],
)
def test_malformed_headers_are_refused_by_name(content: Any, data: int, named: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m.safetensors: .*{named}") as caught:
        parse(blob(content, bytes(data)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "0 bytes are too few"),
        (b"{}", "2 bytes are too few .*plain JSON"),
        (struct.pack("<Q", 2**60) + b"{}", f"header length {2**60} is above the limit"),
        (struct.pack("<Q", 2**64 - 1), "above the limit"),
        (struct.pack("<Q", 100) + b"{}", "truncated: the header needs 108 bytes, the file has 10"),
        (pickle.dumps({"a": list(range(300))}), "pickle; pickles are never executed"),
        (b"PK\x03\x04" + bytes(200), "zip archive, as torch.save writes pickles"),
        (b"\n<!DOCTYPE html><html></html>", "HTML page"),
        (b'{"error": "Repository not found"}', "plain JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"GGUF\x03" + bytes(100), "GGUF"),
    ],
)
def test_other_files_are_refused_for_what_they_are(raw: bytes, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        parse(raw)


def test_a_header_as_long_as_a_pickle_magic_is_no_pickle() -> None:
    raw = blob(json.dumps({"a": ONE}).encode().ljust(0x280), b"x")
    assert raw[:2] == b"\x80\x02"
    assert list(parse(raw).tensors) == ["a"]


def test_long_values_do_not_flood_the_error() -> None:
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    for content in ({"n" * 10**6: 1}, {"a": entry("D" * 10**6)}, {"a": entry(shape=[-1] * 10**5)}, {"a": deep}):
        with pytest.raises(CheckpointError) as caught:
            parse(blob(content))
        assert len(str(caught.value)) < 600


@pytest.mark.slow
def test_tensor_count_is_bounded() -> None:
    def content(count: int) -> dict[str, Any]:
        return {f"layers.{i}.weight": entry("U8", [1], [i, i + 1]) for i in range(count)}

    assert len(parse(blob(content(25_000), bytes(25_000))).tensors) == 25_000
    few = {str(i): 0 for i in range(header_module.MAX_TENSORS + 1)}
    with pytest.raises(CheckpointError, match="400001 tensors are above the limit of 400000"):
        parse(blob(few))


def test_header_length_is_bounded_before_it_is_read() -> None:
    length = header_module.MAX_HEADER_BYTES + 1
    with pytest.raises(CheckpointError, match=f"header length {length} is above"):
        header_size(struct.pack("<Q", length), file_size=2**40, where="m")


def test_dtypes_are_those_of_safetensors() -> None:
    refusal = "no error"
    try:
        safetensors.deserialize(blob({"a": entry("?")}))
    except safetensors.SafetensorError as error:
        refusal = str(error)
    known = set(refusal.split("expected one of ")[1].split(" at line")[0].replace("`", "").split(", "))
    assert known == set(DTYPES) | {"F6_E2M3", "F6_E3M2"}
    assert all(dtype_name(dtype) == name for name, dtype in DTYPES.items())


def test_dtypes_without_a_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"torch.complex128 has no safetensors name"):
        dtype_name(torch.complex128)


@pytest.mark.parametrize("kind", ["missing", "folder", "empty"])
def test_unreadable_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    with pytest.raises(CheckpointError, match=r"m\.safetensors: (does not exist|is not a regular file|0 bytes)"):
        read_header(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(sorted(DTYPES)),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    ),
    st.binary(max_size=16),
)
def test_any_json_parses_or_is_refused(content: Any, data: bytes) -> None:
    try:
        header = parse(blob(json.dumps(content).encode(), data))
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert sum(tensor.end - tensor.start for tensor in header.tensors.values()) == len(data)


@settings(max_examples=300)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_one_flipped_byte_is_never_more_than_a_refusal(position: int, value: int) -> None:
    raw = bytearray(safetensors.torch.save({"w": torch.zeros(3, 2), "b": torch.zeros(3)}, {"format": "pt"}))
    raw[position % len(raw)] = value
    try:
        header = parse(bytes(raw))
    except CheckpointError:
        return
    assert max(tensor.end for tensor in header.tensors.values()) == len(raw)
