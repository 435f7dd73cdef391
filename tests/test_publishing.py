"""Pushing encoders, zoos and plain models to the Hub, and what a card becomes when people have written in it."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import DatasetCard
from loopback_hub import LoopbackHub

from weightspace.cards.facts import EncoderFacts, Measurement, Score
from weightspace.cards.record import BEGIN, END, known_facts, write_card
from weightspace.errors import HubError, WeightspaceError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.hub import HubOptions
from weightspace.io.writing import checkpoint_bytes, save_checkpoint
from weightspace.publishing import PushPlan, PushSettings, push_folder
from weightspace.schema import ModelRef, ZooEntry
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.writer import ZooWriter

MEASURED = (Measurement("test_accuracy", "r2", "R²", Score("ours", 0.7, 0.6, 0.8), (Score("s(W)", 0.6),)),)
OURS = PushSettings(licence="apache-2.0")


def files_of(hub: LoopbackHub, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, Any]:
    files = dict(hub.repository(repo_id, repo_type).at(revision).files)
    files.pop(".gitattributes", None)
    return files


def text_of(hub: LoopbackHub, repo_id: str, path: str, repo_type: str = "model", revision: str = "main") -> str:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, path, repo_type=repo_type, revision=revision)).read_text(encoding="utf-8")


@pytest.fixture
def encoder(tiny_encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """One model of the library's own families, as a sampler would leave it."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_checkpoint({"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"family": "mlp", "hidden": [3]}))
    row = {"file": "model.safetensors", "dataset": "digits", "test_accuracy": 0.75, "base_model": "org/base"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def mixed_zoo(folder: Path, sources: dict[str, tuple[str, str | None]]) -> Zoo:
    """A zoo with one model for each id, of the given places and licences."""
    writer = ZooWriter(folder, settings={"seed": 1})
    entries = [
        ZooEntry(name, name, ModelRef(place, "a" * 40 if place[0] not in "./" else None), licence=licence)
        for name, (place, licence) in sources.items()
    ]
    blobs = [checkpoint_bytes({"w": torch.full((4, 3), float(number))}) for number in range(len(entries))]
    writer.write_shard("a", entries, blobs, skipped=[("org/broken", "no weights")])
    writer.finish()
    return load_zoo(folder)


# Encoders


def test_an_encoder_goes_up_without_the_state_of_its_training(hub: LoopbackHub, encoder: Path) -> None:
    (encoder / "checkpoints" / "step-00000010").mkdir(parents=True)
    (encoder / "checkpoints" / "step-00000010" / "model.safetensors").write_bytes(b"x")
    (encoder / "optimizer.bin").write_bytes(b"x")
    (encoder / ".cache").write_text("")
    before = {path: path.read_bytes() for path in encoder.rglob("*") if path.is_file()}
    plan, done = push_folder(encoder, "org/encoder", OURS)
    assert (plan.kind, plan.repo_type, plan.present, plan.makes_public) == ("encoder", "model", None, True)
    expected = {"README.md", "card.json", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(files_of(hub, "org/encoder")) == {*expected, "training.json"} == {file.path for file in plan.files}
    left_out = dict(plan.left_out)
    assert left_out["checkpoints"] == "state of the training" and "pickle" in left_out["optimizer.bin"]
    assert done is not None and done.oid == hub.repository("org/encoder").at("main").sha
    assert done.commit_url == f"{hub.url}/org/encoder/commit/{done.oid}" and done.pr_url is None
    assert {path: path.read_bytes() for path in encoder.rglob("*") if path.is_file()} == before


def test_the_card_on_the_hub_is_rendered_for_its_place(hub: LoopbackHub, encoder: Path) -> None:
    facts = known_facts(encoder)
    assert isinstance(facts, EncoderFacts)
    write_card(encoder, replace(facts, measurements=MEASURED))
    push_folder(encoder, "org/encoder", OURS)
    card = ModelCard.load("org/encoder")
    card.validate()
    assert 'AutoModel.from_pretrained("org/encoder")' in card.text and "path/to/this/folder" not in card.text
    assert card.data.license == "apache-2.0" and card.data.library_name == "weightspace"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("r2", 0.7)
    assert "| s(W) | 0.600 |" in card.text and "**0.700 [0.600, 0.800]**" in card.text
    assert "48 models of 24 training runs" in card.text and "the publisher's own (48 models)" in card.text
    assert str(encoder.parent) not in card.content + text_of(hub, "org/encoder", "card.json")


def test_a_prior_goes_up_as_what_it_is(hub: LoopbackHub, tiny_prior: Path, tiny_encoder: Path) -> None:
    plan, _ = push_folder(tiny_prior, "org/prior", OURS)
    assert plan.kind == "encoder"
    assert any("nothing was measured of this prior" in notice for notice in plan.notices)
    card = ModelCard.load("org/prior")
    card.validate()
    assert "A prior of weights" in card.text and '--prior "org/prior"' in card.text
    assert "weight encoder" not in card.text and card.data.pipeline_tag is None
    training = json.loads(text_of(hub, "org/prior", "training.json"))
    assert training["autoencoder"] == tiny_encoder.name
    for path in ("README.md", "card.json", "training.json", "config.json"):
        assert str(tiny_encoder.parent) not in text_of(hub, "org/prior", path)


def test_no_place_on_this_machine_is_published(hub: LoopbackHub, encoder: Path, tiny_zoo: Zoo) -> None:
    push_folder(encoder, "org/encoder")
    training = json.loads(text_of(hub, "org/encoder", "training.json"))
    assert training["zoo"] == tiny_zoo.path.name and training["zoo_digest"] == tiny_zoo.digest
    for path in ("README.md", "card.json", "training.json", "config.json"):
        assert str(tiny_zoo.path.parent) not in text_of(hub, "org/encoder", path)


def test_an_encoder_names_the_commit_of_its_zoo(hub: LoopbackHub, encoder: Path, tiny_zoo: Zoo, tmp_path: Path) -> None:
    _, zoo = push_folder(tiny_zoo.path, "org/zoo", OURS)
    assert zoo is not None
    push_folder(encoder, "org/encoder", replace(OURS, zoo="org/zoo"))
    card = ModelCard.load("org/encoder")
    assert card.data.datasets == ["org/zoo"] and f"at commit {zoo.oid}" in card.text
    mixed_zoo(tmp_path / "other", {"a": ("./a", None)})
    push_folder(tmp_path / "other", "org/other", OURS)
    with pytest.raises(
        WeightspaceError, match=rf"org/other@\w+: the encoder was trained on a zoo of digest {tiny_zoo.digest}"
    ):
        push_folder(encoder, "org/encoder", replace(OURS, zoo="org/other"))


def test_numbers_of_other_weights_are_not_published(
    hub: LoopbackHub, encoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = known_facts(encoder)
    assert isinstance(facts, EncoderFacts)
    write_card(encoder, replace(facts, measurements=MEASURED))
    tensors = open_checkpoint(encoder).tensors()
    save_checkpoint({name: value + 1 for name, value in tensors.items()}, encoder / "model.safetensors")
    plan, _ = push_folder(encoder, "org/encoder", OURS)
    assert "Nothing was measured" in ModelCard.load("org/encoder").text
    assert "the weights have changed since they were measured" in caplog.text
    assert any("nothing was measured" in notice for notice in plan.notices)


def test_an_encoder_without_recorded_facts_gets_a_card_all_the_same(hub: LoopbackHub, encoder: Path) -> None:
    (encoder / "card.json").unlink()
    (encoder / "README.md").unlink()
    push_folder(encoder, "org/encoder")
    card = ModelCard.load("org/encoder")
    assert "Nothing was measured" in card.text and "parameters." in card.text and '"hidden_size": 32' in card.text
    assert card.data.license is None


def test_a_published_encoder_is_tested_on_the_runs_it_never_saw(
    hub: LoopbackHub, encoder: Path, tiny_zoo: Zoo, tmp_path: Path
) -> None:
    from weightspace.probes.rows import rows_to_records
    from weightspace.probes.zoo import probe_zoo

    push_folder(encoder, "org/encoder", OURS)
    push_folder(tiny_zoo.path, "org/zoo", OURS)
    ours = rows_to_records(probe_zoo(tiny_zoo, encoder, ["step"], seeds=[0]))
    theirs = rows_to_records(probe_zoo("org/zoo", "org/encoder", ["step"], seeds=[0]))
    assert json.dumps(theirs) == json.dumps(ours)


# What is there already


def test_a_second_push_changes_what_changed_in_one_commit(hub: LoopbackHub, encoder: Path) -> None:
    _, first = push_folder(encoder, "org/encoder", OURS)
    plan, again = push_folder(encoder, "org/encoder", OURS)
    assert first is not None and again is not None
    assert plan.present == first.oid == again.oid and not plan.makes_public
    put = len(hub.seen(method="PUT"))
    tensors = open_checkpoint(encoder).tensors()
    save_checkpoint({name: value + 1 for name, value in tensors.items()}, encoder / "model.safetensors")
    _, changed = push_folder(encoder, "org/encoder", replace(OURS, message="Train again"))
    head = hub.repository("org/encoder").at("main")
    assert changed is not None and head.sha == changed.oid and head.title == "Train again"
    assert head.parent is not None and head.parent.sha == first.oid
    assert len(hub.seen(method="PUT")) == put + 1


def test_superseded_weights_are_removed(hub: LoopbackHub, encoder: Path) -> None:
    stale = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": "{}", "notes.txt": "mine"}
    hub.create("org/encoder", stale)
    plan, _ = push_folder(encoder, "org/encoder", OURS)
    assert plan.removed == ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    assert "notes.txt" in files_of(hub, "org/encoder") and not {*plan.removed} & set(files_of(hub, "org/encoder"))


def test_an_interrupted_push_sends_only_what_is_missing(
    hub: LoopbackHub, tiny_zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightspace.io.hub.ATTEMPTS", 1)
    commit = hub.fail("/commit/", 400, body=b'{"error": "not now"}', times=None)
    with pytest.raises(HubError, match=r"org/zoo: .*not now"):
        push_folder(tiny_zoo.path, "org/zoo", OURS)
    commit.times = 0
    sent = len(hub.seen(method="PUT"))
    assert sent
    push_folder(tiny_zoo.path, "org/zoo", OURS)
    assert len(hub.seen(method="PUT")) == sent
    assert len(load_zoo("org/zoo")) == 48


def test_bad_moments_of_the_hub_are_survived(hub: LoopbackHub, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightspace.io.hub.FIRST_WAIT", 0.01)
    hub.fail("/api/repos/create", 429, headers={"Retry-After": "0"})
    hub.fail("/preupload/", 503)
    hub.drop("/api/models/org/encoder")
    _, done = push_folder(encoder, "org/encoder", OURS)
    assert done is not None and files_of(hub, "org/encoder")


@pytest.mark.parametrize("moment", ["/preupload/", "/info/lfs/objects/batch", "^/lfs|/lfs/", "/commit/"])
def test_a_hub_that_goes_away_midway(
    hub: LoopbackHub, encoder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr("weightspace.io.hub.ATTEMPTS", 2)
    monkeypatch.setattr("weightspace.io.hub.FIRST_WAIT", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.call(moment, hub.stop)
    with pytest.raises(HubError, match=r"org/encoder: .*out of reach"):
        push_folder(encoder, "org/encoder")
    hub.start()
    push_folder(encoder, "org/encoder")
    assert "model.safetensors" in files_of(hub, "org/encoder")


def test_a_branch_is_made_and_main_stays(hub: LoopbackHub, encoder: Path) -> None:
    _, first = push_folder(encoder, "org/encoder", OURS)
    _, other = push_folder(encoder, "org/encoder", PushSettings(licence="mit", revision="next"))
    assert first is not None and other is not None
    assert hub.repository("org/encoder").at("main").sha == first.oid != other.oid
    assert "license: mit" in text_of(hub, "org/encoder", "README.md", revision="next")
    again, _ = push_folder(encoder, "org/encoder", PushSettings(licence="mit", revision="next"))
    assert again.present == other.oid


def test_a_pull_request_changes_nothing_yet(hub: LoopbackHub, encoder: Path) -> None:
    with pytest.raises(HubError, match="org/encoder: no such model to open a pull request in"):
        push_folder(encoder, "org/encoder", PushSettings(create_pr=True))
    _, first = push_folder(encoder, "org/encoder", OURS)
    visitor = hub.add_user("visitor")
    settings = PushSettings(licence="mit", create_pr=True)
    _, done = push_folder(encoder, "org/encoder", settings, options=HubOptions(token=visitor))
    assert first is not None and done is not None
    assert done.pr_url == f"{hub.url}/org/encoder/discussions/1"
    assert hub.repository("org/encoder").at("main").sha == first.oid
    with pytest.raises(WeightspaceError, match="revision next: a pull request is opened against the default branch"):
        push_folder(encoder, "org/encoder", PushSettings(create_pr=True, revision="next"))


def test_private_stays_private(hub: LoopbackHub, encoder: Path) -> None:
    plan, _ = push_folder(encoder, "org/secret", PushSettings(private=True))
    assert plan.private and not plan.makes_public and hub.repository("org/secret").private
    again, _ = push_folder(encoder, "org/secret")
    assert again.private and hub.repository("org/secret").private
    hub.create("org/open", {})
    with pytest.raises(HubError, match="org/open: is public already; make it private on its page"):
        push_folder(encoder, "org/open", PushSettings(private=True))


def test_whoever_may_not_write_is_told(hub: LoopbackHub, encoder: Path) -> None:
    push_folder(encoder, "org/encoder", OURS)
    for token in (hub.add_user("eve"), False):
        with pytest.raises(HubError, match="org/encoder: the Hub refuses access; check that your token"):
            push_folder(encoder, "org/encoder", PushSettings(licence="mit"), options=HubOptions(token=token))
    with pytest.raises(WeightspaceError, match="encoder: not a repository of the Hub; write org/name"):
        push_folder(encoder, "encoder")


def test_nothing_is_sent_without_consent(hub: LoopbackHub, encoder: Path) -> None:
    shown: list[PushPlan] = []

    def refuse(plan: PushPlan) -> bool:
        shown.append(plan)
        return False

    plan, done = push_folder(encoder, "org/encoder", OURS, confirm=refuse)
    assert shown == [plan] and done is None and not hub.repositories
    assert not hub.seen(method="POST") and not hub.seen(method="PUT")


# Cards that people have written in


def test_notes_are_kept_wherever_they_were_written(hub: LoopbackHub, encoder: Path) -> None:
    noted = (encoder / "README.md").read_text().replace(f"{BEGIN}\n", f"{BEGIN}\n## Reviewed\n\nBy hand.\n")
    (encoder / "README.md").write_text(noted)
    plan, _ = push_folder(encoder, "org/encoder", OURS)
    assert f"{BEGIN}\n## Reviewed\n\nBy hand.\n{END}" in ModelCard.load("org/encoder").text
    assert not [notice for notice in plan.notices if "card" in notice and "measured" not in notice]
    online = text_of(hub, "org/encoder", "README.md").replace("By hand.", "On the Hub.")
    hub.commit("org/encoder", {"README.md": online})
    (encoder / "README.md").write_text(noted.replace("## Reviewed\n\nBy hand.\n", ""))
    push_folder(encoder, "org/encoder", PushSettings(licence="mit"))
    card = ModelCard.load("org/encoder")
    assert "On the Hub." in card.text and card.data.license == "mit"


def test_a_card_changed_by_hand_is_published_as_it_is(hub: LoopbackHub, encoder: Path) -> None:
    mine = (encoder / "README.md").read_text().replace("A weight encoder", "My weight encoder")
    (encoder / "README.md").write_text(mine)
    plan, _ = push_folder(encoder, "org/encoder", OURS)
    assert text_of(hub, "org/encoder", "README.md") == mine
    assert any("changed by hand and is published as it is; --replace-card" in notice for notice in plan.notices)
    push_folder(encoder, "org/encoder", replace(OURS, replace_card=True))
    assert "My weight encoder" not in text_of(hub, "org/encoder", "README.md")


def test_a_card_changed_on_the_hub_stays(hub: LoopbackHub, encoder: Path) -> None:
    push_folder(encoder, "org/encoder", OURS)
    theirs = text_of(hub, "org/encoder", "README.md") + "\nSee our paper.\n"
    hub.commit("org/encoder", {"README.md": theirs})
    plan, _ = push_folder(encoder, "org/encoder", PushSettings(licence="mit"))
    assert text_of(hub, "org/encoder", "README.md") == theirs
    assert any("card on the Hub was written or changed there and stays" in notice for notice in plan.notices)
    push_folder(encoder, "org/encoder", PushSettings(licence="mit", replace_card=True))
    assert "our paper" not in text_of(hub, "org/encoder", "README.md")


def test_a_card_that_the_hub_refuses_is_said(hub: LoopbackHub, encoder: Path) -> None:
    (encoder / "README.md").write_text("---\nlicense: [\n---\n\nMine.\n")
    with pytest.raises(HubError, match=r"org/encoder: .*correct README\.md"):
        push_folder(encoder, "org/encoder")


# What cannot be published


def test_an_unfinished_training_is_refused(encoder: Path) -> None:
    training = json.loads((encoder / "training.json").read_text())
    (encoder / "training.json").write_text(json.dumps({**training, "complete": False}))
    with pytest.raises(WeightspaceError, match="encoder: its training is not finished; run the command"):
        push_folder(encoder, "org/encoder")


def test_what_is_nothing_to_publish_is_refused(tmp_path: Path, tiny_zoo: Zoo) -> None:
    with pytest.raises(WeightspaceError, match="none: no such folder"):
        push_folder(tmp_path / "none", "org/x")
    with pytest.raises(WeightspaceError, match=r"nothing to publish \(no zoo\.json and no safetensors file\)"):
        push_folder(tmp_path, "org/x")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(WeightspaceError, match=r"nothing to publish \(only pickles such as 'pytorch_model\.bin'\)"):
        push_folder(tmp_path, "org/x")
    zoo = tmp_path / "zoo"
    shutil.copytree(tiny_zoo.path, zoo)
    state = json.loads((zoo / "zoo.json").read_text())
    (zoo / "zoo.json").write_text(json.dumps({**state, "complete": False}))
    with pytest.raises(WeightspaceError, match="zoo: the zoo is incomplete"):
        push_folder(zoo, "org/x")


@pytest.mark.parametrize("name", ["model.safetensors", "extra.safetensors"])
def test_a_pickle_named_safetensors_is_refused(hub: LoopbackHub, encoder: Path, models: Path, name: str) -> None:
    for folder in (encoder, models):
        (folder / name).write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(WeightspaceError, match=name):
            push_folder(folder, "org/x")
    assert not hub.repositories


# Zoos


def test_a_zoo_goes_up_whole(hub: LoopbackHub, tiny_zoo: Zoo) -> None:
    plan, done = push_folder(tiny_zoo.path, "org/zoo", OURS)
    assert done is not None and (plan.kind, plan.repo_type) == ("zoo", "dataset")
    assert ("ledger.jsonl", "only needed to go on writing") in plan.left_out
    zoo = load_zoo("org/zoo")
    assert zoo.digest == tiny_zoo.digest and zoo.location == f"org/zoo@{done.oid}"
    assert [zoo.blob(row) for row in range(48)] == [tiny_zoo.blob(row) for row in range(48)]
    card = DatasetCard.load("org/zoo")
    card.validate()
    assert card.data.license == "apache-2.0" and card.data.size_categories == ["n<1K"]
    assert "| 48 | apache-2.0 (the publisher's own models) |" in card.text and 'load_zoo("org/zoo")' in card.text
    assert "| mlp |" in card.text and "| test\\_accuracy | 48 |" in card.text
    index = datasets.load_dataset("org/zoo", "index")["train"]
    assert index["model_id"][:] == tiny_zoo.index["model_id"].tolist()
    first = next(iter(datasets.load_dataset("org/zoo", "weights", streaming=True)["train"]))
    assert first["weights"] == tiny_zoo.blob(0)


def test_models_whose_licence_forbids_it_stay(hub: LoopbackHub, tmp_path: Path) -> None:
    zoo = mixed_zoo(
        tmp_path / "zoo",
        {
            "own": ("./own.safetensors", None),
            "open": ("org/open", "apache-2.0"),
            "silent": ("org/silent", None),
            "frozen": ("org/frozen", "cc-by-nd-4.0"),
            "other": ("org/other", "other"),
            "free": ("org/free", "MIT"),
        },
    )
    plan, _ = push_folder(zoo.path, "org/zoo", PushSettings(licence="cc0-1.0"))
    published = load_zoo("org/zoo")
    assert published.index["model_id"].tolist() == ["own", "open", "free"]
    assert [published.blob(row) for row in range(3)] == [zoo.blob(row) for row in (0, 1, 5)]
    assert published.digest != zoo.digest and published.settings["published_from"] == zoo.digest
    notices = "\n".join(plan.notices)
    assert f"1 model left out: no licence known, e.g. 'org/silent@{'a' * 40}'" in notices
    assert "cc-by-nd-4.0" in notices and "'other'" in notices
    card = DatasetCard.load("org/zoo")
    assert card.data.license == ["cc0-1.0", "MIT", "apache-2.0"]
    assert "- 1 model: no licence known" in card.text and "| 1 | MIT |" in card.text
    assert "| 1 | cc0-1.0 (the publisher's own models) |" in card.text
    assert json.loads(text_of(hub, "org/zoo", "skips.jsonl", "dataset")) == {
        "file": "org/broken",
        "reason": "no weights",
    }
    assert len(load_zoo(tmp_path / "zoo")) == 6


def test_a_zoo_of_which_nothing_may_be_published_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    mixed_zoo(tmp_path / "zoo", {"a": ("org/a", None), "b": ("org/b", None)})
    with pytest.raises(WeightspaceError, match=r"none of .* published \(no licence known, e\.g\. 'org/a"):
        push_folder(tmp_path / "zoo", "org/zoo")
    assert not hub.repositories


def test_places_of_files_are_cut_and_the_zoo_stays_the_same(hub: LoopbackHub, tmp_path: Path) -> None:
    zoo = mixed_zoo(tmp_path / "zoo", {"a": ("/home/someone/models/a/model.safetensors", None), "b": ("./b", None)})
    plan, _ = push_folder(zoo.path, "org/zoo", OURS)
    published = load_zoo("org/zoo")
    assert [entry.ref.location for entry in published.entries()] == ["./a/model.safetensors", "./b"]
    assert published.digest == zoo.digest and [published.blob(row) for row in (0, 1)] == [
        zoo.blob(row) for row in (0, 1)
    ]
    assert any("of where 1 model lay on this machine" in notice for notice in plan.notices)


def test_shards_of_an_earlier_zoo_are_removed(hub: LoopbackHub, tiny_zoo: Zoo, tmp_path: Path) -> None:
    push_folder(tiny_zoo.path, "org/zoo", OURS)
    mixed_zoo(tmp_path / "zoo", {"a": ("./a", None)})
    plan, _ = push_folder(tmp_path / "zoo", "org/zoo", OURS)
    assert set(plan.removed) == {
        f"{kind}/{path.name}" for kind in ("index", "weights") for path in (tiny_zoo.path / "index").iterdir()
    }
    assert len(load_zoo("org/zoo")) == 1
    assert len(datasets.load_dataset("org/zoo", "index")["train"]) == 1


# Plain models


def test_a_sampled_model_goes_up(hub: LoopbackHub, models: Path) -> None:
    (models / "events.log").write_text("x")
    plan, done = push_folder(models, "org/sampled", OURS)
    assert done is not None and plan.kind == "models"
    assert set(files_of(hub, "org/sampled")) == {
        "README.md",
        "card.json",
        "config.json",
        "metadata.jsonl",
        "model.safetensors",
    }
    assert plan.left_out == (("events.log", "not among the kinds of files that are published"),)
    card = ModelCard.load("org/sampled")
    card.validate()
    assert card.data.base_model == "org/base" and card.data.library_name == "weightspace"
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("digits", "accuracy", 0.75)
    assert "| sampled | mlp | 9 | F32 | digits | 0.750 |" in card.text
    loaded = open_checkpoint("org/sampled")
    assert torch.equal(loaded.tensor("0.weight"), torch.ones(3, 2)) and loaded.config == {
        "family": "mlp",
        "hidden": [3],
    }


def test_many_models_go_up_with_their_folders(hub: LoopbackHub, tiny_zoo: Zoo, tmp_path: Path) -> None:
    from weightspace.zoo.transfer import export_folder

    rows = [0, int(np.flatnonzero(tiny_zoo.index["header"] != tiny_zoo.index["header"][0])[0])]
    export_folder(tiny_zoo, tmp_path / "models", rows)
    plan, _ = push_folder(tmp_path / "models", "org/models", OURS)
    names = [file.path for file in plan.files if file.path.endswith(".safetensors")]
    assert len(names) == 2 and all(name.endswith("/model.safetensors") for name in names)
    card = ModelCard.load("org/models")
    assert f'open_checkpoint("org/models:{names[0]}")' in card.text and card.data.eval_results is None
    assert "| cnn |" in card.text and "| mlp |" in card.text
    found, expected = open_checkpoint(f"org/models:{names[0]}").tensors(), tiny_zoo.checkpoint(0).tensors()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
