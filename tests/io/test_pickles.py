from __future__ import annotations

import io
import logging
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weightspace.errors import CheckpointError
from weightspace.io import pickles
from weightspace.io.pickles import open_pickle

REAL = os.environ.get("WEIGHTSPACE_DATA")


def small() -> dict[str, Tensor]:
    return {"net.0.weight": torch.arange(12.0).reshape(4, 3), "net.0.bias": torch.arange(4).to(torch.bfloat16)}


def saved(path: Path, content: Any, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_pickle(path, where="model.bin")
    message = str(caught.value)
    assert message.startswith("model.bin: ")
    assert message.isprintable()
    assert len(message) < 500
    return message


def rewritten(path: Path, *, compression: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None) -> Path:
    """The same archive with other entries, written by the standard library."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (entries | (more or {})).items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_tensors_come_back_to_the_bit(tmp_path: Path, zipped: bool) -> None:
    expected = small() | {"scalar": torch.tensor(3), "empty": torch.empty(0, 5), "turned": torch.rand(3, 2).T}
    tensors = open_pickle(saved(tmp_path / "model.bin", expected, zipped=zipped))
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.bin", small())
    before = path.read_bytes()
    open_pickle(path)["net.0.weight"].zero_()
    assert path.read_bytes() == before


def test_parameters_become_plain_tensors(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    tensors = open_pickle(saved(tmp_path / "model.pt", dict(module.named_parameters())))
    assert {type(tensor) for tensor in tensors.values()} == {Tensor}
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_tied_tensors_stay_tied(tmp_path: Path, zipped: bool) -> None:
    shared = torch.rand(6, 4)
    content = {"embed.weight": shared, "head.weight": shared, "part": shared[2:], "other": shared.clone()}
    tensors = open_pickle(saved(tmp_path / "model.bin", content, zipped=zipped))
    assert tensors["embed.weight"].data_ptr() == tensors["head.weight"].data_ptr()
    assert tensors["part"].data_ptr() == tensors["embed.weight"][2:].data_ptr()
    assert tensors["other"].data_ptr() != tensors["embed.weight"].data_ptr()


@pytest.mark.parametrize("key", [*pickles.STATE_DICT_KEYS, "network"])
def test_one_level_of_nesting_is_taken_off(tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    content = {
        "epoch": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        key: OrderedDict(small(), kind="mlp"),
    }
    with caplog.at_level(logging.INFO, logger="weightspace.io.pickles"):
        tensors = open_pickle(saved(tmp_path / "last.pth", content))
    assert list(tensors) == list(small())
    assert "left out ['epoch', 'optimizer']" in caplog.text
    assert "left out ['kind']" in caplog.text


def test_the_usual_key_wins_over_tensors_beside_it(tmp_path: Path) -> None:
    content = {"step": torch.tensor(7), "ema": small(), "model": small()}
    assert list(open_pickle(saved(tmp_path / "last.pth", content))) == list(small())


def test_several_state_dicts_are_not_guessed_between(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path / "gan.pt", {"generator": small(), "discriminator": small()}))
    assert "2 state dicts ['generator', 'discriminator']" in message
    assert "save the one that is meant" in message


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"a": {"b": {"c": torch.ones(2)}}}])
def test_no_tensor_is_an_error(tmp_path: Path, content: Any) -> None:
    assert "holds no tensor under any name; save model.state_dict()" in refusal(saved(tmp_path / "a.pt", content))


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], 3])
def test_anything_but_a_dict_is_refused(tmp_path: Path, content: Any) -> None:
    assert f"expected a state dict, got {type(content).__name__}" in refusal(saved(tmp_path / "a.pt", content))


class Writes:
    """Writes a file when it is unpickled by a trusting reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_a_pickle_that_would_write_a_file_does_not(tmp_path: Path, zipped: bool) -> None:
    proof = tmp_path / "proof"
    path = saved(tmp_path / "model.bin", {"weight": torch.ones(2), "more": Writes(proof)}, zipped=zipped)
    message = refusal(path)
    assert f"the pickle asks for '{os.open.__module__}.open', which could run code" in message
    assert "nothing was executed" in message
    assert not proof.exists()
    os.close(torch.load(path, weights_only=False)["more"])
    assert proof.exists()  # the threat is real


def test_a_bare_hostile_pickle_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Writes(proof), protocol=2))
    assert "the pickle asks for " in refusal(tmp_path / "model.bin")
    assert not proof.exists()


