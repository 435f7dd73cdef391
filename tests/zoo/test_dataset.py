from __future__ import annotations

import json
import resource
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import WeightspaceError, ZooError
from weightspace.io import checkpoint
from weightspace.io.writing import checkpoint_bytes
from weightspace.schema import ModelRef, ZooEntry
from weightspace.zoo import dataset, writer
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.writer import ZooWriter

SETTINGS = {"seed": 1, "models": 12}
WIDTHS = (2, 3, 5)


def blob(number: int, width: int) -> bytes:
    generator = torch.Generator().manual_seed(number)
    weight, bias = torch.randn(4, width, generator=generator), torch.randn(4, generator=generator)
    return checkpoint_bytes({"fc.weight": weight, "fc.bias": bias})


def entry(number: int, **changes) -> ZooEntry:
    plain = ZooEntry(
        model_id=f"m{number:03d}",
        run_id=f"r{number // 2}",
        ref=ModelRef("org/zoo", "a" * 40, f"m{number}"),
        dataset="digits",
        results={"test_accuracy": 0.5, "train_accuracy": 0.75, "step": float(number)},
        hyperparameters={"learning_rate": 0.1, "nested": {"a": [1, None]}},
    )
    return replace(plain, **changes)


def write(path: Path, widths=WIDTHS * 4, shards: int = 2) -> list[bytes]:
    """Writes model i with width ``widths[i]``; widths, and so headers, interleave."""
    blobs = [blob(number, width) for number, width in enumerate(widths)]
    new = ZooWriter(path, settings=SETTINGS)
    for number, rows in enumerate(np.array_split(np.arange(len(blobs)), shards)):
        if not new.has_shard(f"{number:05d}"):
            new.write_shard(f"{number:05d}", [entry(row) for row in rows], [blobs[row] for row in rows])
    new.finish()
    return blobs


@pytest.fixture
def zoo(tmp_path):
    write(tmp_path / "zoo")
    return load_zoo(tmp_path / "zoo")


def expected_flat(zoo: Zoo, row: int) -> torch.Tensor:
    tensors = zoo.checkpoint(row).tensors()
    architecture = zoo.architectures[zoo.index["header"][row]]
    return torch.cat([tensors[spec.name].flatten() for spec in architecture.tensors])


def test_rows_come_back_as_they_were_written(tmp_path):
    blobs = write(tmp_path / "zoo")
    zoo = load_zoo(tmp_path / "zoo")
    assert len(zoo) == len(blobs) == len(zoo.index)
    assert [zoo.blob(row) for row in range(len(zoo))] == blobs
    written = [entry(row) for row in range(len(zoo))]
    completed = [replace(e, results={**e.results, "generalization_gap": 0.25}) for e in written]
    assert list(zoo.entries()) == completed
    assert zoo.entry(7) == completed[7]
    assert zoo.index["step"].tolist() == list(range(12)) and zoo.index["test_loss"].isna().all()
    assert "weights" not in zoo.index


def test_a_known_gap_is_kept_and_an_unknown_accuracy_gives_none(tmp_path):
    new = ZooWriter(tmp_path / "zoo", settings=SETTINGS)
    given_gap = {"test_accuracy": 0.5, "train_accuracy": 0.75, "generalization_gap": 0.3}
    entries = [entry(0, results=given_gap), entry(1, results={"test_accuracy": float("nan"), "step": 3})]
    new.write_shard("a", entries, [blob(0, 2), blob(1, 2)])
    new.finish()
    zoo = load_zoo(tmp_path / "zoo")
    assert zoo.entry(0).results == given_gap
    assert set(zoo.entry(1).results) == {"test_accuracy", "step"} and np.isnan(zoo.entry(1).results["test_accuracy"])


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
refs = st.text(string.ascii_letters + "/@:.-", min_size=1, max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=20, deadline=None)
@given(
    known=st.builds(
        ZooEntry,
        model_id=texts,
        run_id=texts,
        ref=st.builds(ModelRef, refs, st.none() | refs, st.none() | refs),
        dataset=st.none() | texts,
        results=st.dictionaries(st.sampled_from(["test_loss", "epoch"]), st.floats(allow_nan=False)),
        hyperparameters=st.dictionaries(texts, json_values, max_size=3),
        config=st.none() | st.dictionaries(texts, json_values, max_size=2),
        licence=st.none() | texts,
        base_model=st.none() | texts,
        lineage=st.lists(texts, max_size=2).map(tuple),
    )
)
def test_every_field_of_an_entry_round_trips(tmp_path_factory, known):
    path = tmp_path_factory.mktemp("zoo")
    new = ZooWriter(path, settings={})
    new.write_shard("a", [known], [blob(0, 2)])
    new.finish()
    assert load_zoo(path).entry(0) == known


