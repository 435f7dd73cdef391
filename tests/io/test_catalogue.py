from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from weightspace.errors import CheckpointError
from weightspace.io.catalogue import Weights, catalogue
from weightspace.io.checkpoint import find_checkpoints, open_checkpoint, open_in
from weightspace.io.folders import LocalFolder
from weightspace.io.writing import save_checkpoint


def parts(folder: Path, names: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Writes files with the given tensors, and returns the weight map that fits them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in names.items():
        save_checkpoint({name: torch.full((2,), float(len(name))) for name in tensors}, folder / file)
    return {tensor: file for file, tensors in names.items() for tensor in tensors}


def index(folder: Path, name: str, weight_map: Mapping[str, str]) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(folder: Path) -> dict[str, list[str] | str]:
    """All checkpoints of a tree by path: their tensors, or why they cannot be read."""
    found, names = find_checkpoints(folder)
    readable: dict[str, list[str] | str] = {}
    for name in names:
        try:
            readable[name] = sorted(open_in(found, name).specs)
        except CheckpointError as error:
            readable[name] = str(error)
    return readable


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("model.safetensors.index.json", "model.safetensors-00001-of-00002.safetensors", "weird.safetensors"),
        ("model.safetensors.index.bf16.json", "model.bf16-00001-of-00002.safetensors", "model.bf16-2.safetensors"),
        ("model.fp16.safetensors.index.json", "model-00001-of-00002.fp16.safetensors", "model-b.fp16.safetensors"),
        ("diffusion_pytorch_model.safetensors.index.non_ema.json", "a.safetensors", "b.safetensors"),
        ("model_index_of_weights.json", "layers-0.safetensors", "layers-1.safetensors"),
        ("consolidated.safetensors.index.json", "model-00001-of-00002.safetensors", "consolidated.safetensors"),
    ],
)
def test_an_index_of_any_name_stands_for_its_files(tmp_path: Path, name: str, first: str, second: str) -> None:
    index(tmp_path, name, parts(tmp_path, {first: ["a"], second: ["b", "c"]}))
    assert read(tmp_path) == {name: ["a", "b", "c"]}
    assert open_checkpoint(tmp_path).ref == open_checkpoint(tmp_path / name).ref
    with pytest.raises(CheckpointError, match=f"{second}: a part of the checkpoint '{name}'; open that"):
        open_checkpoint(tmp_path / second)


def test_a_well_known_file_that_an_index_names_beside_another_is_a_part(tmp_path: Path) -> None:
    weight_map = parts(tmp_path, {"model.safetensors": ["a"], "model-extra.safetensors": ["b"]})
    index(tmp_path, "model.safetensors.index.json", weight_map)
    assert sorted(open_checkpoint(tmp_path).specs) == ["a", "b"]


def test_an_index_of_one_file_adds_no_checkpoint(tmp_path: Path) -> None:
    index(tmp_path, "weights.safetensors.index.json", parts(tmp_path, {"whole.safetensors": ["a", "b"]}))
    assert read(tmp_path) == {"whole.safetensors": ["a", "b"]}
    assert open_checkpoint(tmp_path / "weights.safetensors.index.json").where == str(tmp_path / "whole.safetensors")
    index(tmp_path, "weights.safetensors.index.json", {"z": "whole.safetensors"})
    assert "'z' is not in 'whole.safetensors'" in str(read(tmp_path)["whole.safetensors"])


def test_two_indexes_of_the_same_files_are_one_checkpoint(tmp_path: Path) -> None:
    weight_map = parts(tmp_path, {"x-1-of-2.safetensors": ["a"], "x-2-of-2.safetensors": ["b"]})
    for name in ("consolidated.safetensors.index.json", "model.safetensors.index.json"):
        index(tmp_path, name, weight_map)
    assert list(read(tmp_path).values()) == [["a", "b"]]
    assert sorted(open_checkpoint(tmp_path / "model.safetensors.index.json").specs) == ["a", "b"]


