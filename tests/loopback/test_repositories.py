"""The loopback Hub as the real client sees it: making, filling, listing and naming repositories."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import LoopbackHub
from safetensors.numpy import save

CARD = """---
license: mit
library_name: timm
pipeline_tag: image-classification
base_model: org/base
datasets: [org/pictures]
tags: [tiny]
model-index:
- name: m
  results:
  - task: {type: image-classification}
    dataset: {name: Pictures, type: org/pictures}
    metrics:
    - {type: accuracy, value: 0.75}
---
# A model
"""


@pytest.fixture
def api() -> HfApi:
    return HfApi()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "sub" / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(save({"weight": np.ones((3, 4), np.float16)}))
    return tmp_path


def test_folder_is_uploaded_once(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    api.create_repo("org/model")
    first = api.upload_folder(repo_id="org/model", folder_path=folder)
    assert len(hub.seen("^/lfs/", "PUT")) == 1
    blobs = {blob.path: blob for blob in api.list_repo_tree("org/model", recursive=True)}
    assert set(blobs) == {".gitattributes", "README.md", "model.safetensors", "sub", "sub/config.json"}
    assert blobs["model.safetensors"].lfs is not None and blobs["README.md"].lfs is None

    again = api.upload_folder(repo_id="org/model", folder_path=folder)
    assert again.oid == first.oid
    assert len(hub.seen("/commit/", "POST")) == 1

    (folder / "sub" / "config.json").write_text('{"changed": true}')
    changed = api.upload_folder(repo_id="org/model", folder_path=folder)
    assert changed.oid != first.oid
    assert [commit.commit_id for commit in api.list_repo_commits("org/model")][:2] == [changed.oid, first.oid]


def test_commit_deletes_and_is_refused_on_a_stale_parent(hub: LoopbackHub, api: HfApi) -> None:
    old = hub.create("org/model", {"a.txt": "a", "folder/b.txt": "b", "folder/c.txt": "c"})
    operations = [CommitOperationDelete("folder/"), CommitOperationAdd("d.txt", b"d")]
    new = api.create_commit("org/model", operations, commit_message="tidy", parent_commit=old).oid
    assert api.list_repo_files("org/model") == ["a.txt", "d.txt"]
    assert api.list_repo_files("org/model", revision=old) == ["a.txt", "folder/b.txt", "folder/c.txt"]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/model", [CommitOperationAdd("e", b"e")], commit_message="late", parent_commit=old)
    with pytest.raises(EntryNotFoundError):
        api.delete_file("no.txt", "org/model")
    with pytest.raises(HfHubHTTPError, match="invalid name"):
        hub_path = CommitOperationAdd("ok", b"x")
        hub_path.path_in_repo = "../out"
        api.create_commit("org/model", [hub_path], commit_message="escape")
    assert api.repo_info("org/model").sha == new


def test_info_is_derived_from_the_files(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    sha = hub.create("org/model", {path.name: path for path in folder.iterdir() if path.is_file()})
    info = api.model_info("org/model", files_metadata=True)
    assert (info.sha, info.author, info.library_name, info.pipeline_tag) == (sha, "org", "timm", "image-classification")
    assert {"timm", "safetensors", "tiny", "license:mit", "dataset:org/pictures", "model-index"} <= set(info.tags)
    assert {"base_model:org/base", "base_model:finetune:org/base"} <= set(info.tags)
    assert info.safetensors is not None and info.safetensors.parameters == {"F16": 12} and info.safetensors.total == 12
    assert info.card_data is not None and info.card_data.eval_results[0].metric_value == 0.75
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes == {name: (folder / name).stat().st_size for name in ("README.md", "model.safetensors")}
    assert ModelCard.load("org/model").data.license == "mit"


def test_expand_returns_what_was_asked_for(hub: LoopbackHub, api: HfApi) -> None:
    adapter = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 8})
    hub.create("org/lora", {"README.md": "---\nbase_model: org/base\n---\n", "adapter_config.json": adapter})
    (info,) = api.list_models(filter="base_model:adapter:org/base", expand=["sha", "siblings", "config", "safetensors"])
    assert [sibling.rfilename for sibling in info.siblings] == ["README.md", "adapter_config.json"]
    assert info.config == {"peft": {"base_model_name_or_path": "org/base", "peft_type": "LORA"}}
    assert info.sha and info.safetensors is None and info.tags is None and info.downloads is None
    with pytest.raises(HfHubHTTPError, match="expand has no 'nothing'"):
        api.model_info("org/lora", expand=["nothing"])  # type: ignore[list-item]


def test_listing_filters_sorts_and_pages(hub: LoopbackHub, api: HfApi) -> None:
    hub.page_size = 10
    for number in range(25):
        tag = "even" if number % 2 == 0 else "odd"
        weights = save({"w": np.zeros(number + 1, np.float32)})
        files = {"README.md": f"---\ntags: [{tag}, all]\n---\n", "model.safetensors": weights}
        hub.create(f"{tag}/model-{number}", files, downloads=number, gated=number == 7, private=number == 9)
    hub.create("even/data", repo_type="dataset")

    def names(**filters: object) -> list[str]:
        return [info.id for info in api.list_models(**filters)]  # type: ignore[arg-type]

    assert len(names()) == len(set(names())) == 25
    assert len(hub.seen("/api/models.*cursor=")) == 4
    assert len(names(filter=["even", "all"])) == 13 and names(filter=["even", "odd"]) == []
    assert names(author="odd", search="MODEL-1", sort="downloads") == [
        f"odd/model-{n}" for n in (19, 17, 15, 13, 11, 1)
    ]
    assert names(sort="downloads", limit=3) == ["even/model-24", "odd/model-23", "even/model-22"]
    assert names(gated=True) == ["odd/model-7"]
    assert names(num_parameters="min:0.024K,max:1B") == ["odd/model-23", "even/model-24"]
    assert len(list(api.list_models(token=False))) == 24
    assert [info.id for info in api.list_datasets()] == ["even/data"]


def test_200_repositories_are_made_at_once(hub: LoopbackHub) -> None:
    start = time.process_time()
    for number in range(200):
        hub.create(f"org/model-{number}", {"config.json": "{}", "adapter_model.safetensors": bytes(20_000)})
    assert time.process_time() - start < 1


def test_large_tree_comes_in_pages(hub: LoopbackHub, api: HfApi) -> None:
    hub.create("org/many", {f"folder-{n % 50}/{n:05}.txt": "" for n in range(20_000)})
    rows = list(api.list_repo_tree("org/many", recursive=True))
    assert len({row.path for row in rows}) == len(rows) == 20_050
    assert len(hub.seen("/tree/main")) == 21
    assert len(list(api.list_repo_tree("org/many"))) == 50
    assert len(list(api.list_repo_tree("org/many", "folder-3"))) == 400
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/many", "folder-50"))


def test_paths_tell_the_commit_that_changed_them(hub: LoopbackHub, api: HfApi) -> None:
    first = hub.create("org/model", {"a.txt": "a", "b/c.txt": "c"})
    second = hub.commit("org/model", {"a.txt": "A"})
    rows = {row.path: row.last_commit for row in api.get_paths_info("org/model", ["a.txt", "b", "no"], expand=True)}
    assert {path: commit.oid for path, commit in rows.items() if commit} == {"a.txt": second, "b": first}


def test_names_of_commits(hub: LoopbackHub, api: HfApi) -> None:
    first = hub.create("org/model", {"a.txt": "1"})
    api.create_branch("org/model", branch="dev")
    api.create_branch("org/model", branch="dev", exist_ok=True)
    api.create_tag("org/model", tag="v1")
    hub.commit("org/model", {"a.txt": "2"})
    on_dev = api.upload_file(path_or_fileobj=b"3", path_in_repo="a.txt", repo_id="org/model", revision="dev").oid
    refs = api.list_repo_refs("org/model")
    assert {ref.name: ref.target_commit for ref in refs.branches}["dev"] == on_dev
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    shas = [api.repo_info("org/model", revision=name).sha for name in ("v1", first, first[:8])]
    assert shas == [first] * 3
    api.delete_branch("org/model", branch="dev")
    api.delete_tag("org/model", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info("org/model", revision="dev")


def test_pull_request_is_opened_and_merged(hub: LoopbackHub, api: HfApi) -> None:
    hub.create("org/model", {"a.txt": "1"})
    visitor = hub.add_user("visitor")
    operations = [CommitOperationAdd("b.txt", b"2")]
    opened = api.create_commit("org/model", operations, commit_message="Add b", create_pr=True, token=visitor)
    assert opened.pr_revision == "refs/pr/1" and opened.pr_url == f"{hub.url}/org/model/discussions/1"
    assert api.list_repo_files("org/model") == ["a.txt"]
    assert api.list_repo_files("org/model", revision="refs/pr/1") == ["a.txt", "b.txt"]
    (pull,) = api.get_repo_discussions("org/model")
    assert (pull.title, pull.author, pull.is_pull_request) == ("Add b", "visitor", True)
    hub.commit("org/model", {"c.txt": "meanwhile"})
    api.merge_pull_request("org/model", 1)
    assert api.list_repo_files("org/model") == ["a.txt", "b.txt", "c.txt"]
    assert api.get_discussion_details("org/model", 1).status == "merged"


def test_renamed_repository_redirects(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.create("org/old", {"a.txt": "a"})
    api.move_repo("org/old", "other/new")
    assert api.model_info("org/old").id == "other/new"
    path = api.hf_hub_download("org/old", "a.txt", local_dir=tmp_path)
    assert Path(path).read_text() == "a"
    assert {request.status for request in hub.seen("org/old")} == {307}
    api.upload_file(path_or_fileobj=b"b", path_in_repo="b.bin", repo_id="org/old")
    assert api.list_repo_files("other/new") == ["a.txt", "b.bin"]


def test_private_repository_is_not_there_for_others(hub: LoopbackHub, api: HfApi) -> None:
    owner, stranger = hub.add_user("owner", ["org"]), hub.add_user("stranger")
    api.create_repo("org/secret", private=True, token=owner)
    assert api.model_info("org/secret", token=owner).private
    for token, status in ((False, 401), (stranger, 404)):
        for ask in (api.model_info, api.list_repo_files, api.list_repo_commits):
            with pytest.raises(RepositoryNotFoundError) as refused:
                ask("org/secret", token=token)
            assert refused.value.response.status_code == status
        assert list(api.list_models(token=token)) == []
    api.update_repo_settings("org/secret", private=False, token=owner)
    assert api.model_info("org/secret", token=stranger).id == "org/secret"
    with pytest.raises(HfHubHTTPError, match="403"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="org/secret", token=stranger)
    with pytest.raises(HfHubHTTPError, match="401"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="org/secret", token=False, create_pr=True)
    api.delete_repo("org/secret", token=owner)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/secret", token=owner)


def test_gated_repository_shows_its_facts_and_keeps_its_files(hub: LoopbackHub, api: HfApi) -> None:
    hub.create("org/gated", {"config.json": "{}"}, gated="manual")
    visitor = hub.add_user("visitor")
    for token, status in ((False, 401), (visitor, 403)):
        assert api.model_info("org/gated", token=token).gated == "manual"
        with pytest.raises(GatedRepoError) as refused:
            api.hf_hub_download("org/gated", "config.json", token=token)
        assert refused.value.response.status_code == status
        with pytest.raises(GatedRepoError):
            api.auth_check("org/gated", token=token)
    hub.grant("org/gated", "visitor")
    assert Path(api.hf_hub_download("org/gated", "config.json", token=visitor)).read_text() == "{}"


def test_users(hub: LoopbackHub, api: HfApi) -> None:
    assert api.whoami(token=hub.add_user("ann", ["lab"]))["orgs"][0]["name"] == "lab"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("lab/model", token=hub.add_user("bob"))
    assert api.create_repo("model", token=hub.add_user("bob")).repo_id == "bob/model"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("bob/model")


def test_invalid_card_is_refused_before_the_upload(hub: LoopbackHub, api: HfApi) -> None:
    hub.create("org/model")
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=b"---\na: [1\n---\n", path_in_repo="README.md", repo_id="org/model")
    assert api.list_repo_files("org/model") == []


@pytest.mark.parametrize("weights", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]", b"\x05\0\0\0\0\0\0\0{1:2}"])
@pytest.mark.parametrize("card", ["---\n: [\n---\n", "---\n- 1\n---", "---\na: &a [x]\nb: *a\n---\n", "---"])
def test_hostile_files_derive_nothing(hub: LoopbackHub, api: HfApi, weights: bytes, card: str) -> None:
    hub.create("org/bad", {"README.md": card, "model.safetensors": weights, "config.json": "[", "../x\n": "y"})
    info = api.model_info("org/bad")
    assert info.safetensors is None and info.card_data is None and info.config is None


def test_unknown_request_is_named(hub: LoopbackHub, api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="no endpoint GET /api/spaces/semantic-search"):
        list(api.search_spaces("x"))
    with pytest.raises(HfHubHTTPError, match="cannot list by inference"):
        list(api.list_models(inference="warm"))
