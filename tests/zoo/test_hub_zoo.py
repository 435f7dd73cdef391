"""Zoos on the Hub: fetched once, or streamed by ranges; and what plain ``datasets`` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from loopback_hub import LoopbackHub

from weightspace.errors import HubError, ZooError
from weightspace.zoo import writer
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.writer import ZooWriter

FILES = "resolve|^/cdn/"


def put(hub: LoopbackHub, folder: Path, repo_id: str = "org/zoo", **options: Any) -> str:
    files: dict[str, bytes | str | Path] = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    return hub.create(repo_id, files, repo_type="dataset", **options)


def assert_same(zoo: Zoo, local: Zoo) -> None:
    assert zoo.digest == local.digest
    assert list(zoo.entries()) == list(local.entries())
    batches = list(zip(zoo.batches(), local.batches(), strict=True))
    assert all(
        np.array_equal(ours.rows, theirs.rows) and torch.equal(ours.flat, theirs.flat) for ours, theirs in batches
    )


@pytest.fixture
def wide_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    """12 models of 400 kB in row groups of two."""
    from weightspace.io.writing import checkpoint_bytes
    from weightspace.schema import ModelRef, ZooEntry

    monkeypatch.setattr(writer, "GROUP_ROWS", 2)
    made = ZooWriter(tmp_path / "wide", settings={})
    for shard in range(2):
        ids = [f"m{shard}{place}" for place in range(6)]
        blobs = [checkpoint_bytes({"w": torch.full((400, 250), float(place))}) for place in range(6)]
        made.write_shard(f"{shard:05d}", [ZooEntry(name, name, ModelRef(f"./{name}")) for name in ids], blobs)
    made.finish()
    return load_zoo(tmp_path / "wide")


@pytest.mark.parametrize("mode", ["lfs", "cdn"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_zoo_on_the_hub_is_the_same_zoo(hub: LoopbackHub, tiny_zoo: Zoo, mode: Any, streaming: bool) -> None:
    hub.mode = mode
    sha = put(hub, tiny_zoo.path)
    zoo = load_zoo("org/zoo", streaming=streaming)
    assert zoo.location == f"org/zoo@{sha}"
    assert f"'org/zoo@{sha}', 48 models" in repr(zoo)
    assert_same(zoo, tiny_zoo)
    assert zoo.checkpoint(3).where == f"org/zoo@{sha}: {tiny_zoo.entry(3).model_id}"
    assert not [request for request in hub.seen("^/cdn/") if request.authorized]


def test_a_fetched_zoo_is_read_from_the_cache(hub: LoopbackHub, tiny_zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = put(hub, tiny_zoo.path)
    load_zoo("org/zoo")
    served = hub.bytes_served(FILES)
    assert_same(load_zoo(f"org/zoo@{sha}"), tiny_zoo)
    assert hub.bytes_served(FILES) == served
    hub.stop()
    assert_same(load_zoo("org/zoo", local_files_only=True), tiny_zoo)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same(load_zoo("org/zoo"), tiny_zoo)
    hub.start()


def test_offline_without_a_copy_is_said(hub: LoopbackHub, tiny_zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hub, tiny_zoo.path)
    with pytest.raises(HubError, match=r"org/zoo: not in the cache.*run it online once"):
        load_zoo("org/zoo", local_files_only=True)
    load_zoo("org/zoo", streaming=True)
    with pytest.raises(HubError, match=r"org/zoo@\w+: not in the cache.*run it online once"):
        load_zoo("org/zoo", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"org/zoo@\w+: not in the cache.*run it online once"):
        load_zoo("org/zoo")


def test_a_commit_stays_the_same_zoo(hub: LoopbackHub, tiny_zoo: Zoo, wide_zoo: Zoo) -> None:
    old = put(hub, tiny_zoo.path)
    files = {path.relative_to(wide_zoo.path).as_posix(): path for path in wide_zoo.path.rglob("*.*") if path.is_file()}
    new = hub.commit("org/zoo", files, repo_type="dataset")
    assert len(load_zoo("org/zoo")) == len(load_zoo("org/zoo", revision=new)) == 12
    assert len(load_zoo("org/zoo", revision=old)) == len(load_zoo(f"org/zoo@{old}", streaming=True)) == 48
    with pytest.raises(ZooError, match=f"org/zoo@{old}: revision {new!r} is asked for as well"):
        load_zoo(f"org/zoo@{old}", revision=new)


def test_streaming_reads_the_row_groups_that_are_asked_for(hub: LoopbackHub, wide_zoo: Zoo) -> None:
    put(hub, wide_zoo.path)
    zoo = load_zoo("org/zoo", streaming=True)
    before = hub.bytes_served(FILES)
    assert before < 250_000  # zoo.json, the index, and the footers of both shards
    blob = zoo.blob(7)
    group = sum(wide_zoo.index["size"][6:8])
    assert blob == wide_zoo.blob(7)
    assert group <= hub.bytes_served(FILES) - before <= 1.1 * group
    assert not list(zoo.path.glob("weights/*"))
    everything = sum(wide_zoo.index["size"])
    before = hub.bytes_served(FILES)
    assert sum(len(batch.rows) for batch in zoo.batches()) == 12
    assert everything <= hub.bytes_served(FILES) - before <= 1.1 * everything


def test_streamed_weights_are_not_kept_on_disk(hub: LoopbackHub, wide_zoo: Zoo) -> None:
    from huggingface_hub import constants

    put(hub, wide_zoo.path)
    for batch in load_zoo("org/zoo", streaming=True).batches():
        assert torch.equal(batch.flat, wide_zoo.flat(batch.rows))
    kept = sum(
        path.stat().st_size
        for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE")
        for path in Path(getattr(constants, name)).rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    assert kept < 100_000


def test_broken_connections_are_survived(hub: LoopbackHub, wide_zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightspace.io.hub.FIRST_WAIT", 0.01)
    put(hub, wide_zoo.path)
    zoo = load_zoo("org/zoo", streaming=True)
    hub.truncate("weights/00000", 300_000)
    hub.fail("weights/00001", 503, times=2)
    assert [zoo.blob(row) for row in range(12)] == [wide_zoo.blob(row) for row in range(12)]


def test_what_is_no_zoo_is_named(hub: LoopbackHub, tiny_zoo: Zoo) -> None:
    with pytest.raises(HubError, match=r"dataset org/none: no such repository.*nor is there a folder of that name"):
        load_zoo("org/none")
    hub.create("org/texts", {"a.txt": "x"}, repo_type="dataset")
    with pytest.raises(ZooError, match=r"org/texts@\w+: no zoo \(there is no zoo.json\)"):
        load_zoo("org/texts")
    hub.create("org/large", {"zoo.json": b" " * (2**25 + 1)}, repo_type="dataset")
    with pytest.raises(ZooError, match=r"org/large@\w+: 33554433 bytes of zoo.json are above the limit"):
        load_zoo("org/large")
    state = json.loads((tiny_zoo.path / "zoo.json").read_text())
    for name, changes, words in (
        ("hostile", {"shards": ["../../etc/passwd"]}, "no shard name"),
        ("unfinished", {"complete": False}, r"org/unfinished@\w+: the zoo is incomplete"),
        ("torn", {}, r"index/population-00000.parquet: zoo.json names it but the repository lacks it"),
    ):
        hub.create(f"org/{name}", {"zoo.json": json.dumps(state | changes)}, repo_type="dataset")
        with pytest.raises(ZooError, match=words):
            load_zoo(f"org/{name}")


def test_damaged_weights_are_named(hub: LoopbackHub, wide_zoo: Zoo) -> None:
    content = bytearray((wide_zoo.path / "weights" / "00001.parquet").read_bytes())
    content[200_000] ^= 255
    put(hub, wide_zoo.path)
    hub.commit("org/zoo", {"weights/00001.parquet": bytes(content)}, repo_type="dataset")
    zoo = load_zoo("org/zoo", streaming=True)
    assert zoo.blob(0) == wide_zoo.blob(0)
    with pytest.raises(ZooError, match=r"org/zoo@\w+:weights/00001.parquet: cannot be read"):
        zoo.blob(6)


def test_a_private_zoo_needs_a_token(hub: LoopbackHub, tiny_zoo: Zoo) -> None:
    put(hub, tiny_zoo.path, private=True)
    for streaming in (False, True):
        with pytest.raises(HubError, match="a private one that your token does not open"):
            load_zoo("org/zoo", token=False, streaming=streaming)
        assert_same(load_zoo("org/zoo", token=hub.token, streaming=streaming), tiny_zoo)


def test_a_gated_zoo_says_what_to_do(hub: LoopbackHub, tiny_zoo: Zoo) -> None:
    put(hub, tiny_zoo.path, gated="manual")
    eve = hub.add_user("eve")
    with pytest.raises(HubError, match="the repository is gated; ask for access on its page"):
        load_zoo("org/zoo", token=eve)
    hub.grant("org/zoo", "eve", "dataset")
    assert_same(load_zoo("org/zoo", token=eve), tiny_zoo)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_renamed_zoo_is_found(hub: LoopbackHub, tiny_zoo: Zoo, streaming: bool) -> None:
    put(hub, tiny_zoo.path)
    hub.move("org/zoo", "org/new", "dataset")
    assert_same(load_zoo("org/zoo", streaming=streaming), tiny_zoo)


def test_a_folder_comes_before_a_repository(
    hub: LoopbackHub, tiny_zoo: Zoo, wide_zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(hub, tiny_zoo.path, "wide/zoo")
    (wide_zoo.path.parent / "wide-of").mkdir()
    monkeypatch.chdir(wide_zoo.path.parent)
    wide_zoo.path.rename(wide_zoo.path.parent / "wide-of" / "zoo")
    assert len(load_zoo("wide-of/zoo")) == 12 and len(load_zoo("wide/zoo")) == 48


def test_datasets_loads_and_streams_both_configurations(hub: LoopbackHub, wide_zoo: Zoo) -> None:
    put(hub, wide_zoo.path)
    index = datasets.load_dataset("org/zoo", "index")["train"]
    assert index["model_id"][:] == wide_zoo.index["model_id"].tolist() and "weights" not in index.column_names
    stream = datasets.load_dataset("org/zoo", "weights", streaming=True)["train"]
    first = next(iter(stream))
    assert first["weights"] == wide_zoo.blob(0)
    assert [row["weights"] for row in stream] == [wide_zoo.blob(row) for row in range(12)]


def test_the_main_job_runs_on_a_zoo_of_the_hub(
    hub: LoopbackHub, tiny_zoo: Zoo, tiny_encoder: Path, tiny_encoder_settings: Any, tmp_path: Path
) -> None:
    from weightspace.training.autoencoder import train_autoencoder
    from weightspace.training.run import read_training

    sha = put(hub, tiny_zoo.path)
    encoder = train_autoencoder("org/zoo", tmp_path / "encoder", tiny_encoder_settings)
    assert (encoder / "model.safetensors").read_bytes() == (tiny_encoder / "model.safetensors").read_bytes()
    record = read_training(encoder)
    assert record is not None and record.zoo == f"org/zoo@{sha}"