@settings(max_examples=12, deadline=None)
@given(
    widths=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=14),
    shards=st.integers(1, 3),
    group_rows=st.integers(1, 4),
    chunk=st.integers(1, 5),
    pass_bytes=st.sampled_from([1, 700, 2**20]),
    data=st.data(),
)
def test_batches_hold_each_chosen_model_once_by_header(
    tmp_path_factory, widths, shards, group_rows, chunk, pass_bytes, data
):
    path = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "GROUP_ROWS", group_rows)
        patch.setattr(dataset, "_PASS_BYTES", pass_bytes)
        write(path, widths, shards)
        zoo = load_zoo(path)
        rows = data.draw(st.none() | st.lists(st.integers(0, len(zoo) - 1), unique=True))
        batches = list(zoo.batches(rows, chunk=chunk))
    chosen = range(len(zoo)) if rows is None else sorted(rows)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(chosen)
    headers = [batch.header for batch in batches]
    first_seen = list(dict.fromkeys(zoo.index["header"][row] for row in chosen))
    assert list(dict.fromkeys(headers)) == first_seen
    assert headers == sorted(headers, key=first_seen.index)
    for batch in batches:
        assert 1 <= len(batch.rows) <= chunk and (np.diff(batch.rows) > 0).all()
        assert batch.architecture is zoo.architectures[batch.header]
        torch.testing.assert_close(
            batch.flat, torch.stack([expected_flat(zoo, row) for row in batch.rows]), rtol=0, atol=0
        )


def test_interleaved_headers_read_each_row_group_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "GROUP_ROWS", 2)
    write(tmp_path / "zoo", WIDTHS * 8)
    read = []
    monkeypatch.setattr(dataset.pq.ParquetFile, "read_row_group", counted(pq.ParquetFile.read_row_group, read))
    zoo = load_zoo(tmp_path / "zoo")
    assert sum(len(batch.rows) for batch in zoo.batches()) == 24
    assert len(read) == 12
    # With room for one header only, each of the three needs a pass, and the memory bound holds.
    read.clear()
    monkeypatch.setattr(dataset, "_PASS_BYTES", 1)
    assert [len(batch.rows) for batch in zoo.batches()] == [1] * 24
    assert len(read) <= 3 * 12


