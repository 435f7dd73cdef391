from __future__ import annotations

import gc
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightspace.dtypes import DTYPES
from weightspace.errors import CheckpointError
from weightspace.io import catalogue
from weightspace.io import checkpoint as checkpoint_module
from weightspace.io import writing as writing_module
from weightspace.io.checkpoint import Checkpoint, open_checkpoint, open_checkpoint_bytes
from weightspace.io.header import header_of
from weightspace.io.reader import MemorySource
from weightspace.io.writing import checkpoint_bytes, save_checkpoint
from weightspace.schema import TensorSpec

REAL = os.environ.get("WEIGHTSPACE_DATA")


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bits, NaN and infinity among them."""
    count = torch.empty(shape, dtype=torch.uint8).numel() * dtype.itemsize
    bits = torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        bits %= 2
    return bits.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def small() -> dict[str, Tensor]:
    return {"net.0.weight": torch.arange(12.0).reshape(4, 3), "net.0.bias": torch.arange(4.0)}


def raw(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def sharded(folder: Path) -> dict[str, Any]:
    """Two shards and their index."""
    files = {"model-00001-of-00002.safetensors": {"a": torch.ones(2)}, "model-00002-of-00002.safetensors": {}}
    files["model-00002-of-00002.safetensors"] = {"b": torch.zeros(3), "c": torch.ones(1)}
    for file, tensors in files.items():
        safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 24}, "weight_map": {name: file for file in files for name in files[file]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


# round trips


@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_every_dtype_and_shape_survives_to_the_bit(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    if name == "F4" and shape == ():
        pytest.skip("a 0-d tensor cannot be packed in twos")
    tensor = random_bits(DTYPES[name], shape)
    path = tmp_path / "m.safetensors"
    save_checkpoint({"t": tensor, "shift": torch.ones(1, dtype=torch.uint8)}, path)
    checkpoint = open_checkpoint(path)
    stored_shape = (*shape[:-1], 2 * shape[-1]) if name == "F4" else shape
    assert checkpoint.specs["t"] == TensorSpec("t", stored_shape, name)
    assert same_bits(checkpoint.tensor("t"), tensor)
    assert same_bits(safetensors.torch.load_file(path)["t"], tensor)


@pytest.mark.parametrize("name", list(DTYPES))
def test_what_safetensors_writes_is_read_to_the_bit_at_any_alignment(name: str, tmp_path: Path) -> None:
    tensor = random_bits(DTYPES[name], (3, 4))
    stored = safetensors.torch.save({"t": tensor})
    length = int.from_bytes(stored[:8], "little")
    for pad in range(8):
        text = stored[8 : 8 + length].ljust(length + pad)
        path = tmp_path / f"{pad}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + stored[8 + length :])
        read = open_checkpoint(path).tensor("t")
        assert same_bits(read, tensor)
        assert read.data_ptr() % tensor.dtype.itemsize == 0


tensors_strategy = st.dictionaries(
    st.text(st.characters(exclude_categories=("C", "Z")), max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from([dtype for name, dtype in DTYPES.items() if name != "F4"]),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.integers(0, 2**31),
    ).map(lambda drawn: random_bits(*drawn)),
    max_size=6,
)


@settings(deadline=None)
@given(tensors_strategy, st.dictionaries(st.text(max_size=4), st.text(max_size=6), max_size=1))
def test_bytes_are_those_of_safetensors_and_round_trip(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        blob = checkpoint_bytes(tensors, metadata)
    except CheckpointError as error:
        assert "Unicode" in str(error)
        return
    assert blob == safetensors.torch.save(tensors, metadata or None)
    checkpoint = open_checkpoint_bytes(blob, where="blob")
    assert checkpoint.metadata == metadata
    assert set(checkpoint.specs) == set(tensors)
    assert all(same_bits(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


def test_equal_models_give_equal_bytes_in_any_order() -> None:
    tensors, metadata = small(), {"b": "1", "a": "2", "c": "3"}
    backwards = dict(reversed(tensors.items()))
    assert checkpoint_bytes(tensors, metadata) == checkpoint_bytes(backwards, dict(reversed(metadata.items())))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::3],
        torch.ones(1).expand(5, 2),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch.nn.Parameter(torch.ones(2, 3)),
        torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
)
def test_any_strides_and_values_are_stored(tensor: Tensor) -> None:
    read = open_checkpoint_bytes(checkpoint_bytes({"t": tensor}), where="blob").tensor("t")
    assert same_bits(read, tensor.detach().resolve_conj().resolve_neg())


# reading


def test_tensors_lie_over_the_file_and_never_change_it(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(small(), path)
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    weight, again = checkpoint.tensor("net.0.weight"), checkpoint.tensor("net.0.weight")
    assert weight.data_ptr() == again.data_ptr()
    weight.fill_(7)
    assert path.read_bytes() == before


def test_tensors_outlive_checkpoint_and_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(small(), path)
    weight = open_checkpoint(path).tensor("net.0.weight")
    save_checkpoint({"other": torch.zeros(50)}, path)
    gc.collect()
    assert torch.equal(weight, small()["net.0.weight"])


def test_open_checkpoints_hold_no_file_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(small(), path)

    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = descriptors()
    held = [open_checkpoint(path).tensor("net.0.bias") for _ in range(50)]
    assert descriptors() == before
    assert len(held) == 50


class Recorder(MemorySource):
    """Notes which bytes are read."""

    def __init__(self, blob: bytes) -> None:
        super().__init__(blob, where="recorded")
        self.ranges: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> memoryview:
        self.ranges.append((start, stop))
        return super().read(start, stop)


def test_only_the_bytes_that_are_asked_for_are_read() -> None:
    source = Recorder(checkpoint_bytes({"w": torch.arange(20.0).reshape(5, 4), "b": torch.zeros(1000)}))
    header = header_of(source)
    checkpoint = Checkpoint("recorded", [(source, header)])
    assert max(stop for _, stop in source.ranges) == max(header.size, 512)
    source.ranges.clear()
    checkpoint.tensor("w")
    checkpoint.rows("w", 1, 3)
    start = header.tensors["w"].start
    assert source.ranges == [(start, start + 80), (start + 16, start + 48)]


@pytest.mark.parametrize("name", list(DTYPES))
def test_rows_are_slices(name: str) -> None:
    tensor = random_bits(DTYPES[name], (5, 3))
    checkpoint = open_checkpoint_bytes(checkpoint_bytes({"t": tensor, "one": tensor[:, 0].clone()}), where="blob")
    for start, stop in [(0, 5), (1, 4), (2, 2), (5, 5)]:
        rows = checkpoint.rows("t", start, stop)
        assert rows.shape == (stop - start, 3)
        assert same_bits(rows, tensor.view(torch.uint8)[start:stop].view(tensor.dtype))


def test_rows_that_are_not_there_are_refused() -> None:
    tensors = {"t": torch.zeros(5, 3), "scalar": torch.zeros(()), "f4": random_bits(DTYPES["F4"], (3,))}
    checkpoint = open_checkpoint_bytes(checkpoint_bytes(tensors), where="blob")
    for start, stop in [(-1, 2), (3, 2), (0, 6)]:
        with pytest.raises(CheckpointError, match=f"'t': rows {start} to {stop} are not within its 5 rows"):
            checkpoint.rows("t", start, stop)
    with pytest.raises(CheckpointError, match="'scalar': a 0-d tensor has no rows"):
        checkpoint.rows("scalar", 0, 1)
    with pytest.raises(CheckpointError, match=r"'f4' .*ends inside a byte"):
        checkpoint.rows("f4", 1, 3)


def test_bytes_are_copied_and_writable_memory_is_shared() -> None:
    blob = checkpoint_bytes(small())
    open_checkpoint_bytes(blob, where="blob").tensor("net.0.bias").fill_(9)
    assert blob == checkpoint_bytes(small())
    shared = bytearray(blob)
    open_checkpoint_bytes(memoryview(shared), where="blob").tensor("net.0.bias").fill_(9)
    assert torch.equal(open_checkpoint_bytes(shared, where="b").tensor("net.0.bias"), torch.full((4,), 9.0))


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    checkpoint = open_checkpoint_bytes(checkpoint_bytes(small()), where="blob")
    with pytest.raises(CheckpointError, match=r"blob: no tensor 'net.0.wieght'; did you mean 'net.0.weight'\?"):
        checkpoint.tensor("net.0.wieght")


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F6_E2M3", [4], 3), ("F4", [2, 3], 3)])
def test_what_torch_cannot_hold_is_listed_and_refused_when_read(dtype: str, shape: list[int], size: int) -> None:
    header = {"odd": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    checkpoint = open_checkpoint_bytes(raw(header, bytes(size)), where="blob")
    assert checkpoint.specs["odd"].dtype == dtype
    with pytest.raises(CheckpointError, match=r"'odd': torch .*leave it out"):
        checkpoint.tensor("odd")


def test_a_source_that_returns_too_little_is_refused() -> None:
    class Short(MemorySource):
        def read(self, start: int, stop: int) -> memoryview:
            return super().read(start, stop - 1)

    blob = checkpoint_bytes(small())
    checkpoint = Checkpoint("short", [(Short(blob, where="short"), header_of(MemorySource(blob, where="short")))])
    with pytest.raises(CheckpointError, match=r"short: tensor 'net\.0\.bias': got 15 of 16 bytes"):
        checkpoint.tensor("net.0.bias")


# aliases


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


def test_aliases_are_those_of_save_model(tmp_path: Path) -> None:
    model, path = Tied(), tmp_path / "m.safetensors"
    safetensors.torch.save_model(model, path, metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.aliases == (("head.weight", "embedding.weight"),)
    assert set(checkpoint.specs) == {"embedding.weight", "head.bias"}
    assert torch.equal(checkpoint.tensor("head.weight"), model.head.weight)
    assert torch.equal(checkpoint.rows("head.weight", 1, 2), model.head.weight[1:2])
    assert set(checkpoint.tensors()) == set(model.state_dict())
    tensors = open_checkpoint_bytes(path.read_bytes(), where="blob").tensors(["head.weight", "embedding.weight"])
    assert list(tensors) == ["head.weight", "embedding.weight"]
    assert tensors["head.weight"] is tensors["embedding.weight"]
    again = open_checkpoint_bytes(checkpoint_bytes(checkpoint.tensors(), checkpoint.metadata), where="again")
    assert (again.aliases, again.specs, again.metadata) == (checkpoint.aliases, checkpoint.specs, checkpoint.metadata)


def test_shared_memory_is_stored_once(tmp_path: Path) -> None:
    save_checkpoint(Tied().state_dict(), tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.aliases == (("head.weight", "embedding.weight"),)
    restored = Tied()
    missing, unexpected = safetensors.torch.load_model(restored, tmp_path / "m.safetensors")
    assert not missing
    assert not unexpected


def test_views_that_merely_overlap_are_stored_in_full() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    complex_base = torch.tensor([1 + 2j])
    tensors = {"base": base, "row": base[0], "t": base.t(), "flat": base.reshape(-1), "bits": base.view(torch.int32)}
    tensors |= {"z": complex_base, "z.conj": complex_base.conj(), "e": torch.empty(0), "e2": torch.empty(0)}
    checkpoint = open_checkpoint_bytes(checkpoint_bytes(tensors), where="blob")
    assert checkpoint.aliases == ()
    assert all(same_bits(checkpoint.tensor(name), tensor.resolve_conj()) for name, tensor in tensors.items())


def test_metadata_that_uses_the_name_of_an_alias_is_kept() -> None:
    tied = torch.ones(2)
    blob = checkpoint_bytes({"a": tied, "format": tied}, {"format": "pt"})
    checkpoint = open_checkpoint_bytes(blob, where="blob")
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.aliases == ()
    assert torch.equal(checkpoint.tensor("format"), tied)


def test_metadata_keeps_its_choice_of_the_kept_name() -> None:
    tied = torch.ones(2)
    checkpoint = open_checkpoint_bytes(checkpoint_bytes({"a": tied, "b": tied}, {"a": "b"}), where="blob")
    assert checkpoint.aliases == (("a", "b"),)


def test_metadata_that_names_no_tensor_is_no_alias() -> None:
    metadata = {"format": "pt", "net.0.bias": "net.0.weight", "x": "y", "evil\n": "net.0.bias"}
    assert open_checkpoint_bytes(checkpoint_bytes(small(), metadata), where="blob").aliases == ()


# writing


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"c": torch.zeros(2, dtype=torch.complex128)}, "'c': torch.complex128 cannot be stored"),
        ({"s": torch.eye(2).to_sparse()}, "'s' is torch.sparse_coo"),
        ({"m": torch.empty(2, device="meta")}, "'m' is without data"),
        ({"__metadata__": torch.zeros(2)}, "__metadata__ is safetensors' own key"),
        ({"a\nb": torch.zeros(2)}, r"'a\\nb' has unprintable"),
        ({"a\ud800": torch.zeros(2)}, "not valid Unicode"),
        ({"f": torch.zeros(1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(())}, "'f': a 0-d F4 tensor"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tensors: dict[str, Tensor], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        save_checkpoint(tensors, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("moment", ["write", "sync"])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, moment: str
) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(small(), path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise error

    target = (writing_module, "_bytes_of") if moment == "write" else (os, "fsync")
    monkeypatch.setattr(*target, fail)
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        save_checkpoint({"new": torch.ones(9)}, path)
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"{path}: cannot be written (No space left on device)")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_full_disk_is_an_error_of_one_line(tmp_path: Path) -> None:
    program = (
        "import resource, torch; from weightspace.io.writing import save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: save_checkpoint({'w': torch.zeros(50_000)}, 'm.safetensors')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert result.stdout.startswith("CheckpointError m.safetensors: cannot be written (File too large)"), result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["missing/m.safetensors", "file/m.safetensors", "folder"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=f"{place}: cannot be written"):
        save_checkpoint(small(), tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


# folders, shards, configs


def test_a_folder_opens_by_its_weights_and_config(tmp_path: Path) -> None:
    save_checkpoint(small(), tmp_path / "policy.safetensors")
    (tmp_path / "config.json").write_text('{"hidden": [3], "limit": Infinity}')
    (tmp_path / "._policy.safetensors").write_bytes(b"left by another system")
    for location in (tmp_path, str(tmp_path), tmp_path / "policy.safetensors"):
        checkpoint = open_checkpoint(location)
        assert checkpoint.config == {"hidden": [3], "limit": float("inf")}
        assert checkpoint.where == str(tmp_path / "policy.safetensors")
    save_checkpoint({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).specs) == ["other"]


def test_links_into_a_download_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    for folder in (blobs, snapshot):
        folder.mkdir()
    save_checkpoint(small(), blobs / "0f3a")
    (snapshot / "model.safetensors").symlink_to("../blobs/0f3a")
    assert list(open_checkpoint(snapshot).specs) == list(open_checkpoint(blobs / "0f3a").specs)


def test_no_config_is_none(tmp_path: Path) -> None:
    save_checkpoint(small(), tmp_path / "m.safetensors")
    assert open_checkpoint(tmp_path).config is None


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"[" * 10**5])
def test_a_malformed_config_is_noted_by_name(tmp_path: Path, content: bytes) -> None:
    save_checkpoint(small(), tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config is None
    assert len(checkpoint.notes) == 1
    assert re.search(r"config\.json: .*; it is not used", checkpoint.notes[0])


def test_a_sharded_checkpoint_is_one(tmp_path: Path) -> None:
    sharded(tmp_path)
    for location in (tmp_path, tmp_path / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(location)
        assert list(checkpoint.specs) == ["a", "b", "c"]
        assert checkpoint.metadata == {"format": "pt"}
        assert torch.equal(checkpoint.tensor("b"), torch.zeros(3))


def test_tensors_that_an_index_forgets_are_read_all_the_same(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    del index["weight_map"]["c"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(open_checkpoint(tmp_path).specs) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"a": "../secret.safetensors"}, r"'a': '\.\./secret.safetensors' is not the name of a file in this folder"),
        ({"a": "/etc/secret.safetensors"}, "'a': '/etc/secret.safetensors' is not"),
        ({"a": "sub/x.safetensors"}, "'sub/x.safetensors' is not"),
        ({"a": "..\\x.safetensors"}, "is not the name"),
        ({"a": "C:x.safetensors"}, "is not the name"),
        ({"a": "x\n.safetensors"}, "is not the name"),
        ({"a": "model.bin"}, "'model.bin' is not"),
        ({"a": 3}, "'a': 3 is not"),
        ({"a": None}, "'a': None is not"),
        ({"a": "model-00009-of-00002.safetensors"}, "shard 'model-00009-of-00002.safetensors' is missing"),
        ({"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}, "'a' is not in .*2.safe"),
        ({"b": "model-00001-of-00002.safetensors"}, "'b' is not in .*it stands in 'model-00002-of-00002.safetensors'"),
        ({"z": "model-00001-of-00002.safetensors"}, "'z' is not in .*no shard has it"),
    ],
)
def test_a_hostile_index_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    index = sharded(tmp_path)
    index["weight_map"] |= change
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"model.safetensors.index.json: .*{named}") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": "a"}])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"index\.json: .*(weight_map must map|expected a JSON object)"):
        open_checkpoint(tmp_path)


def test_the_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_checkpoint({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'b' stands in both .*00001-of-00002.* and .*00002-of-00002"):
        open_checkpoint(tmp_path)


def test_limits_hold_over_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path)
    monkeypatch.setattr(checkpoint_module, "MAX_TENSORS", 2)
    with pytest.raises(CheckpointError, match="3 tensors are above the limit of 2"):
        open_checkpoint(tmp_path)
    monkeypatch.setattr(catalogue, "MAX_SHARDS", 1)
    with pytest.raises(CheckpointError, match="2 files are above the limit of 1"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.CKPT", "model.pkl"])
def test_pickles_are_refused_and_never_run(tmp_path: Path, name: str) -> None:
    trap = tmp_path / "ran"
    (tmp_path / name).write_bytes(f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode())
    for location in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match=f"{name}: pickles can run any code and are not opened; consent"):
            open_checkpoint(location)
    (tmp_path / name).rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        open_checkpoint(tmp_path)
    assert not trap.exists()


def test_other_places_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no safetensors file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint("n" * 5000)
    with pytest.raises(CheckpointError, match="nul"):
        open_checkpoint("nul\0byte")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match=r"pipe\.safetensors: is not a regular file"):
        open_checkpoint(tmp_path / "pipe.safetensors")
    for name in ("b", "a"):
        save_checkpoint(small(), tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 checkpoints \(a.safetensors, b.safetensors.*name one"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(REAL is None, reason="WEIGHTSPACE_DATA names no folder of real checkpoints")
def test_real_files_read_like_safetensors_reads_them() -> None:
    files = sorted(Path(str(REAL)).rglob("*.safetensors"))[::7]
    assert files
    for file in files:
        checkpoint = open_checkpoint(file)
        expected = safetensors.torch.load_file(file)
        assert set(checkpoint.specs) == set(expected)
        assert all(same_bits(checkpoint.tensor(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({}, "none of its 0 tensors has floating point entries"),
        ({"a": (0,), "b": (0, 4)}, "none of its 2 tensors has"),
        ({"a": (0,), "b": (0,), "c": (3,)}, "2 of 3 tensors such as 'a' are empty, as DeepSpeed"),
        ({"q.lora_A.weight": (0,), "q.lora_B.weight": (4, 2), "v": (2,)}, "'q.lora_A.weight' are empty"),
    ],
)
def test_what_zero3_leaves_is_no_model(shapes: dict[str, tuple[int, ...]], named: str) -> None:
    blob = checkpoint_bytes({name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(CheckpointError, match=f"here: .*{named}"):
        open_checkpoint_bytes(blob, where="here").ensure_weights()


@pytest.mark.parametrize(
    ("tensors", "coverage"),
    [
        ({"a": torch.ones(4)}, 1.0),
        ({"a": torch.ones(4), "ids": torch.ones(2, dtype=torch.int64)}, 0.5),
        ({"a": torch.ones(4), "b": torch.ones(4), "head": torch.empty(0), "tail": torch.empty(0)}, 0.5),
        ({"ids": torch.ones(2, dtype=torch.int64)}, 0.0),
        ({}, 0.0),
    ],
)
def test_coverage_counts_all_that_the_header_lists(tensors: dict[str, Tensor], coverage: float) -> None:
    assert open_checkpoint_bytes(checkpoint_bytes(tensors), where="here").coverage == coverage
