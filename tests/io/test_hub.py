from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub

from weightspace.errors import CheckpointError, HubError, WeightspaceError
from weightspace.io import hub as hub_module
from weightspace.io.checkpoint import find_checkpoints, open_checkpoint
from weightspace.io.hub import HubOptions, call_hub
from weightspace.io.hub_repo import open_repo
from weightspace.io.writing import checkpoint_bytes

FILES = r"resolve/|^/cdn/"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "FIRST_WAIT", 0.01)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(300, 200, generator=generator),
        "fc.bias": torch.randn(300, generator=generator).to(torch.bfloat16),
        "scale": torch.randn(7, generator=generator).to(torch.float16),
    }


def blob(seed: int = 0) -> bytes:
    return checkpoint_bytes(tensors(seed))


def sharded(parts: int = 3, rows: int = 400) -> dict[str, bytes]:
    """A checkpoint of several shards; each holds one matrix of ``rows`` x 256 floats."""
    files, weight_map = {}, {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        name = f"layers.{part}.weight"
        generator = torch.Generator().manual_seed(part)
        files[file] = checkpoint_bytes({name: torch.randn(rows, 256, generator=generator)})
        weight_map[name] = file
    return files | {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


def equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", ["lfs", "cdn"])
class TestReading:
    def test_tensors_and_config(self, hub: LoopbackHub, mode: str) -> None:
        hub.mode = mode
        sha = hub.create("org/model", {"model.safetensors": blob(), "config.json": '{"family": "none"}'})
        checkpoint = open_checkpoint("org/model")
        assert equal(checkpoint.tensors(), tensors())
        assert checkpoint.config == {"family": "none"}
        assert str(checkpoint.ref) == f"org/model@{sha}:model.safetensors"
        assert equal(open_checkpoint(checkpoint.ref).tensors(), tensors())
        assert not any(request.authorized for request in hub.seen("^/cdn/"))

    def test_opening_reads_headers_only(self, hub: LoopbackHub, mode: str) -> None:
        hub.mode = mode
        hub.create("org/model", sharded())
        checkpoint = open_checkpoint("org/model")
        assert set(checkpoint.specs) == {f"layers.{part}.weight" for part in range(3)}
        assert hub.bytes_served(FILES) < 3 * 20_000

    def test_stretches_cost_their_bytes_and_headers(self, hub: LoopbackHub, mode: str) -> None:
        hub.mode = mode
        hub.create("org/model", sharded(rows=4000))
        checkpoint = open_checkpoint("org/model")
        before = hub.bytes_served(FILES)
        wanted = [
            (f"layers.{part}.weight", 256 * row, 256 * (row + 20)) for part in range(3) for row in (500, 1000, 1021)
        ]
        found = checkpoint.entries(wanted)
        needed = 9 * 20 * 256 * 4
        assert needed <= hub.bytes_served(FILES) - before <= 1.1 * needed
        full = checkpoint.tensors()
        for (name, start, stop), stretch in zip(wanted, found, strict=True):
            assert torch.equal(full[name].flatten()[start:stop], stretch)

    def test_what_was_read_once_is_not_fetched_again(self, hub: LoopbackHub, mode: str) -> None:
        hub.mode = mode
        hub.create("org/model", sharded())
        first = open_checkpoint("org/model").entries([("layers.1.weight", 100, 30_000)])[0]
        before = hub.bytes_served(FILES)
        again = open_checkpoint("org/model").entries([("layers.1.weight", 100, 30_000)])[0]
        part = open_checkpoint("org/model").entries([("layers.1.weight", 5_000, 40_000)])[0]
        assert torch.equal(first, again)
        assert torch.equal(first[4_900:], part[:25_000])
        assert hub.bytes_served(FILES) - before == 4 * 10_000

    def test_a_branch_that_moves_is_read_at_one_commit(self, hub: LoopbackHub, mode: str) -> None:
        hub.mode = mode
        hub.create("org/model", {"model.safetensors": blob(0)})
        old = open_checkpoint("org/model")
        hub.commit("org/model", {"model.safetensors": blob(1)})
        assert equal(old.tensors(), tensors(0))
        assert equal(open_checkpoint("org/model").tensors(), tensors(1))
        assert equal(open_checkpoint(old.ref).tensors(), tensors(0))


def test_a_file_that_huggingface_hub_has_is_read_from_there(hub: LoopbackHub) -> None:
    hub.create("org/model", {"model.safetensors": blob()})
    huggingface_hub.hf_hub_download("org/model", "model.safetensors")
    before = len(hub.seen(FILES))
    assert equal(open_checkpoint("org/model").tensors(), tensors())
    assert len(hub.seen(FILES)) == before


def test_options_can_leave_the_cache_alone(hub: LoopbackHub) -> None:
    hub.create("org/model", {"model.safetensors": blob()})
    for _ in range(2):
        before = hub.bytes_served(FILES)
        open_checkpoint("org/model", options=HubOptions(keep=False)).tensors()
        assert hub.bytes_served(FILES) - before > len(blob()) - 1000


class TestOffline:
    @pytest.fixture
    def seen_once(self, hub: LoopbackHub) -> LoopbackHub:
        hub.create("org/model", sharded() | {"config.json": b"{}"})
        open_checkpoint("org/model").tensors()
        hub.requests.clear()
        return hub

    def test_local_files_only_asks_nobody(self, seen_once: LoopbackHub) -> None:
        checkpoint = open_checkpoint("org/model", options=HubOptions(local_files_only=True))
        assert len(checkpoint.tensors()) == 3
        assert not seen_once.requests

    def test_hf_hub_offline_asks_nobody(self, seen_once: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert len(open_checkpoint("org/model").tensors()) == 3
        assert not seen_once.requests

    def test_a_hub_that_is_gone_is_done_without(self, seen_once: LoopbackHub) -> None:
        seen_once.stop()
        assert len(open_checkpoint("org/model").tensors()) == 3

    def test_what_was_never_fetched_is_named(self, seen_once: LoopbackHub) -> None:
        seen_once.create("org/other", {"model.safetensors": blob()})
        offline = HubOptions(local_files_only=True)
        with pytest.raises(HubError, match=r"org/other: not in the cache.*offline"):
            open_checkpoint("org/other", options=offline)
        open_checkpoint("org/other")
        with pytest.raises(HubError, match=r"org/other@.*: not in the cache.*offline"):
            open_checkpoint("org/other", options=offline).tensors()

    def test_a_snapshot_of_huggingface_hub_serves(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob(), "config.json": "{}"})
        huggingface_hub.snapshot_download("org/model")
        hub.requests.clear()
        assert equal(open_checkpoint("org/model", options=HubOptions(local_files_only=True)).tensors(), tensors())
        assert not hub.requests

    def test_no_network_and_no_cache(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub_module, "ATTEMPTS", 2)
        hub.stop()
        with pytest.raises(HubError, match=r"org/model: the Hub at http://127.0.0.1:\d+ is out of reach .*connection"):
            open_checkpoint("org/model")


class TestFaults:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 408])
    @pytest.mark.parametrize("pattern", ["api/models/org/model", "model.safetensors"])
    def test_passing_errors_are_survived(self, hub: LoopbackHub, status: int, pattern: str) -> None:
        hub.create("org/model", {"model.safetensors": blob()})
        hub.fail(pattern, status, times=3, headers={"Retry-After": "0"} if status == 429 else {})
        assert equal(open_checkpoint("org/model").tensors(), tensors())

    def test_the_wait_that_a_rate_limit_asks_for(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
        waits: list[float] = []
        monkeypatch.setattr(hub_module.time, "sleep", waits.append)
        hub.create("org/model", {"model.safetensors": blob()})
        hub.fail("api/models/org/model", 429, headers={"Retry-After": "7"})
        hub.fail("model.safetensors", 429, headers={"RateLimit": '"api";r=0;t=11'})
        open_checkpoint("org/model").tensors()
        assert [wait for wait in waits if wait] == [7.0, 11.0]  # the server in this process sleeps too, for 0 s

    def test_a_wait_of_hours_is_said_and_not_sat_out(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()})
        hub.fail("api/models", 429, headers={"Retry-After": "86400"}, times=None)
        with pytest.raises(HubError, match="org/model: the Hub limits the rate of requests; wait"):
            open_checkpoint("org/model")

    def test_errors_that_stay_are_named_after_some_attempts(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()})
        hub.fail("model.safetensors", 503, times=None)
        with pytest.raises(HubError, match=r"org/model@.*model.safetensors: the Hub answers 503.*try again later"):
            open_checkpoint("org/model")
        assert len(hub.seen("model.safetensors")) == hub_module.ATTEMPTS

    def test_dropped_connections(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()})
        hub.drop("api/models/org/model")
        hub.drop("model.safetensors")
        assert equal(open_checkpoint("org/model").tensors(), tensors())

    def test_a_truncated_body_goes_on_where_it_stopped(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()})
        checkpoint = open_checkpoint("org/model")
        before = hub.bytes_served(FILES)
        hub.truncate("model.safetensors", 100_000)
        assert equal(checkpoint.tensors(), tensors())
        assert hub.bytes_served(FILES) - before <= len(blob())

    def test_wrong_etag(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()})
        hub.wrong_etag("model.safetensors", times=None)
        with pytest.raises(HubError, match=r"model.safetensors: the Hub lists ETag \w{64} but serves '0{40}'"):
            open_checkpoint("org/model")

    def test_other_bytes_than_listed(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()})
        source = open_repo("org/model").open("model.safetensors")
        hub.corrupt("model.safetensors")
        with pytest.raises(HubError, match=r"model.safetensors: the bytes do not have the listed hash"):
            source.read(0, source.size)
        assert bytes(source.read(0, source.size)) == blob()

    def test_the_server_goes_midway(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub_module, "ATTEMPTS", 3)
        hub.create("org/model", sharded())
        checkpoint = open_checkpoint("org/model")
        hub.call("model-00002", hub.stop)
        with pytest.raises(HubError, match="out of reach"):
            checkpoint.tensors()
        hub.start()
        assert len(checkpoint.tensors()) == 3

    def test_and_comes_back(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub_module, "FIRST_WAIT", 0.2)
        hub.create("org/model", sharded())
        checkpoint = open_checkpoint("org/model")
        hub.call("model-00002", hub.stop)
        timer = threading.Timer(0.5, hub.start)
        timer.start()
        assert len(checkpoint.tensors()) == 3
        timer.join()

    def test_a_server_without_ranges(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()})
        checkpoint = open_checkpoint("org/model")
        hub.fail("model.safetensors", 200, body=b"x" * len(blob()), method="GET")
        with pytest.raises(HubError, match=r"asked for byte \d+ of \d+, the server answers 200"):
            checkpoint.tensor("scale")