def test_what_lies_beside_an_index_is_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    index(
        tmp_path, "model.safetensors.index.json", parts(tmp_path, {"m-1.safetensors": ["a"], "m-2.safetensors": ["b"]})
    )
    parts(tmp_path, {"m-ema.safetensors": ["a", "b"], "old-00002-of-00003.safetensors": ["c"]})
    parts(tmp_path / "m-2", {"model.safetensors": ["d"]})
    found = read(tmp_path)
    assert found.pop("model.safetensors.index.json") == ["a", "b"]
    assert found.pop("m-ema.safetensors") == ["a", "b"]
    assert found.pop("m-2/model.safetensors") == ["d"]
    assert "old-00002-of-00003.safetensors: incomplete: 1 of 3 parts, without 1, 3, and" in str(found.popitem()[1])
    assert not found


@pytest.mark.parametrize(
    "name", ["model-0000{}-of-00002.safetensors", "m_{}_of_2.fp16.safetensors", "{}-of-2.safetensors"]
)
@pytest.mark.parametrize("first", [0, 1])
def test_parts_without_an_index_are_joined_where_all_are_there(tmp_path: Path, name: str, first: int) -> None:
    parts(tmp_path, {name.format(first): ["a"], name.format(first + 1): ["b"]})
    assert read(tmp_path) == {name.format(first): ["a", "b"]}
    checkpoint = open_checkpoint(tmp_path)
    assert "2 parts without an index, joined" in checkpoint.notes[0]
    assert checkpoint.ref == open_checkpoint(tmp_path / name.format(first)).ref
    with pytest.raises(CheckpointError, match="a part of the checkpoint"):
        open_checkpoint(tmp_path / name.format(first + 1))
    (tmp_path / name.format(first)).unlink()
    with pytest.raises(CheckpointError, match="incomplete: 1 of 2 parts"):
        open_checkpoint(tmp_path / name.format(first + 1))


def test_models_that_are_only_numbered_like_parts_are_models(tmp_path: Path) -> None:
    parts(tmp_path, {f"fold-{number}-of-5.safetensors": ["a", "b"] for number in (1, 2, 4)})
    assert read(tmp_path) == {f"fold-{number}-of-5.safetensors": ["a", "b"] for number in (1, 2, 4)}
    parts(tmp_path / "lone", {"model-00001-of-00001.safetensors": ["a"]})
    assert read(tmp_path / "lone") == {"model-00001-of-00001.safetensors": ["a"]}


def test_parts_that_store_a_tensor_twice_are_no_model(tmp_path: Path) -> None:
    parts(tmp_path, {"m-1-of-2.safetensors": ["a", "b"], "m-2-of-2.safetensors": ["b", "c"]})
    assert "'b' stands in both" in str(read(tmp_path)["m-1-of-2.safetensors"])


def test_a_stale_index_is_replaced_by_headers_that_hold_exactly_its_tensors(tmp_path: Path) -> None:
    parts(tmp_path, {"m-1-of-2.safetensors": ["a", "b"], "m-2-of-2.safetensors": ["c"]})
    stale = {"a": "m-1-of-3.safetensors", "b": "m-2-of-3.safetensors", "c": "m-3-of-3.safetensors"}
    index(tmp_path, "m.safetensors.index.json", stale)
    assert read(tmp_path) == {"m.safetensors.index.json": ["a", "b", "c"]}
    assert "names files of other names" in open_checkpoint(tmp_path).notes[0]
    index(tmp_path, "m.safetensors.index.json", stale | {"d": "m-3-of-3.safetensors"})
    found = read(tmp_path)
    assert "shard 'm-1-of-3.safetensors' and 2 more are missing" in str(found["m.safetensors.index.json"])
    assert found["m-1-of-2.safetensors"] == ["a", "b", "c"]