def test_a_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", torch.nn.Linear(2, 2))
    assert "asks for 'torch.nn.modules.linear.Linear'" in refusal(path)


def test_terminal_codes_in_a_global_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x02cos\n\x1b[2Jsystem\n.")
    assert "\\x1b[2Jsystem" in refusal(tmp_path / "model.bin")


@pytest.mark.parametrize(
    "raw", [b"\x80\x02.", b"\x80\x02", b"\x80\x02K\x01.", b"\x80\x02h\x07.", b"\x80\x02X\xff\xff\xff\xffab"]
)
def test_a_malformed_pickle_is_one_line(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(raw)
    assert "cannot be read as weights" in refusal(tmp_path / "model.bin")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_every_truncation_is_refused(tmp_path: Path, zipped: bool) -> None:
    whole = saved(tmp_path / "whole.bin", {"weight": torch.ones(3)}, zipped=zipped).read_bytes()
    cut = tmp_path / "cut.bin"
    for size in range(0, len(whole), 7):
        cut.write_bytes(whole[:size])
        refusal(cut)


@pytest.mark.parametrize("raw", [b"", b"<!doctype html>", b"version https://git-lfs.github.com/spec/v1\n", b"GGUF"])
def test_other_files_are_refused_by_how_they_begin(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(raw)
    message = refusal(tmp_path / "model.bin")
    assert f"begins with {raw[:16]!r}, unlike anything torch.save writes" in message
    assert "fetch or export it again" in message


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_legacy_tar_is_refused(tmp_path: Path, format: int) -> None:
    with tarfile.open(tmp_path / "model.bin", "w", format=format) as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "a legacy tar archive cannot be read safely" in refusal(tmp_path / "model.bin")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    more = {"model/constants.pkl": b"", "model/code/__torch__.py": b""}
    path = rewritten(saved(tmp_path / "model.pt", small()), more=more, compression=zipfile.ZIP_DEFLATED)
    assert "a TorchScript archive is a program" in refusal(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    assert "does not exist; check the path" in refusal(tmp_path / "model.bin")
    assert "is not a regular file; check the path" in refusal(tmp_path)


def test_an_archive_written_by_others_is_read_if_it_is_stored(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path / "model.bin", small()))
    assert torch.equal(open_pickle(path)["net.0.weight"], small()["net.0.weight"])


def test_a_compressed_entry_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path / "model.bin", {"a": torch.zeros(10**5)}), compression=zipfile.ZIP_DEFLATED)
    message = refusal(path)
    assert "data.pkl' is compressed, as torch.save never does; export it again" in message


def test_a_directory_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.bin", {"a": torch.zeros(1000)})
    raw = bytearray(path.read_bytes())
    entry = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 1)
    raw[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)  # sizes in the archive and unpacked
    path.write_bytes(raw)
    assert f"the file has {len(raw)}; its zip directory lies" in refusal(path)


def test_a_directory_is_measured_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rewritten(saved(tmp_path / "model.bin", small()), more={f"model/data/x{i}": b"" for i in range(1000)})
    monkeypatch.setattr(pickles, "_MAX_ENTRIES", 1000)
    assert "zip entries are above the limit of 1000" in refusal(path)
    monkeypatch.setattr(pickles, "MAX_HEADER_BYTES", 20_000)
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *_: pytest.fail("parsed"))
    assert "bytes of zip directory are above the limit of 20000" in refusal(path)


def test_the_size_in_a_zip64_record_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "model.bin", small())
    raw = path.read_bytes()
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2**62, 2**62, 2**62, 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(raw) - 22, 1)
    path.write_bytes(raw[:-22] + record + locator + raw[-22:])
    assert f"{2**62} bytes of zip directory are above the limit" in refusal(path)