class TestAccess:
    def test_missing(self, hub: LoopbackHub) -> None:
        with pytest.raises(HubError, match="org/none: no such repository on the Hub, or a private one"):
            open_checkpoint("org/none")

    def test_what_may_have_been_meant_as_a_path(self, hub: LoopbackHub) -> None:
        with pytest.raises(HubError, match=r"models/resnet: no such repository.*; nor is there a file or folder"):
            open_checkpoint("models/resnet")

    def test_missing_revision(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()})
        with pytest.raises(HubError, match="org/model@v9: no such revision"):
            open_checkpoint("org/model@v9")

    def test_missing_path(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()})
        with pytest.raises(CheckpointError, match="org/model:unet: the repository has no file or folder 'unet'"):
            open_checkpoint("org/model:unet")

    def test_private(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()}, private=True)
        with pytest.raises(HubError, match="or a private one that your token does not open"):
            open_checkpoint("org/model", options=HubOptions(token=False))
        with pytest.raises(HubError, match="or a private one that your token does not open"):
            open_checkpoint("org/model", options=HubOptions(token=hub.add_user("eve")))
        assert equal(open_checkpoint("org/model", options=HubOptions(token=hub.token)).tensors(), tensors())

    def test_gated(self, hub: LoopbackHub) -> None:
        hub.create("org/model", {"model.safetensors": blob()}, gated="manual")
        for token in (False, hub.add_user("eve")):
            with pytest.raises(HubError, match="gated; ask for access on its page"):
                open_checkpoint("org/model", options=HubOptions(token=token))
        assert equal(open_checkpoint("org/model").tensors(), tensors())

    def test_renamed(self, hub: LoopbackHub) -> None:
        hub.create("org/old", {"model.safetensors": blob()})
        hub.move("org/old", "org/new")
        assert equal(open_checkpoint("org/old").tensors(), tensors())

    def test_what_exists_on_disk_is_not_looked_for_on_the_hub(
        self, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("org/model").mkdir(parents=True)
        Path("org/model/model.safetensors").write_bytes(blob(1))
        hub.create("org/model", {"model.safetensors": blob(0)})
        assert equal(open_checkpoint("org/model").tensors(), tensors(1))
        assert not hub.requests


class TestChoosing:
    def test_variants_beside_the_plain_weights(self, hub: LoopbackHub) -> None:
        hub.create(
            "org/model",
            {
                "model.safetensors": blob(0),
                "model.fp16.safetensors": blob(1),
                "pytorch_model.bin": b"\x80\x02.",
                "sub/model.fp16.safetensors": blob(2),
                "sub/model.ema.safetensors": blob(3),
            },
        )
        assert equal(open_checkpoint("org/model").tensors(), tensors(0))
        assert equal(open_checkpoint("org/model:model.fp16.safetensors").tensors(), tensors(1))
        with pytest.raises(CheckpointError, match=r"sub: 2 checkpoints \(model.ema.* model.fp16.*\); name one"):
            open_checkpoint("org/model:sub")

    def test_all_checkpoints_of_a_pipeline(self, hub: LoopbackHub) -> None:
        files = {f"unet/{name}": content for name, content in sharded().items()}
        hub.create("org/pipe", {"vae/model.safetensors": blob(), ".hidden/model.safetensors": blob(), **files})
        folder, names = find_checkpoints("org/pipe")
        assert names == ["unet/model.safetensors.index.json", "vae/model.safetensors"]
        assert folder.where.startswith("org/pipe@")

    def test_pickles_only(self, hub: LoopbackHub, tmp_path: Path) -> None:
        torch.save(tensors(), tmp_path / "weights")
        hub.create("org/model", {"pytorch_model.bin": tmp_path / "weights"})
        with pytest.raises(CheckpointError, match=r"only pytorch_model.bin: pickles can run any code .*--allow-pickle"):
            open_checkpoint("org/model")
        assert hub.bytes_served(FILES) == 0
        assert equal(open_checkpoint("org/model", allow_pickle=True).tensors(), tensors())

    def test_a_hostile_pickle_is_refused_after_consent_too(self, hub: LoopbackHub, tmp_path: Path) -> None:
        trap = tmp_path / "ran"
        hub.create("org/model", {"pytorch_model.bin": f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode()})
        with pytest.raises(WeightspaceError, match=r"pytorch_model\.bin"):
            open_checkpoint("org/model", allow_pickle=True)
        assert not trap.exists()

    @pytest.mark.parametrize("path", ["../model-1.safetensors", "/etc/model-1.safetensors", "a/../../m-1.safetensors"])
    def test_an_index_cannot_lead_elsewhere(self, hub: LoopbackHub, path: str) -> None:
        index = json.dumps({"weight_map": {"a": path}})
        hub.create("org/model", {"model.safetensors.index.json": index, path: blob()})
        with pytest.raises(CheckpointError, match="is not the name of a file in this folder"):
            open_checkpoint("org/model")

    def test_a_quantised_checkpoint_names_its_method(self, hub: LoopbackHub) -> None:
        content = {
            "fc.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn),
            "fc.weight_scale_inv": torch.ones(1, 1),
        }
        hub.create("org/model", {"model.safetensors": checkpoint_bytes(content)})
        checkpoint = open_checkpoint("org/model")
        with pytest.raises(CheckpointError, match=r"org/model@.*fp8"):
            checkpoint.ensure_weights()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64]
)
def test_every_dtype(hub: LoopbackHub, dtype: torch.dtype) -> None:
    content = {"a": torch.arange(60).view(6, 10).to(dtype), "b": torch.arange(7).to(dtype)}
    hub.create("org/model", {"model.safetensors": checkpoint_bytes(content)})
    found = open_checkpoint("org/model").tensors()
    assert all(found[name].dtype == dtype and torch.equal(found[name].float(), content[name].float()) for name in "ab")