def counted(function, calls):
    def call(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    return call


def test_flat_keeps_the_order_and_repeats(zoo):
    rows = [6, 0, 6, 3]
    torch.testing.assert_close(zoo.flat(rows), torch.stack([expected_flat(zoo, row) for row in rows]), rtol=0, atol=0)
    with pytest.raises(ZooError, match="one header, got 2"):
        zoo.flat([0, 1])


def test_rows_out_of_range_are_refused(zoo):
    for row in (-1, 12):
        with pytest.raises(IndexError, match=f"no row {row} in a zoo of 12"):
            zoo.blob(row)


def test_row_groups_are_bounded_in_rows_and_bytes(tmp_path, monkeypatch):
    size = len(blob(0, 2))
    monkeypatch.setattr(writer, "GROUP_ROWS", 4)
    monkeypatch.setattr(writer, "GROUP_BYTES", 3 * size)
    write(tmp_path / "zoo", (2, 2, 2, 2, 2, 2, 2, 2), shards=1)
    footer = pq.read_metadata(tmp_path / "zoo" / "weights" / "00000.parquet")
    assert [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] == [3, 3, 2]
    monkeypatch.setattr(writer, "GROUP_BYTES", 1)
    write(tmp_path / "large", (2, 2), shards=1)
    assert [len(batch.rows) for batch in load_zoo(tmp_path / "large").batches()] == [2]


def test_datasets_opens_both_configurations(zoo, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    index = datasets.load_dataset(str(zoo.path))["train"]
    weights = datasets.load_dataset(str(zoo.path), "weights", streaming=True)["train"]
    assert index["model_id"][:] == [f"m{row:03d}" for row in range(12)] and "weights" not in index.column_names
    assert [row["weights"] for row in weights] == [zoo.blob(row) for row in range(12)]


def test_groups_that_configs_disagree_on_are_left_out(tmp_path, monkeypatch):
    inferred = checkpoint.infer_architecture

    def without_groups_for_residual(specs, *, config=None, aliases=()):
        found = inferred(specs, config=None, aliases=aliases)
        return replace(found, groups=()) if config == {"residual": True} else found

    monkeypatch.setattr(checkpoint, "infer_architecture", without_groups_for_residual)
    tensors = {"0.weight": torch.randn(4, 3), "0.bias": torch.randn(4), "1.weight": torch.randn(2, 4)}
    for name, configs in (("agree", ({"a": 1}, None)), ("disagree", ({"a": 1}, {"residual": True}))):
        new = ZooWriter(tmp_path / name, settings={})
        entries = [entry(row, config=config) for row, config in enumerate(configs)]
        new.write_shard("a", entries, [checkpoint_bytes(tensors)] * 2)
        new.finish()
    [agreed] = load_zoo(tmp_path / "agree").architectures.values()
    [disagreed] = load_zoo(tmp_path / "disagree").architectures.values()
    assert len(agreed.groups) == 1 and not disagreed.groups
    assert "1 permutation groups left out" in disagreed.notes[-1]


class Killed(BaseException):
    """Stands for SIGKILL: nothing may clean up after it."""


@pytest.mark.parametrize("moment", range(1, 11))
def test_a_killed_writer_goes_on_to_the_same_zoo(tmp_path, monkeypatch, moment):
    write(tmp_path / "whole")
    renames = []

    def rename_or_die(self, target):
        renames.append(target)
        if len(renames) == moment:
            raise Killed
        return rename(self, target)

    rename = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", rename_or_die)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        try:
            write(tmp_path / "killed")
        except Killed:
            with pytest.raises(ZooError, match=r"killed: (the zoo is incomplete|no zoo)"):
                load_zoo(tmp_path / "killed")
        else:
            assert moment > 8
    write(tmp_path / "killed")
    assert {f.relative_to(tmp_path / "killed"): f.read_bytes() for f in (tmp_path / "killed").rglob("*.*")} == {
        f.relative_to(tmp_path / "whole"): f.read_bytes() for f in (tmp_path / "whole").rglob("*.*")
    }


def test_torn_ledgers_and_damaged_shards_are_written_again(tmp_path):
    blobs = write(tmp_path / "zoo", shards=3)
    ledger = tmp_path / "zoo" / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-9])
    index = tmp_path / "zoo" / "index" / "00001.parquet"
    index.write_bytes(index.read_bytes()[:-5])
    (tmp_path / "zoo" / "weights" / "orphan.parquet").write_bytes(b"left over")
    again = ZooWriter(tmp_path / "zoo", settings=SETTINGS)
    assert [again.has_shard(f"{number:05d}") for number in range(3)] == [True, False, False]
    write(tmp_path / "zoo", shards=3)
    zoo = load_zoo(tmp_path / "zoo")
    assert [zoo.blob(row) for row in range(12)] == blobs
    assert not (tmp_path / "zoo" / "weights" / "orphan.parquet").exists()


