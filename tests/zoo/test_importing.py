from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from kills import Killed, Watch, content

from weightspace.errors import ZooError
from weightspace.io.checkpoint import open_checkpoint_bytes
from weightspace.io.writing import checkpoint_bytes
from weightspace.schema import ModelRef
from weightspace.zoo import importing, writer
from weightspace.zoo.dataset import load_zoo
from weightspace.zoo.importing import import_folder
from weightspace.zoo.writer import ZooSummary

GOOD = checkpoint_bytes({"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)})


def fill(folder: Path, rows, files) -> Path:
    """Writes the files (bytes by path) and one line a row; a row that is no mapping is written as it is."""
    for name, blob in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(blob)
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "zoo"


def test_rows_become_entries(folder, output):
    rows = [
        {
            "file": "a/one.safetensors",
            "dataset": None,
            "run": 7,
            "test_accuracy": 0.5,
            "train_accuracy": 1,
            "test_loss": None,
            "licence": "MIT",
            "seed": 3,
            "policy": {"net": [64, 64], "bias": None},
            "hyperparameters": {"epoch": "last"},
            "results": {"reward": -85.2},
        },
        {
            "file": "two.safetensors",
            "model_id": "second",
            "run_id": "r",
            "dataset": "digits",
            "license": "apache-2.0",
            "base_model": "org/base",
            "lineage": ["org/base", "org/older"],
            "ref": "org/name@main:sub",
        },
    ]
    fill(folder, rows, {"a/one.safetensors": GOOD, "two.safetensors": GOOD, "a/config.json": b'{"hidden": [2]}'})
    assert import_folder(folder, output) == ZooSummary(2, ())
    zoo = load_zoo(output)
    one, two = zoo.entries()
    assert (one.model_id, one.run_id, one.dataset) == ("a/one", "7", None)
    assert one.results == {"test_accuracy": 0.5, "train_accuracy": 1.0, "generalization_gap": 0.5, "reward": -85.2}
    assert one.hyperparameters == {"seed": 3, "policy": {"net": [64, 64], "bias": None}, "epoch": "last"}
    assert (one.licence, one.config) == ("MIT", {"hidden": [2]})
    assert one.ref == ModelRef(str(folder / "a" / "one.safetensors"))
    assert (two.model_id, two.run_id, two.dataset, two.results) == ("second", "r", "digits", {})
    assert (two.licence, two.base_model, two.lineage) == ("apache-2.0", "org/base", ("org/base", "org/older"))
    assert (two.ref, two.config) == (ModelRef("org/name", "main", "sub"), None)
    assert zoo.blob(0) == zoo.blob(1) == GOOD


def test_without_a_run_each_model_is_its_own(folder, output):
    rows = [{"file": f"{name}.safetensors"} for name in "ab"]
    import_folder(fill(folder, rows, {f"{name}.safetensors": GOOD for name in "ab"}), output)
    assert load_zoo(output).index["run_id"].tolist() == ["a", "b"]


ROW = {"file": "bad.safetensors"}
NAN = checkpoint_bytes({"w": torch.tensor([1.0, float("nan"), float("inf")])})
NAN_FP8 = checkpoint_bytes({"w": torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn)})
PROBLEMS = {
    "missing file": (ROW, None, "there is no such file"),
    "no row": (None, GOOD, "no row of metadata.jsonl names it"),
    "truncated": (ROW, GOOD[:-1], "truncated"),
    "no safetensors": (ROW, b"PK\x03\x04" + bytes(90), "zip archive"),
    "nan": (ROW, NAN, "tensor 'w' has 2 NaN or infinite values of 3"),
    "nan in eight bits": (ROW, NAN_FP8, "tensor 'w' has 1 NaN or infinite values of 2"),
    "bad json": ('{"file": ', GOOD, "not valid JSON"),
    "no object": ('["bad.safetensors"]', GOOD, "expected a JSON object, got list"),
    "deep json": ('{"file":' + "[" * 100_000, GOOD, "nested too deeply"),
    "key twice": ('{"file": "bad.safetensors", "file": "good.safetensors"}', GOOD, "'file' stands twice"),
    "no file": ({"test_accuracy": 1}, GOOD, "no 'file'"),
    "file is a list": ({"file": ["bad.safetensors"]}, GOOD, "file must be a text"),
    "escape": ({"file": "../mine/bad.safetensors"}, GOOD, "leads out of the folder"),
    "absolute": ({"file": "/etc/passwd"}, GOOD, "leads out of the folder"),
    "null byte": ({"file": "bad\0.safetensors"}, GOOD, "file must be a text"),
    "endless name": ({"file": "b" * 5000}, GOOD, "cannot be read"),
    "pickle": ({"file": "metadata.jsonl"}, GOOD, "no safetensors file"),
    "text as number": (ROW | {"test_accuracy": "0.9"}, GOOD, "test_accuracy must be a number or null, got '0.9'"),
    "truth as number": (ROW | {"epoch": True}, GOOD, "epoch must be a number or null"),
    "number too large": (ROW | {"step": 10**400}, GOOD, "step must be a number or null"),
    "dataset": (ROW | {"dataset": {"name": "digits"}}, GOOD, "dataset must be a text"),
    "run": (ROW | {"run": 0.5}, GOOD, "run must be a text"),
    "half a character": (ROW | {"run": "\ud800"}, GOOD, "run must be a text"),
    "lineage": (ROW | {"lineage": "org/base"}, GOOD, "lineage must be a list"),
    "hyperparameters": (ROW | {"hyperparameters": [1]}, GOOD, "hyperparameters must be an object"),
    "results": (ROW | {"results": {"size": 3}}, GOOD, "'size' cannot be a result"),
    "metric too large": (ROW | {"metrics": [{"name": "a", "value": 10**400}]}, GOOD, "metrics must be"),
    "ref": (ROW | {"ref": {"repo": "org/name"}}, GOOD, "ref must have location"),
    "ref text": (ROW | {"ref": "https://host/model"}, GOOD, "URLs are not opened"),
    "named twice": ({"file": "./good.safetensors"}, None, "stands in line 1 already"),
    "id twice": (ROW | {"model_id": "good"}, GOOD, "model_id 'good' stands in line 1 already"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_are_skipped_by_name_or_refused(folder, output, problem):
    row, content, reason = PROBLEMS[problem]
    files = {"good.safetensors": GOOD} | ({"bad.safetensors": content} if content is not None else {})
    fill(folder, [{"file": "good.safetensors"}, *([row] if row is not None else [])], files)
    with pytest.raises(ZooError, match=r"nothing was written") as caught:
        import_folder(folder, output, on_problem="error")
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 6000
    assert not output.exists()

    summary = import_folder(folder, output)
    assert summary.models == 1 and load_zoo(output).index["model_id"].tolist() == ["good"]
    assert any(reason in why for _, why in summary.skipped)
    file = row.get("file") if isinstance(row, dict) else None
    assert {name for name, _ in summary.skipped} <= {"bad.safetensors", "metadata.jsonl:2", str(file)}
    listed = [json.loads(line) for line in (output / "skips.jsonl").read_text().splitlines()]
    assert [(line["file"], line["reason"]) for line in listed] == list(summary.skipped)


def test_links_out_of_the_folder_are_refused(folder, output, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(GOOD)
    fill(folder, [{"file": "good.safetensors"}, {"file": "link.safetensors"}], {"good.safetensors": GOOD})
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    summary = import_folder(folder, output)
    assert summary.models == 1
    assert any("link out of the folder" in reason for _, reason in summary.skipped)


def test_nothing_left_to_import_is_an_error(folder, output):
    with pytest.raises(ZooError, match=r"cannot read metadata\.jsonl \(No such file"):
        import_folder(folder, output)
    fill(folder, [{"file": "a.safetensors"}], {})
    with pytest.raises(ZooError, match=r"names no model that can be imported .*there is no such file"):
        import_folder(folder, output)
    fill(folder, [{"file": "a.safetensors"}], {"a.safetensors": NAN})
    with pytest.raises(ZooError, match=r"no model to make a zoo of .*NaN"):
        import_folder(folder, output)


def test_folders_sharded_checkpoints_and_adapters(folder, output):
    halves = {f"{i}.safetensors": checkpoint_bytes({f"w{i}": torch.full((3,), float(i))}) for i in range(2)}
    index = json.dumps({"weight_map": {f"w{i}": f"{i}.safetensors" for i in range(2)}}).encode()
    files = {f"sharded/{name}": content for name, content in halves.items()}
    files |= {"sharded/model.safetensors.index.json": index, "whole/model.safetensors": GOOD}
    files |= {"lora/adapter_model.safetensors": GOOD, "lora/adapter_config.json": b'{"r": 4}'}
    fill(folder, [{"file": name} for name in ("sharded", "whole", "lora")], files)
    assert import_folder(folder, output) == ZooSummary(3, ())
    zoo = load_zoo(output)
    assert zoo.index["model_id"].tolist() == ["sharded", "whole", "lora"]
    joined = open_checkpoint_bytes(zoo.blob(0), where="joined").tensors()
    assert {name: tensor.tolist() for name, tensor in joined.items()} == {"w0": [0.0] * 3, "w1": [1.0] * 3}
    assert zoo.blob(1) == zoo.blob(2) == GOOD
    assert [entry.config for entry in zoo.entries()] == [None, None, {"r": 4}]


def test_an_import_that_was_killed_goes_on(folder, output, monkeypatch):
    rows = [{"file": f"{n}.safetensors"} for n in range(7)] + [{"file": "gone.safetensors"}]
    files = {f"{n}.safetensors": GOOD for n in range(7)} | {"3.safetensors": NAN}
    fill(folder, rows, files)
    monkeypatch.setattr(writer, "SHARD_MODELS", 2)
    loaded = []
    load = importing._load

    def stop_at_the_fifth(folder, candidate):
        loaded.append(candidate.file)
        if len(loaded) == 5:
            raise KeyboardInterrupt
        return load(folder, candidate)

    monkeypatch.setattr(importing, "_load", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        import_folder(folder, output)
    with pytest.raises(ZooError, match="incomplete"):
        load_zoo(output)
    summary = import_folder(folder, output)
    assert loaded[5:] == ["4.safetensors", "5.safetensors", "6.safetensors"]
    assert summary.models == 6 and [name for name, _ in summary.skipped] == ["gone.safetensors", "3.safetensors"]
    assert load_zoo(output).index["model_id"].tolist() == ["0", "1", "2", "4", "5", "6"]


def test_a_changed_folder_is_another_zoo(folder, output):
    fill(folder, [{"file": "a.safetensors"}], {"a.safetensors": GOOD})
    import_folder(folder, output)
    assert import_folder(folder, output).models == 1
    fill(folder, [{"file": "a.safetensors", "epoch": 3}], {})
    with pytest.raises(ZooError, match="differ in content"):
        import_folder(folder, output)


def test_the_digest_depends_on_content_alone(folder, output, tmp_path):
    fill(folder, [{"file": "a.safetensors"}], {"a.safetensors": GOOD})
    import_folder(folder, output)
    copy = tmp_path / "other" / folder.name
    copy.mkdir(parents=True)
    fill(copy, [{"file": "a.safetensors"}], {"a.safetensors": GOOD})
    os.utime(copy / "a.safetensors", (1, 1))
    import_folder(copy, tmp_path / "again")
    assert load_zoo(tmp_path / "again").digest == load_zoo(output).digest
    changed = bytearray(GOOD)
    changed[-1] ^= 1  # the size stays
    fill(copy, [{"file": "a.safetensors"}], {"a.safetensors": bytes(changed)})
    with pytest.raises(ZooError, match="differ in content"):
        import_folder(copy, tmp_path / "again")


# What a folder from elsewhere may hold


def linked(folder: Path, name: str, target: Path | str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)


SECRET = b'{"token": "secret"}'
CONFIG, WEIGHTS = "bad/config.json", "bad/model.safetensors"
TRAPS = {
    "config that leaves": (lambda d, out: linked(d, CONFIG, out / "secret.json"), "is a link out"),
    "adapter config that leaves": (
        lambda d, out: linked(d, "bad/adapter_config.json", out / "secret.json"),
        "adapter_config.json is a link out",
    ),
    "config that is a device": (lambda d, out: linked(d, CONFIG, "/dev/zero"), "config.json is a link out"),
    "config that is a pipe": (lambda d, out: os.mkfifo(d / CONFIG), "config.json is no regular file"),
    "config that is missing": (lambda d, out: linked(d, CONFIG, "nothing"), "config.json is a link to nothing"),
    "config in a circle": (lambda d, out: linked(d, CONFIG, "config.json"), "config.json is a link in a circle"),
    "config that is a folder": (lambda d, out: (d / CONFIG).mkdir(), "config.json is no regular file"),
    "shard that leaves": (
        lambda d, out: (
            (d / WEIGHTS).unlink(),
            (d / "bad/model.safetensors.index.json").write_text('{"weight_map": {"fc.bias": "a.safetensors"}}'),
            linked(d, "bad/a.safetensors", out / "secret.safetensors"),
        ),
        "a.safetensors is a link out",
    ),
    "folder that leaves": (
        lambda d, out: ((d / "bad").rename(out / "bad"), linked(d, "bad", out / "bad")),
        "is a link out of the folder",
    ),
    "weights that are a pipe": (lambda d, out: ((d / WEIGHTS).unlink(), os.mkfifo(d / WEIGHTS)), "is no regular file"),
    "weights in a circle": (
        lambda d, out: ((d / WEIGHTS).unlink(), linked(d, WEIGHTS, "model.safetensors")),
        "is a link in a circle",
    ),
    "no floats": (
        lambda d, out: (d / WEIGHTS).write_bytes(checkpoint_bytes({"ids": torch.arange(4)})),
        "none of its 1 tensors has floating point entries",
    ),
    "empty tensors": (
        lambda d, out: (d / WEIGHTS).write_bytes(checkpoint_bytes({"w": torch.empty(0, 8)})),
        "none of its 1 tensors has floating point entries",
    ),
    "half of it empty": (
        lambda d, out: (d / WEIGHTS).write_bytes(checkpoint_bytes({"a": torch.ones(2), "b": torch.empty(0)})),
        "1 of its 2 tensors are empty, e.g. 'b'; save it again",
    ),
    "no tensors": (
        lambda d, out: (d / WEIGHTS).write_bytes(checkpoint_bytes({})),
        "none of its 0 tensors has floating point entries",
    ),
    "another network's config": (
        lambda d, out: (d / CONFIG).write_text(
            '{"family": "cnn", "image_shape": [1, 8, 8], "classes": 3, "channels": [2]}'
        ),
        "the config describes",
    ),
    "another project's config": (
        lambda d, out: (d / CONFIG).write_text('{"family": "mlp", "width_mult": 2}'),
        "mlp config",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_costs_one_row(folder, output, tmp_path, trap):
    spring, reason = TRAPS[trap]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret.json").write_bytes(SECRET)
    (tmp_path / "out" / "secret.safetensors").write_bytes(GOOD)
    files = {"good.safetensors": GOOD, "bad/model.safetensors": GOOD}
    fill(folder, [{"file": "bad" if "shard" in trap else "bad/model.safetensors"}, {"file": "good.safetensors"}], files)
    spring(folder, tmp_path / "out")
    summary = import_folder(folder, output)
    assert summary.models == 1
    assert [reason in why for name, why in summary.skipped if name.startswith("bad")] == [True], summary.skipped
    assert load_zoo(output).index["model_id"].tolist() == ["good"]
    assert all(b"secret" not in file.read_bytes() for file in output.rglob("*") if file.is_file())


def test_links_inside_the_folder_are_followed(folder, output):
    fill(folder, [{"file": "a.safetensors"}], {"blobs/x.safetensors": GOOD, "blobs/c": b'{"hidden": [2]}'})
    linked(folder, "a.safetensors", "blobs/x.safetensors")
    linked(folder, "config.json", "blobs/c")
    assert import_folder(folder, output) == ZooSummary(1, ())
    assert load_zoo(output).entry(0).config is None  # the link's target has no config beside it


def test_metadata_that_leaves_the_folder_is_refused(folder, output, tmp_path):
    (tmp_path / "secret").write_bytes(SECRET)
    linked(folder, "metadata.jsonl", tmp_path / "secret")
    with pytest.raises(ZooError, match=r"metadata\.jsonl is a link out of the folder"):
        import_folder(folder, output)


def test_strange_files_elsewhere_in_the_tree_do_no_harm(folder, output):
    fill(folder, [{"file": "a.safetensors"}], {"a.safetensors": GOOD})
    os.mkfifo(folder / "pipe.safetensors")
    os.mkfifo(folder / "config.jsonl")
    linked(folder, "sub/up", folder)
    linked(folder, "sub/circle.json", "circle.json")
    (folder / os.fsdecode(b"caf\xe9.safetensors")).write_bytes(GOOD)
    (folder / "line\nbreak.safetensors").write_bytes(GOOD)
    summary = import_folder(folder, output)
    assert summary.models == 1 and import_folder(folder, output) == summary
    assert {name for name, _ in summary.skipped} == {
        "pipe.safetensors",
        r"caf\xe9.safetensors",
        "line\nbreak.safetensors",
    }


def test_a_row_that_is_too_long_costs_one_row(folder, output, monkeypatch):
    monkeypatch.setattr(importing, "MAX_ROW_BYTES", 1000)
    rows = ['{"file": "b.safetensors", "note": "' + "x" * 10**6 + '"}', {"file": "a.safetensors"}]
    fill(folder, rows, {"a.safetensors": GOOD, "b.safetensors": GOOD})
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "metadata.jsonl").read_bytes())
    summary = import_folder(folder, output)
    assert summary.skipped[0] == ("metadata.jsonl:1", "the row is longer than 1000 bytes; shorten it")
    assert load_zoo(output).index["model_id"].tolist() == ["a"]


@pytest.mark.parametrize(
    ("given", "opened"),
    [
        ("sets/a", "{folder}/sets/a"),
        ("sets/a?size=8&rotation=90", "{folder}/sets/a?size=8&rotation=90"),
        ("./sets/a", "{folder}/sets/a"),
        ("../beside", "{parent}/beside"),
        ("./gone", "./gone"),
        (".", "."),
        ("org/name", "org/name"),
        ("digits?classes=0-1", "digits?classes=0-1"),
        ("/somewhere/else", "/somewhere/else"),
        ("what it shows: cats?", "what it shows: cats?"),
    ],
)
def test_datasets_are_relative_to_the_folder(folder, output, given, opened, monkeypatch, tmp_path):
    (folder / "sets" / "a").mkdir(parents=True)
    (folder / "digits").mkdir()
    (folder.parent / "beside").mkdir()
    fill(folder, [{"file": "a.safetensors", "dataset": given}], {"a.safetensors": GOOD})
    monkeypatch.chdir(tmp_path)
    import_folder("mine", output)
    assert load_zoo(output).index["dataset"].tolist() == [opened.format(folder=folder, parent=folder.parent)]


def test_killed_at_any_moment_the_result_is_the_same(folder, output, tmp_path, monkeypatch):
    rows = [{"file": f"{n}.safetensors"} for n in range(6)] + [{"file": "gone.safetensors"}]
    fill(folder, rows, {f"{n}.safetensors": GOOD for n in range(6)})
    monkeypatch.setattr(writer, "SHARD_MODELS", 2)
    watch = Watch()
    watch.run(tmp_path / "undisturbed", lambda: import_folder(folder, tmp_path / "undisturbed"))
    expected, calls = content(tmp_path / "undisturbed"), watch.count
    assert calls > 30
    for fatal in range(1, calls + 1, calls // 6):
        target = tmp_path / f"killed-{fatal}"
        with pytest.raises(Killed):
            watch.run(target, partial(import_folder, folder, target), fatal)
        import_folder(folder, target)
        assert content(target) == expected, fatal
