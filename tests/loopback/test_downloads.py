"""The loopback Hub as the real client sees it: whole files, ranges, redirects, and what goes wrong on the way."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from huggingface_hub import (
    HfApi,
    HfFileSystem,
    get_safetensors_metadata,
    hf_hub_download,
    parse_safetensors_file_metadata,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import LoopbackHub
from safetensors.numpy import save

WEIGHTS = save({"weight": np.arange(500_000, dtype=np.float32)})


@pytest.fixture(params=["lfs", "cdn"])
def model(hub: LoopbackHub, request: pytest.FixtureRequest) -> str:
    hub.mode = request.param
    hub.create("org/model", {"config.json": "{}", "sub/model.safetensors": WEIGHTS, "empty.txt": ""})
    return "org/model"


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would have slept between its tries."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def test_snapshot_is_whole_and_fetched_once(hub: LoopbackHub, model: str) -> None:
    folder = Path(snapshot_download(model))
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == {
        "config.json": b"{}",
        "sub/model.safetensors": WEIGHTS,
        "empty.txt": b"",
    }
    served = hub.bytes_served("resolve|^/cdn/")
    assert served == len(WEIGHTS) + 2
    snapshot_download(model)
    assert hub.bytes_served("resolve|^/cdn/") == served
    assert bool(hub.seen("^/cdn/")) == (hub.mode == "cdn")
    assert not any(request.authorized for request in hub.seen("^/cdn/"))


def test_ranges_serve_no_more_than_was_asked(hub: LoopbackHub, model: str) -> None:
    url = f"{hub.url}/{model}/resolve/main/sub/model.safetensors"
    with httpx2.Client(follow_redirects=True) as client:

        def ask(wanted: str) -> httpx2.Response:
            return client.get(url, headers={"Range": wanted})

        size = len(WEIGHTS)
        for wanted, (start, stop) in {
            "bytes=0-9": (0, 10),
            "bytes=1000000-1999999": (1_000_000, 2_000_000),
            f"bytes={size - 5}-": (size - 5, size),
            "bytes=-7": (size - 7, size),
            f"bytes={size - 1}-{size + 100}": (size - 1, size),
        }.items():
            answer = ask(wanted)
            assert (answer.status_code, answer.content) == (206, WEIGHTS[start:stop])
            assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
            assert hub.requests[-1].sent == stop - start and hub.requests[-1].range == wanted
        outside = ask(f"bytes={size}-")
        assert (outside.status_code, outside.headers["Content-Range"]) == (416, f"bytes */{size}")
        assert client.get(url).content == WEIGHTS


def test_cdn_refuses_credentials(hub: LoopbackHub) -> None:
    hub.mode = "cdn"
    hub.create("org/model", {"model.safetensors": WEIGHTS})
    credentials = {"Authorization": f"Bearer {hub.token}"}
    redirect = httpx2.get(f"{hub.url}/org/model/resolve/main/model.safetensors", headers=credentials)
    assert redirect.status_code == 302 and redirect.headers["Location"].startswith("http://localhost:")
    assert httpx2.get(redirect.headers["Location"], headers=credentials).status_code == 400
    assert httpx2.get(redirect.headers["Location"]).content == WEIGHTS


def test_pinned_commit_goes_on_serving_what_it_held(hub: LoopbackHub) -> None:
    old = hub.create("org/model", {"model.safetensors": b"old", "a.txt": "old"})
    hub.commit("org/model", {"model.safetensors": b"new"}, delete=["a.txt"])
    assert Path(hf_hub_download("org/model", "model.safetensors", revision=old)).read_bytes() == b"old"
    assert Path(hf_hub_download("org/model", "a.txt", revision=old)).read_text() == "old"
    assert Path(hf_hub_download("org/model", "model.safetensors")).read_bytes() == b"new"


def test_headers_are_read_without_the_weights(hub: LoopbackHub, model: str) -> None:
    metadata = parse_safetensors_file_metadata(model, "sub/model.safetensors")
    assert metadata.tensors["weight"].shape == [500_000]
    assert hub.bytes_served("model.safetensors") == 100_001

    shards = {f"model-{n}.safetensors": save({f"w{n}": np.zeros(n, np.float32)}) for n in (1, 2)}
    index = {"metadata": {"total_size": 12}, "weight_map": {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}}
    hub.create("org/sharded", {**shards, "model.safetensors.index.json": json.dumps(index)})
    in_parts = get_safetensors_metadata("org/sharded")
    at_once = HfApi().get_sharded_safetensors_metadata("org/sharded")
    assert at_once.files_metadata == in_parts.files_metadata and set(at_once.weight_map) == {"w1", "w2"}
    info = HfApi().model_info("org/sharded")
    assert info.safetensors is not None and info.safetensors.total == 3


def test_huge_file_is_served_by_ranges(hub: LoopbackHub, tmp_path: Path) -> None:
    """A sparse file of 140 GB stands for a checkpoint of 70 billion parameters; nothing reads it as a whole."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(140 * 10**9)
        file.seek(139 * 10**9)
        file.write(b"here")
    hub.create("org/huge", {"config.json": "{}"})
    hub.add_file("org/huge", "model.safetensors", path)
    files = HfFileSystem()
    assert files.info("org/huge/model.safetensors")["size"] == 140 * 10**9
    with files.open("org/huge/model.safetensors", cache_type="none") as remote:
        remote.seek(139 * 10**9)
        assert remote.read(4) == b"here"
    assert hub.bytes_served("resolve") == 4