def test_finishing_twice_changes_nothing_and_adding_makes_it_incomplete(tmp_path):
    write(tmp_path / "zoo")
    before = (tmp_path / "zoo" / "zoo.json").read_text()
    write(tmp_path / "zoo")
    assert (tmp_path / "zoo" / "zoo.json").read_text() == before
    more = ZooWriter(tmp_path / "zoo", settings=SETTINGS)
    more.write_shard("more", [entry(99)], [blob(99, 2)])
    with pytest.raises(ZooError, match="incomplete"):
        load_zoo(tmp_path / "zoo")
    more.finish()
    assert len(load_zoo(tmp_path / "zoo")) == 13


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path):
    new = ZooWriter(tmp_path / "zoo", settings=SETTINGS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = checkpoint_bytes({"weight": torch.zeros(50_000)})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(ZooError, match=r"weights/00000\.parquet: cannot be written \(.*File too large"):
            new.write_shard("00000", [entry(0)], [large])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not new.has_shard("00000") and not list((tmp_path / "zoo" / "weights").iterdir())
    new.write_shard("00000", [entry(0)], [large])
    new.finish()
    assert load_zoo(tmp_path / "zoo").blob(0) == large


def test_a_ledger_that_cannot_grow_is_cut_back(tmp_path, monkeypatch):
    new = ZooWriter(tmp_path / "zoo", settings=SETTINGS)
    new.write_shard("a", [entry(0)], [blob(0, 2)])
    before = (tmp_path / "zoo" / "ledger.jsonl").read_bytes()
    sync, calls = writer.os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:  # two files and their folders come first
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(ZooError, match=r"ledger\.jsonl.*No space left"):
        patch.setattr(writer.os, "fsync", full)
        new.write_shard("b", [entry(1)], [blob(1, 2)])
    assert (tmp_path / "zoo" / "ledger.jsonl").read_bytes() == before
    assert not new.has_shard("b")


def test_other_settings_are_refused_by_both_digests_and_by_name(tmp_path):
    first = ZooWriter(tmp_path / "zoo", settings=SETTINGS)
    with pytest.raises(ZooError, match="differ in seed") as caught:
        ZooWriter(tmp_path / "zoo", settings={**SETTINGS, "seed": 2})
    other = ZooWriter(tmp_path / "other", settings={**SETTINGS, "seed": 2})
    assert first.digest in str(caught.value) and other.digest in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "blobs", "named"),
    [
        ([entry(0), entry(0)], [blob(0, 2)] * 2, "model id 'm000'"),
        ([entry(1)], [], "1 entries but 0 blobs"),
        ([entry(1, results={"f1": 0.5})], [blob(0, 2)], "m001: no result column 'f1'"),
        ([entry(1, hyperparameters={"a": object()})], [blob(0, 2)], "m001: not ready for JSON"),
        ([entry(1)], [blob(0, 2)[:-1]], "m001: truncated"),
    ],
)
def test_shards_are_refused_before_anything_is_written(tmp_path, entries, blobs, named):
    new = ZooWriter(tmp_path / "zoo", settings=SETTINGS)
    with pytest.raises(WeightspaceError) as caught:
        new.write_shard("00000", entries, blobs)
    assert named in str(caught.value)
    assert [f.name for f in (tmp_path / "zoo").iterdir()] == ["zoo.json"]
    new.write_shard("00000", [entry(5)], [blob(0, 2)])
    for name in ("00000", "../up", ""):
        with pytest.raises(ZooError, match="no shard name or written already"):
            new.write_shard(name, [entry(6)], [blob(0, 2)])
    with pytest.raises(ZooError, match="model id 'm005' is there already"):
        new.write_shard("00001", [entry(5)], [blob(0, 2)])


def test_writers_refuse_other_folders_and_columns(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ZooError, match=r"holds 'notes\.txt' and no zoo"):
        ZooWriter(tmp_path, settings={})
    with pytest.raises(ZooError, match="'weights' cannot be a result column"):
        ZooWriter(tmp_path / "zoo", settings={}, results=["weights"])
    with pytest.raises(ZooError, match=r"no model to make a zoo of \(b\.bin: a pickle\)"):
        empty = ZooWriter(tmp_path / "zoo", settings={})
        empty.write_shard("a", [], [], skipped=[("b.bin", "a pickle")])
        empty.finish()


def test_skips_are_listed(tmp_path):
    new = ZooWriter(tmp_path / "zoo", settings={})
    new.write_shard("b", [], [], skipped=[("late.safetensors", "NaN")])
    new.write_shard("a", [entry(0)], [blob(0, 2)], skipped=[("early.safetensors", "truncated")])
    new.finish()
    again = ZooWriter(tmp_path / "zoo", settings={})
    assert again.skipped == (("early.safetensors", "truncated"), ("late.safetensors", "NaN"))
    lines = (tmp_path / "zoo" / "skips.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"file": "early.safetensors", "reason": "truncated"}
    assert len(load_zoo(tmp_path / "zoo")) == again.models == 1


def edit_state(path, **changes):
    state = json.loads((path / "zoo.json").read_text())
    (path / "zoo.json").write_text(json.dumps(state | changes))


def flip_a_weight(path):
    file = path / "weights" / "00000.parquet"
    content = bytearray(file.read_bytes())
    at = content.index(blob(0, 2)) + len(blob(0, 2)) - 3
    content[at] ^= 1
    file.write_bytes(content)


def rename_headers(path):
    file = path / "index" / "00000.parquet"
    table = pq.read_table(file)
    headers = pa.array(reversed(table["header"].to_pylist()), pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("header"), "header", headers), file)