def test_what_is_left_of_a_half_fetched_model_is_named_once(tmp_path: Path) -> None:
    weight_map = parts(tmp_path, {f"m-{n}-of-3.safetensors": [f"t{n}"] for n in (1, 2, 3)})
    index(tmp_path, "model.safetensors.index.json", weight_map)
    (tmp_path / "m-2-of-3.safetensors").unlink()
    assert list(read(tmp_path)) == ["model.safetensors.index.json"]
    with pytest.raises(CheckpointError, match=r"part of the checkpoint 'model.*2-of-3.safetensors' is missing"):
        open_checkpoint(tmp_path / "m-1-of-3.safetensors")


def test_json_that_only_sounds_like_an_index_is_none(tmp_path: Path) -> None:
    parts(tmp_path, {"model.safetensors": ["a"]})
    for name, text in (("model_index.json", '{"_class_name": "Pipeline"}'), ("weights.json", "[1"), ("index.json", "")):
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == {"model.safetensors": ["a"]}
    with pytest.raises(CheckpointError, match=r"model_index.json: weight_map must map"):
        open_checkpoint(tmp_path / "model_index.json")


def test_what_is_no_file_is_listed_and_stops_nothing(tmp_path: Path) -> None:
    parts(tmp_path, {"good.safetensors": ["a"]})
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "null.safetensors").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "config.json")
    found = read(tmp_path)
    assert found.pop("good.safetensors") == ["a"]
    assert len(found) == 4
    assert all("regular file" in str(reason) or "exist" in str(reason) for reason in found.values())


def test_pickles_count_where_there_is_nothing_else(tmp_path: Path) -> None:
    parts(tmp_path / "both", {"model.safetensors": ["a"]})
    for folder in ("both", "only", "parts"):
        (tmp_path / folder).mkdir(exist_ok=True)
    for path in ("both/pytorch_model.bin", "only/pytorch_model.bin", "only/optimizer.pt", "parts/p-1-of-2.bin"):
        torch.save({"b": torch.ones(2)}, tmp_path / path)
    found = read(tmp_path)
    assert list(found) == ["both/model.safetensors", "only/pytorch_model.bin", "parts/p-1-of-2.bin"]
    assert "pickles can run any code" in str(found["only/pytorch_model.bin"])
    assert "incomplete: 1 of 2 parts" in str(found["parts/p-1-of-2.bin"])
    torch.save({"c": torch.ones(2)}, tmp_path / "parts/p-2-of-2.bin")
    index(tmp_path / "parts", "pytorch_model.bin.index.json", {"b": "p-1-of-2.bin", "c": "p-2-of-2.bin"})
    assert sorted(open_checkpoint(tmp_path / "parts", allow_pickle=True).specs) == ["b", "c"]
    with pytest.raises(CheckpointError, match="pickles can run any code"):
        open_checkpoint(tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a/model.safetensors", "model"),
        ("model.safetensors.index.fp16.json", "model"),
        ("adapter_model.safetensors.index.json", "adapter_model"),
        ("run-00001-of-00002.safetensors", "run"),
        ("net.v2.safetensors", "net.v2"),
    ],
)
def test_a_checkpoint_goes_by_its_stem(name: str, stem: str) -> None:
    assert Weights(name, ()).stem == stem


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: cannot be listed"):
        catalogue(LocalFolder(tmp_path), "nowhere")


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path) -> None:
    parts(tmp_path, {"model.safetensors": ["a"]})
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + b'{"model_type": "x"}')
    assert open_checkpoint(tmp_path).config == {"model_type": "x"}
    assert not open_checkpoint(tmp_path).notes


@pytest.mark.parametrize(
    "text", ["", '{"a": 1,}', '{"a": 1, "a": 2}', "null", '{"a": ' + "9" * 5000 + "}", '{"a": [' + "0," * 5_000_000]
)
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_side_files_that_cannot_be_read_are_a_short_note(tmp_path: Path, name: str, text: str) -> None:
    parts(tmp_path, {"model.safetensors": ["a"]})
    (tmp_path / name).write_text(text)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config is None and checkpoint.adapter_config is None
    (note,) = checkpoint.notes
    assert note.startswith(f"{tmp_path / name}: ") and note.endswith("; it is not used")
    assert len(note) < 300 + len(str(tmp_path))