def test_what_is_missing_is_named(hub: LoopbackHub, model: str) -> None:
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(model, "no.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(model, "config.json", revision="no")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/no", "config.json")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(model, "config.json", repo_type="dataset")


@pytest.mark.parametrize("status", [429, 503])
def test_refused_requests_are_tried_again(hub: LoopbackHub, naps: list[float], status: int) -> None:
    hub.create("org/model", {"model.safetensors": WEIGHTS})
    hub.fail("/api/models", status, headers={"Retry-After": "7"}, times=2)
    assert [info.id for info in HfApi().list_models()] == ["org/model"]
    assert [request.status for request in hub.seen("/api/models")] == [status, status, 200]
    assert naps == [8, 8]


def test_client_does_not_retry_everything(hub: LoopbackHub) -> None:
    hub.create("org/model")
    hub.fail("/api/models/org/model", 429)
    with pytest.raises(HfHubHTTPError, match="429"):
        HfApi().model_info("org/model")


def test_truncated_and_dropped_downloads_are_tried_again(hub: LoopbackHub, model: str, naps: list[float]) -> None:
    target = "/cdn/" if hub.mode == "cdn" else "resolve.*model.safetensors"
    hub.truncate(target, keep=1000)
    hub.drop(target, method="GET", skip=1)
    path = hf_hub_download(model, "sub/model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    downloads = hub.seen(target, "GET")
    assert [request.sent for request in downloads] == [1000, 0, len(WEIGHTS)]


def test_content_and_etag_can_be_wrong(hub: LoopbackHub, model: str) -> None:
    hub.wrong_etag("resolve.*config.json", "f" * 40, times=None)
    path = Path(hf_hub_download(model, "config.json"))
    assert path.resolve().name == "f" * 40
    hub.corrupt("sub/model.safetensors", times=None)
    content = Path(hf_hub_download(model, "sub/model.safetensors")).read_bytes()
    assert len(content) == len(WEIGHTS)
    assert hashlib.sha256(content).hexdigest() != hashlib.sha256(WEIGHTS).hexdigest()


def test_delay_is_taken(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("loopback_hub.server.sleep", waits.append)
    hub.create("org/model", {"a.txt": "a"})
    order = hub.delay("resolve", 0.2)
    hf_hub_download("org/model", "a.txt")
    assert waits.count(0.2) == 2  # HEAD and GET
    order.times = 0
    waits.clear()
    hf_hub_download("org/model", "a.txt", force_download=True)
    assert set(waits) == {0.0}


def test_server_goes_midway_and_comes_back(hub: LoopbackHub, naps: list[float]) -> None:
    hub.create("org/model", {f"{n}.txt": str(n) for n in range(5)})
    hub.call("resolve", hub.stop, skip=3, method="GET")
    for number in range(3):
        hf_hub_download("org/model", f"{number}.txt")
    with pytest.raises(httpx2.ConnectError):
        hf_hub_download("org/model", "3.txt")
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("org/model", "3.txt")
    assert Path(hf_hub_download("org/model", "0.txt")).read_text() == "0"  # from the cache
    hub.start()
    assert Path(hf_hub_download("org/model", "3.txt")).read_text() == "3"


def test_upload_survives_a_refused_put(hub: LoopbackHub, naps: list[float]) -> None:
    api = HfApi()
    api.create_repo("org/model")
    hub.fail("^/lfs/", 500)
    hub.drop("^/lfs/", skip=1)
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id="org/model")
    assert Path(hf_hub_download("org/model", "model.safetensors")).read_bytes() == WEIGHTS


def test_other_processes_reach_the_hub(hub: LoopbackHub) -> None:
    hub.create("org/model", {"a.txt": "hello"})
    script = "from huggingface_hub import hf_hub_download as get; print(open(get('org/model', 'a.txt')).read())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "hello\n"


def test_folder_is_served_by_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "model.safetensors").write_bytes(WEIGHTS)
    command = [sys.executable, "-m", "loopback_hub", "--port", "0", "--folder", str(tmp_path), "--mode", "cdn"]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            exports = dict(word.split("=") for word in server.stdout.readline().split()[1:])
            api = HfApi(endpoint=exports["HF_ENDPOINT"], token=exports["HF_TOKEN"])
            assert [info.id for info in api.list_models()] == ["org/model"]
            path = api.hf_hub_download("org/model", "model.safetensors", local_dir=tmp_path / "here")
            assert Path(path).read_bytes() == WEIGHTS
        finally:
            server.terminate()
