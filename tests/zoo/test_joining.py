from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import save

from weightspace.crawl.plan import CrawlSettings
from weightspace.crawl.run import crawl, prepare_crawl
from weightspace.errors import ZooError
from weightspace.schema import ModelRef, ZooEntry
from weightspace.zoo import writer as writing
from weightspace.zoo.dataset import load_zoo
from weightspace.zoo.transfer import join_zoos
from weightspace.zoo.writer import ZooWriter


def write(path: Path, models: dict[str, float], results: tuple[str, ...] = ("test_accuracy",)) -> Path:
    writer = ZooWriter(path, settings={"name": path.name}, results=results)
    entries = [ZooEntry(name, name, ModelRef(name), results={results[0]: value}) for name, value in models.items()]
    blobs = [save({"w": torch.full((3,), value)}) for value in models.values()]
    writer.write_shard("0", entries, blobs, skipped=[(f"{path.name}/bad", "broken")])
    writer.finish()
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_rows_columns_and_skips_of_all(tmp_path: Path) -> None:
    first = write(tmp_path / "first", {"a": 1.0, "b": 2.0})
    second = write(tmp_path / "second", {"c": 2.0, "d": 3.0, "a": 4.0}, ("reward",))
    summary = join_zoos([first, second], tmp_path / "both")
    assert summary.skipped == (
        ("first/bad", "broken"),
        ("second/bad", "broken"),
        ("c", "the same tensors as b"),
        ("a", "another model has its name 'a'"),
    )
    joined = load_zoo(tmp_path / "both")
    assert list(joined.index["model_id"]) == ["a", "b", "d"]
    assert [entry.results for entry in joined.entries()] == [
        {"test_accuracy": 1.0},
        {"test_accuracy": 2.0},
        {"reward": 3.0},
    ]
    assert joined.blob(2) == load_zoo(second).blob(1)


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_join_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int) -> None:
    monkeypatch.setattr(writing, "SHARD_MODELS", 2)
    zoos = [write(tmp_path / "first", {"a": 1.0, "b": 2.0, "c": 3.0}), write(tmp_path / "second", {"d": 1.0, "e": 5.0})]
    join_zoos(zoos, tmp_path / "undisturbed")
    write_shard = ZooWriter.write_shard

    def interrupted(writer: ZooWriter, name: str, *arguments: Any, **options: Any) -> None:
        if len(writer.shards) == finished:
            raise KeyboardInterrupt
        write_shard(writer, name, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ZooWriter, "write_shard", interrupted)
        join_zoos(zoos, tmp_path / "both")
    join_zoos(zoos, tmp_path / "both")
    assert files(tmp_path / "both") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("reference", [False, True])
def test_shards_of_a_crawl_become_the_whole(hub: LoopbackHub, tmp_path: Path, reference: bool) -> None:
    for number in range(12):
        # The last four are copies of the first four; some lie in another shard.
        weights = save({"w": torch.arange(4.0) + number % 8})
        hub.create(f"org/m{number}", {"model.safetensors": weights}, downloads=50 - number)
    paths = []
    for part in (None, (1, 3), (2, 3), (3, 3)):
        settings = CrawlSettings(reference=reference)
        settings = settings if part is None else replace(settings, shard=part)
        paths.append(tmp_path / f"part{part}")
        crawl(prepare_crawl(settings, paths[-1]), paths[-1])
    whole, *parts = paths
    seen = len(hub.requests)
    summary = join_zoos(parts, tmp_path / "joined")
    assert len(hub.requests) == seen
    assert summary.models == 8
    joined, expected = load_zoo(tmp_path / "joined"), load_zoo(whole)
    assert set(joined.index["content"]) == set(expected.index["content"])
    assert {joined.blob(row) for row in range(8)} == {expected.blob(row) for row in range(8)}


def test_stored_weights_and_references_do_not_mix(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create("org/a", {"model.safetensors": save({"w": torch.ones(3)})})
    crawl(prepare_crawl(CrawlSettings(reference=True), tmp_path / "reference"), tmp_path / "reference")
    with pytest.raises(
        ZooError, match="some of the zoos store their weights and others do not; join those of one kind"
    ):
        join_zoos([write(tmp_path / "stored", {"a": 1.0}), tmp_path / "reference"], tmp_path / "both")