def replace_column(path, name, value):
    file = path / "index" / "00000.parquet"
    table = pq.read_table(file)
    column = pa.array([value] * len(table), pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), file)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("lineage", "3", "'3' where a JSON list"),
        ("config", "{", "'{' where a JSON dict"),
        ("run_id", None, "no run_id"),
    ],
)
def test_an_index_of_wrong_values_is_named(tmp_path, name, value, named):
    write(tmp_path / "zoo")
    replace_column(tmp_path / "zoo", name, value)
    with pytest.raises(ZooError) as caught:
        list(load_zoo(tmp_path / "zoo").entries())
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: (path / "zoo.json").unlink(), "no zoo.json"),
        (lambda path: (path / "zoo.json").write_text("{"), "zoo.json: not valid JSON"),
        (lambda path: edit_state(path, version=2), "version 2"),
        (lambda path: edit_state(path, complete=False), "incomplete"),
        (lambda path: edit_state(path, shards=["../../etc"]), "'../../etc' is no shard name"),
        (lambda path: edit_state(path, digest=None), "digest is None"),
        (lambda path: (path / "weights" / "00001.parquet").unlink(), "weights/00001.parquet"),
        (lambda path: (path / "index" / "00001.parquet").write_bytes(b"PAR1"), "index/00001.parquet"),
        (lambda path: edit_state(path, shards=["00000"]) or (path / "weights/00000.parquet").write_bytes(
            (path / "weights/00001.parquet").read_bytes()
        ), "5 models in index and another number in weights"),
        (flip_a_weight, "weights/00000.parquet: cannot be read (could not verify page integrity"),
        (rename_headers, "the index names it but the weights have another"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, damage, named):
    write(tmp_path / "zoo", (2, 3, 5, 2, 3, 5, 2, 3, 5), shards=2)
    damage(tmp_path / "zoo")
    with pytest.raises(ZooError) as caught:
        list(load_zoo(tmp_path / "zoo").batches())
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_is_no_folder_says_what_to_give(tmp_path):
    with pytest.raises(ZooError, match=r"no such folder; give the folder of a zoo or org/name\[@revision\]"):
        load_zoo(tmp_path / "missing")


def test_models_that_cannot_be_used_are_left_out_by_name(tmp_path, caplog):
    """Zoos of earlier versions hold what is refused on entry today."""
    foreign = {"family": "mlp", "hidden_dims": [8]}
    another = {"family": "cnn", "image_shape": [1, 8, 8], "classes": 3, "channels": [2]}
    blobs = [blob(number, 2) for number in range(6)]
    blobs[1], blobs[4] = checkpoint_bytes({"ids": torch.arange(5)}), checkpoint_bytes({})
    configs = [None, None, foreign, {"hidden": [2]}, None, another]
    new = ZooWriter(tmp_path / "zoo", settings=SETTINGS)
    new.write_shard("0", [entry(row, config=config) for row, config in enumerate(configs)], blobs)
    new.finish()
    whole = load_zoo(tmp_path / "zoo")
    with pytest.raises(ZooError, match="'m001': none of its 1 tensors has floating point entries"):
        _ = whole.architectures
    usable = whole.usable()
    assert usable.index["model_id"].tolist() == ["m000", "m003"] and len(whole) == 6
    reasons = dict(usable.left_out)
    assert list(reasons) == ["m001", "m002", "m004", "m005"] and reasons["m005"].startswith("tensor ")
    assert "mlp config: unknown key 'hidden_dims'" in reasons["m002"]
    assert "4 models cannot be used and are left out: 'm001'" in caplog.text
    assert [usable.blob(row) for row in range(2)] == [blobs[0], blobs[3]] and usable.usable() is usable
    assert usable.families == [None, None] and usable.digest == whole.digest
    [batch] = usable.batches()
    assert batch.rows.tolist() == [0, 1] and torch.equal(batch.flat[1], usable.flat([1])[0])
    assert torch.equal(batch.flat, torch.cat([expected_flat(usable, row).unsqueeze(0) for row in range(2)]))


def test_a_zoo_of_nothing_that_can_be_used_is_refused(tmp_path):
    new = ZooWriter(tmp_path / "zoo", settings=SETTINGS)
    new.write_shard("0", [entry(0)], [checkpoint_bytes({"ids": torch.arange(5)})])
    new.finish()
    with pytest.raises(ZooError, match=r"none of its 1 models can be used \('m000': none of its 1 tensors"):
        load_zoo(tmp_path / "zoo").usable()