def program(path: Path, change: Any) -> Path:
    """A file of tensors whose pickle is another one."""
    saved(path, small())
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        raw = archive.read(name)
    return rewritten(path, more={name: change(raw)})


def test_a_storage_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    claimed = pickle.BININT + struct.pack("<i", 1_250_000_000)
    path = program(tmp_path / "m.bin", lambda raw: raw.replace(pickle.BININT1 + bytes([12]), claimed))
    assert f"its storages claim 5000000000 bytes, the file has {path.stat().st_size}" in refusal(path)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = program(tmp_path / "m.bin", lambda raw: raw.replace(b"K\x04K\x03\x86", b"M\xff\xffK\x03\x86"))
    assert "its storage has 12" in refusal(path)


def test_instructions_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightspace.io.pickle_check.MAX_STEPS", 1000)
    path = program(tmp_path / "m.bin", lambda raw: raw[:2] + b"]q\x00h\x00" + b"h\x00a" * 600 + raw[2:])
    assert "more than 1000 instructions" in refusal(path)


def test_a_key_that_doubles_is_refused(tmp_path: Path) -> None:
    doubled = b"K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 40  # a tuple of itself twice, forty times
    path = program(tmp_path / "m.bin", lambda raw: raw[:2] + b"}" + doubled + b"K\x01s." + raw[2:])
    assert "parts" in refusal(path)


@pytest.mark.parametrize("name", ["builtins\nbytearray", "numpy\nzeros", "torch\nempty", "torch\nFloatTensor"])
def test_a_call_that_allocates_what_it_is_given_is_refused(tmp_path: Path, name: str) -> None:
    call = f"c{name}\n".encode() + b"\x8a\x05" + (5 * 10**9).to_bytes(5, "little") + b"\x85R0"
    path = program(tmp_path / "m.bin", lambda raw: raw[:2] + call + raw[2:])
    assert name.replace("\n", ".") in refusal(path)


def test_strides_of_zero_do_not_blow_up_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.bin", {"weight": torch.ones(1).expand(10**12)})
    message = refusal(path)
    assert f"claim {4 * 10**12} bytes, the file has {path.stat().st_size}" in message
    assert "make them contiguous" in message


def test_an_old_file_cannot_claim_memory_that_it_does_not_fill(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.bin", {"weight": torch.ones(200)}, zipped=False)
    raw = path.read_bytes()
    assert raw.count(b"K\xc8") >= 2  # 200 as a one-byte integer: the storage's and the tensor's size
    path.write_bytes(raw.replace(b"K\xc8", b"J" + struct.pack("<i", 2**30)))
    assert "cannot be read as weights" in refusal(path)


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "\ud800", 3, ("a", "b"), None])
def test_names_that_cannot_be_printed_are_refused(tmp_path: Path, name: Any) -> None:
    message = refusal(saved(tmp_path / "model.bin", {"fine": torch.ones(2), name: torch.ones(2)}))
    assert f"tensor name {name!a} is not printable text; rename it" in message


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "is torch.sparse_coo; make it a dense tensor first"),
        (torch.empty(3, device="meta"), "is without data; make it a dense tensor first"),
        (torch.ones(3, dtype=torch.complex128), "torch.complex128 cannot be stored as safetensors; convert it"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path: Path, tensor: Tensor, kind: str) -> None:
    message = refusal(saved(tmp_path / "model.bin", {"fine": torch.ones(2), "odd": tensor}))
    assert f"tensor 'odd'{':' if 'convert' in kind else ''} {kind}" in message


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_TENSORS", 3)
    path = saved(tmp_path / "model.bin", {str(i): torch.ones(1) for i in range(4)})
    assert "4 tensors are above the limit of 3" in refusal(path)


@pytest.mark.skipif(not REAL, reason="WEIGHTSPACE_DATA names no folder of real checkpoints")
def test_real_pickles_are_read() -> None:
    paths = sorted(Path(REAL or "").rglob("*.bin"))
    if not paths:
        pytest.skip("no .bin file among the real checkpoints")
    for path in paths:
        expected = torch.load(path, weights_only=True, map_location="cpu")
        tensors = open_pickle(path)
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