def test_tied_weights(hub: LoopbackHub) -> None:
    shared = torch.randn(20, 4)
    blob = checkpoint_bytes({"embed.weight": shared, "head.weight": shared})
    hub.create("org/model", {"model.safetensors": blob})
    checkpoint = open_checkpoint("org/model")
    assert checkpoint.aliases == (("head.weight", "embed.weight"),)
    found = checkpoint.tensors()
    assert found["embed.weight"] is found["head.weight"]
    assert torch.equal(found["head.weight"], shared)


def test_a_transformers_model_with_tied_weights(hub: LoopbackHub, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=5)
    model = GPT2LMHeadModel(config)
    model.push_to_hub("org/gpt")
    found = open_checkpoint("org/gpt").tensors()
    state = model.state_dict()
    assert state.keys() - found.keys() == {"lm_head.weight"}  # transformers leaves out what is tied
    assert all(torch.equal(found[name], state[name]) for name in found)


def test_a_header_that_claims_everything(hub: LoopbackHub) -> None:
    hub.create("org/model", {"model.safetensors": (2**60).to_bytes(8, "little") + b"{}" * 50})
    with pytest.raises(CheckpointError, match=rf"header length {2**60} is above the limit"):
        open_checkpoint("org/model")


@pytest.mark.slow
def test_twenty_thousand_tensors(hub: LoopbackHub) -> None:
    content = {f"layers.{number}.weight": torch.zeros(1) for number in range(20_000)}
    hub.create("org/model", {"model.safetensors": checkpoint_bytes(content)})
    assert len(open_checkpoint("org/model").tensors()) == 20_000
    assert len(hub.seen(FILES, method="GET")) < 10


def test_json_of_a_gigabyte_is_not_fetched(hub: LoopbackHub, tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)
    hub.create("org/model", {"model.safetensors": blob()})
    hub.add_file("org/model", "config.json", tmp_path / "config.json", sha256="0" * 64)
    assert "config.json: 1073741824 bytes of JSON are above the limit" in open_checkpoint("org/model").notes[0]
    assert hub.bytes_served(FILES) < 20_000


def test_large_tensors_come_in_parts(hub: LoopbackHub, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).standard_normal(10_000_000).astype(np.float32)
    hub.create("org/model", {"model.safetensors": checkpoint_bytes({"w": torch.from_numpy(numbers)})})
    checkpoint = open_checkpoint("org/model")
    hub.requests.clear()
    assert np.array_equal(checkpoint.tensor("w").numpy(), numbers)
    assert len(hub.seen(FILES, method="GET")) == 3


def test_other_errors_of_a_call_are_not_swallowed() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call_hub("x", fail)


def test_a_token_is_never_printed() -> None:
    assert "secret" not in repr(HubOptions(token="secret"))
