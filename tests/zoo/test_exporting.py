from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import ZooError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.writing import checkpoint_bytes
from weightspace.schema import ModelRef, ZooEntry
from weightspace.zoo.dataset import load_zoo
from weightspace.zoo.importing import import_folder
from weightspace.zoo.storage import RESULTS
from weightspace.zoo.transfer import export_folder
from weightspace.zoo.writer import ZooWriter

names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=8)
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names | st.lists(names, max_size=2)
objects = st.dictionaries(names | st.sampled_from(["file", "epoch", "run"]), values, max_size=3)
entries = st.builds(
    ZooEntry,
    model_id=names,
    run_id=names,
    ref=st.builds(ModelRef, names, st.none() | names, st.none() | names),
    dataset=st.none() | names,
    results=st.dictionaries(
        st.sampled_from(["test_accuracy", "train_accuracy", "epoch", "reward"]), st.floats(-10, 10)
    ),
    hyperparameters=objects,
    config=st.none() | objects,
    licence=st.none() | names,
    base_model=st.none() | names,
    lineage=st.lists(names, max_size=2).map(tuple),
)


def make_zoo(path, known):
    writer = ZooWriter(path, settings={}, results=[*RESULTS, "reward"])
    blobs = [checkpoint_bytes({"w": torch.full((max(1, number % 3),), float(number))}) for number in range(len(known))]
    writer.write_shard("a", known, blobs)
    writer.finish()
    return load_zoo(path)


@settings(max_examples=15, deadline=None)
@given(known=st.lists(entries, min_size=1, max_size=4, unique_by=lambda entry: entry.model_id))
def test_an_exported_zoo_imports_as_the_same_zoo(tmp_path_factory, known):
    folder = tmp_path_factory.mktemp("round")
    zoo = make_zoo(folder / "zoo", known)
    assert export_folder(zoo, folder / "files") == len(known)
    summary = import_folder(folder / "files", folder / "again", on_problem="error")
    again = load_zoo(folder / "again")
    assert summary.skipped == () and list(again.entries()) == list(zoo.entries())
    assert [again.blob(row) for row in range(len(again))] == [zoo.blob(row) for row in range(len(zoo))]


def plain(number):
    return ZooEntry(f"../up {number}", f"r{number}", ModelRef("here"), config={"n": number})


def test_chosen_rows_become_plain_folders(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", [plain(number) for number in range(4)])
    assert export_folder(zoo, tmp_path / "files", [3, 1]) == 2
    lines = [json.loads(line) for line in (tmp_path / "files" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [f"00000{n}-..-up-{n}/model.safetensors" for n in (3, 1)]
    model = open_checkpoint(tmp_path / "files" / "000001-..-up-1")
    assert model.config == {"n": 1} and model.tensor("w").tolist() == [1.0]


def test_refuses_folders_in_use_and_no_rows(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", [plain(0)])
    with pytest.raises(ZooError, match=r"zoo: holds 'README\.md'"):
        export_folder(zoo, tmp_path / "zoo")
    with pytest.raises(ZooError, match="no row was chosen"):
        export_folder(zoo, tmp_path / "files", [])


def test_an_export_that_was_killed_cannot_be_imported(tmp_path, monkeypatch):
    zoo = make_zoo(tmp_path / "zoo", [plain(0), plain(1)])

    def interrupted(row):
        raise KeyboardInterrupt

    blob = zoo.blob
    monkeypatch.setattr(zoo, "blob", lambda row: blob(row) if row == 0 else interrupted(row))
    with pytest.raises(KeyboardInterrupt):
        export_folder(zoo, tmp_path / "files")
    assert (tmp_path / "files" / "000000-..-up-0" / "model.safetensors").is_file()
    with pytest.raises(ZooError, match=r"metadata\.jsonl"):
        import_folder(tmp_path / "files", tmp_path / "again")
