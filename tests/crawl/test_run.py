from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import Killed, Watch, content
from loopback_hub import LoopbackHub
from safetensors.torch import save
from torch import Tensor

from weightspace.crawl.fetch import Room
from weightspace.crawl.plan import CrawlSettings
from weightspace.crawl.run import crawl, prepare_crawl
from weightspace.crawl.spool import Spool
from weightspace.errors import HubError, SettingsError, ZooError
from weightspace.io.hub import HubOptions
from weightspace.schema import ReportedMetric
from weightspace.zoo import writer
from weightspace.zoo.dataset import load_zoo
from weightspace.zoo.writer import ZooSummary, ZooWriter

Tensors = dict[str, Tensor]


def tensors(seed: int, width: int = 5) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (width, 4), "0.bias": (width,), "2.weight": (3, width), "2.bias": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def card(accuracy: float) -> str:
    result = {
        "dataset": {"type": "mnist", "split": "test"},
        "metrics": [{"type": "accuracy", "value": accuracy, "verified": True}, {"type": "f1", "value": accuracy / 2}],
    }
    facts = {"license": "mit", "datasets": ["mnist"], "base_model": "org/base", "pipeline_tag": "image-classification"}
    return f"---\n{json.dumps({**facts, 'model-index': [{'name': 'm', 'results': [result]}]})}\n---\n# A model\n"


def add(hub: LoopbackHub, number: int, **files: Any) -> str:
    """A model whose place in the listing is its number."""
    content = {"model.safetensors": save(tensors(number)), "README.md": card(0.5 + number / 1000)}
    return hub.create(f"org/m{number:03d}", {**content, **files}, downloads=1000 - number)


def run(output: Path, settings: CrawlSettings | None = None, **options: Any) -> ZooSummary:
    plan = prepare_crawl(settings or CrawlSettings(), output, options.get("options"))
    return crawl(plan, output, **options)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightspace.io.hub.FIRST_WAIT", 0.001)


# What a crawl makes


def test_a_crawl_becomes_a_zoo(hub: LoopbackHub, tmp_path: Path) -> None:
    shas = [add(hub, number, **{"config.json": '{"hidden": [5]}'}) for number in range(5)]
    summary = run(tmp_path / "zoo", CrawlSettings(task="image-classification", author="org"))
    assert (summary.models, summary.skipped) == (5, ())
    zoo = load_zoo(tmp_path / "zoo")
    assert list(zoo.index["model_id"]) == [f"org/m{number:03d}" for number in range(5)]
    entry = zoo.entry(3)
    assert str(entry.ref) == f"org/m003@{shas[3]}:model.safetensors"
    assert (entry.licence, entry.task, entry.dataset, entry.datasets) == (
        "mit",
        "image-classification",
        "mnist",
        ("mnist",),
    )
    assert (entry.base_model, entry.lineage, entry.config) == ("org/base", ("org/base",), {"hidden": [5]})
    assert entry.metrics == (
        ReportedMetric("accuracy", 0.503, "mnist", "test", verified=True),
        ReportedMetric("f1", 0.2515, "mnist", "test"),
    )
    assert entry.results == {"test_accuracy": 0.503, "accuracy": 0.503, "f1": 0.2515}
    assert zoo.blob(3) == save(tensors(3))
    assert sorted(path.name for path in (tmp_path / "zoo").iterdir()) == [
        *("README.md", "index", "ledger.jsonl", "plan.jsonl", "skips.jsonl", "weights", "zoo.json")
    ]


def test_a_small_model_costs_two_requests(hub: LoopbackHub, tmp_path: Path) -> None:
    for number in range(3):
        add(hub, number)
    run(tmp_path / "zoo")
    assert len(hub.seen("^/api/")) == 1
    assert [request.method for request in hub.seen("/org/m001/")] == ["HEAD", "GET"]
    assert len(hub.requests) == 1 + 2 * 3


def test_checkpoints_of_one_repository_are_one_run(hub: LoopbackHub, tmp_path: Path) -> None:
    state = {"global_step": 10, "log_history": [{"step": 10, "eval_loss": 0.5, "eval_accuracy": 0.75}]}
    files: dict[str, Any] = {"README.md": card(0.9), "last/model.safetensors": save(tensors(0))}
    files |= {"early/model.safetensors": save(tensors(1)), "early/trainer_state.json": json.dumps(state)}
    hub.create("org/run", files)
    run(tmp_path / "zoo")
    early, last = load_zoo(tmp_path / "zoo").entries()
    assert (early.model_id, last.model_id, early.run_id, last.run_id) == (
        "org/run:early",
        "org/run:last",
        *["org/run"] * 2,
    )
    # Which of the two the card speaks of is not known; the state speaks of its own.
    assert (early.results, last.results) == ({"step": 10.0, "test_loss": 0.5, "test_accuracy": 0.75}, {})
    assert early.metrics[:2] == last.metrics
    assert early.metrics[2] == ReportedMetric("eval_loss", 0.5, split="evaluation")


def test_hyperparameters_of_a_trainer_card_are_read_once(hub: LoopbackHub, tmp_path: Path) -> None:
    text = (
        "---\ntags: [generated_from_trainer]\n---\n### Training hyperparameters\n\n- learning_rate: 0.002\n- seed: 42\n"
    )
    hub.create("org/a", {"README.md": text, **{f"{i}/model.safetensors": save(tensors(i)) for i in range(3)}})
    run(tmp_path / "zoo", jobs=1)
    assert [entry.hyperparameters for entry in load_zoo(tmp_path / "zoo").entries()] == [
        {"learning_rate": 0.002, "seed": 42.0}
    ] * 3
    assert len(hub.seen("README.md", "GET")) == 1


def test_results_in_the_text_of_a_trainer_card(hub: LoopbackHub, tmp_path: Path) -> None:
    index = {"model-index": [{"name": "m", "results": [{"metrics": [{"type": "f1", "value": 88.25}]}]}]}
    facts = json.dumps({"tags": ["generated_from_trainer"], **index})
    text = "It achieves the following results on the evaluation set:\n- Loss: 0.5\n- Accuracy: 0.9\n- F1: 88.2\n"
    for name, files in (("one", 1), ("two", 2)):
        weights = {f"{i}/model.safetensors": save(tensors(10 * files + i)) for i in range(files)}
        hub.create(f"org/{name}", {"README.md": f"---\n{facts}\n---\n{text}", **weights})
    run(tmp_path / "zoo")
    one, *several = sorted(load_zoo(tmp_path / "zoo").entries(), key=lambda entry: entry.run_id)
    assert one.results == {"f1": 0.8825, "test_loss": 0.5, "test_accuracy": 0.9}
    assert [metric.name for metric in one.metrics] == ["f1", "Loss", "Accuracy"]
    assert [entry.results for entry in several] == [{}, {}]


def test_damaged_side_files_are_notes(hub: LoopbackHub, tmp_path: Path) -> None:
    add(hub, 0, **{"config.json": '\ufeff{"hidden": [5]}', "trainer_state.json": '{"global_step": 10, "log_hist'})
    add(hub, 1, **{"config.json": "[" * 100_000})
    add(hub, 2, **{"trainer_state.json": "[]"})
    summary = run(tmp_path / "zoo")
    assert (summary.models, summary.skipped) == (3, ())
    entries = list(load_zoo(tmp_path / "zoo").entries())
    assert [entry.config for entry in entries] == [{"hidden": [5]}, None, None]  # a byte order mark is read over
    assert not any("step" in entry.results for entry in entries)
    notes = [note for entry in entries for note in entry.hyperparameters["notes"]]
    named = ("trainer_state", "config", "trainer_state")
    assert [name in note for name, note in zip(named, notes, strict=True)] == [True] * 3
    assert all(note.endswith("it is not used") for note in notes)


def sharded(seed: int) -> dict[str, Any]:
    parts = [dict(list(tensors(seed).items())[:2]), dict(list(tensors(seed).items())[2:])]
    names = [f"model-0000{part + 1}-of-00002.safetensors" for part in range(2)]
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    files: dict[str, Any] = {name: save(part, {"format": "pt"}) for name, part in zip(names, parts, strict=True)}
    return {**files, "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map})}


def test_the_same_tensors_are_kept_once(hub: LoopbackHub, tmp_path: Path) -> None:
    add(hub, 0)
    add(hub, 1)
    hub.create("org/copy", {"other.safetensors": save(dict(reversed(tensors(1).items())), {"note": "x"})}, downloads=5)
    hub.create("org/parts", sharded(1), downloads=4)
    summary = run(tmp_path / "zoo")
    assert summary.models == 2
    assert [(ref.partition("@")[0], reason) for ref, reason in summary.skipped] == [
        ("org/copy", "the same tensors as org/m001"),
        ("org/parts", "the same tensors as org/m001"),
    ]


def test_a_sharded_checkpoint_becomes_one_file(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create("org/parts", sharded(1))
    run(tmp_path / "zoo")
    zoo = load_zoo(tmp_path / "zoo")
    assert all(torch.equal(value, zoo.checkpoint(0).tensor(name)) for name, value in tensors(1).items())


def test_a_crawl_for_small_models_leaves_out_large_ones(hub: LoopbackHub, tmp_path: Path) -> None:
    add(hub, 0)
    hub.create("org/big", {"big.safetensors": save(tensors(1, width=50))})
    huge = tmp_path / "huge.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**24], "data_offsets": [0, 2**26]}}).encode()
    huge.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(huge, 8 + len(header) + 2**26)
    hub.create("org/huge", {})
    hub.add_file("org/huge", "huge.safetensors", huge)
    summary = run(tmp_path / "zoo", CrawlSettings(max_params=100))
    assert summary.models == 1
    reasons = {ref.partition("@")[0]: reason for ref, reason in summary.skipped}
    assert "403 parameters are above the limit of 100" in reasons["org/big"]
    assert "16,777,216 parameters are above the limit" in reasons["org/huge"]
    assert hub.bytes_served("huge.safetensors") < 50_000


# Adapters


def adapter(seed: int, trained: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    root = "base_model.model.layers.0.q_proj"
    b = torch.randn(6, 2, generator=generator) if trained else torch.zeros(6, 2)
    return {f"{root}.lora_A.weight": torch.randn(2, 4, generator=generator), f"{root}.lora_B.weight": b}


def adapter_files(weights: Tensors, **config: Any) -> dict[str, Any]:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/llm", **config}
    config = {"target_modules": ["q_proj"], **config}
    return {"adapter_model.safetensors": save(weights), "adapter_config.json": json.dumps(config)}


def test_adapters(hub: LoopbackHub, tmp_path: Path) -> None:
    add(hub, 0)
    hub.create("org/good", adapter_files(adapter(1)), downloads=9)
    hub.create("org/untrained", adapter_files(adapter(2, trained=False)), downloads=8)
    hub.create("org/ia3", adapter_files(adapter(3), peft_type="IA3"), downloads=7)
    hub.create("org/rank", adapter_files(adapter(4), r=8), downloads=6)
    summary = run(tmp_path / "zoo", CrawlSettings(adapters=True))
    good, untrained, rank = load_zoo(tmp_path / "zoo").entries()
    assert good.hyperparameters == {
        "library": "peft",
        "adapter_rank": 2,
        "adapter_scaling": 2.0,
        "adapter_untrained": False,
    }
    assert good.base_model == "org/llm"
    assert good.config is not None
    assert good.config["peft_type"] == "LORA"
    assert untrained.hyperparameters["adapter_untrained"] is True
    assert "rank 2 where the config says 8" in rank.hyperparameters["adapter_mismatches"][0]
    assert [ref.partition("@")[0] for ref, _ in summary.skipped] == ["org/ia3"]
    assert "peft_type is 'IA3'" in summary.skipped[0][1]


# References


def test_a_reference_zoo_reads_the_same_models(hub: LoopbackHub, tmp_path: Path) -> None:
    for number in range(4):
        add(hub, number)
    hub.create("org/parts", sharded(9))
    hub.create("org/adapter", adapter_files(adapter(1)))
    run(tmp_path / "stored")
    run(tmp_path / "reference", CrawlSettings(reference=True))
    stored, reference = load_zoo(tmp_path / "stored"), load_zoo(tmp_path / "reference")
    assert not (tmp_path / "reference" / "weights").exists()
    assert reference.reference
    columns = [name for name in stored.index.columns if name != "content"]
    assert stored.index[columns].equals(reference.index[columns])
    assert [stored.blob(row) for row in range(6)] == [reference.blob(row) for row in range(6)]
    for left, right in zip(stored.batches(), reference.batches(), strict=True):
        assert left.header == right.header
        assert torch.equal(left.flat, right.flat)


def test_references_are_fetched_once(hub: LoopbackHub, tmp_path: Path) -> None:
    wide = 3000  # above what is read for the header alone
    for number in range(3):
        hub.create(f"org/wide{number}", {"model.safetensors": save(tensors(number, wide))})
    run(tmp_path / "zoo", CrawlSettings(reference=True))
    crawled = hub.bytes_served("model.safetensors")
    assert crawled < 3 * 20_000
    zoo = load_zoo(tmp_path / "zoo")
    list(zoo.batches())
    size = int(zoo.index["size"].sum())
    assert size <= hub.bytes_served("model.safetensors") <= size + crawled
    seen = len(hub.requests)
    list(load_zoo(tmp_path / "zoo").batches())
    hub.stop()
    try:
        assert load_zoo(tmp_path / "zoo").blob(1) == save(tensors(1, wide))
    finally:
        hub.start()
    assert len(hub.requests) == seen


def test_a_reference_that_is_gone_is_named(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create("org/gone", {"model.safetensors": save(tensors(0, 3000))})
    run(tmp_path / "zoo", CrawlSettings(reference=True))
    hub.delete("org/gone")
    with pytest.raises(HubError, match=r"org/gone@.*no such repository"):
        load_zoo(tmp_path / "zoo").blob(0)


# Interruptions


def test_a_finished_crawl_asks_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    add(hub, 0)
    first = run(tmp_path / "zoo")
    before, seen = content(tmp_path / "zoo"), len(hub.requests)
    again = run(tmp_path / "zoo")
    assert (again.models, again.skipped, again.fetched) == (first.models, first.skipped, 0)
    assert content(tmp_path / "zoo") == before
    assert len(hub.requests) == seen


def test_the_plan_holds_whatever_becomes_of_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    sha = add(hub, 0)
    plan = prepare_crawl(CrawlSettings(), tmp_path / "zoo")
    hub.commit("org/m000", {"model.safetensors": save(tensors(7))})
    add(hub, 1)
    crawl(prepare_crawl(CrawlSettings(), tmp_path / "zoo"), tmp_path / "zoo")
    (entry,) = load_zoo(tmp_path / "zoo").entries()
    assert entry.ref.revision == sha
    assert load_zoo(tmp_path / "zoo").blob(0) == save(tensors(0))
    assert len(plan.repos) == 1


def test_a_folder_holds_one_crawl(hub: LoopbackHub, tmp_path: Path) -> None:
    add(hub, 0)
    run(tmp_path / "zoo")
    with pytest.raises(ZooError, match=r"crawl of other settings \(they differ in limit\); choose another folder"):
        run(tmp_path / "zoo", CrawlSettings(limit=5))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    with pytest.raises(ZooError, match=r"holds 'notes\.txt' and no crawl"):
        run(tmp_path / "taken")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_MODELS", 4)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("jobs", [1, 8])
@pytest.mark.parametrize("survivors", [0, 1, 4, 6, 11])
def test_interrupted_anywhere_the_result_is_the_same(
    hub: LoopbackHub, tmp_path: Path, jobs: int, survivors: int
) -> None:
    for number in range(13):
        if number == 5:
            add(hub, number, **{"model.safetensors": save({"w": torch.full((3,), torch.nan)})})
        elif number == 10:
            add(hub, number, **{"model.safetensors": save(tensors(2))})
        elif number == 7:
            hub.create("org/m007", {"pytorch_model.bin": b"x"}, downloads=993)
        else:
            add(hub, number)
    run(tmp_path / "undisturbed", jobs=3)
    expected = content(tmp_path / "undisturbed")
    assert len([name for name in expected if name.startswith("weights/")]) == 4

    done: list[int] = []
    put = Spool.put

    def counting(spool: Spool, number: int, fetched: Any) -> Any:
        if len(done) >= survivors:
            raise KeyboardInterrupt
        done.append(number)
        return put(spool, number, fetched)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Spool, "put", counting)
        run(tmp_path / "zoo", jobs=jobs)
    seen = len(hub.requests)
    run(tmp_path / "zoo", jobs=jobs)
    assert content(tmp_path / "zoo") == expected
    asked = {request.path.split("/")[2] for request in hub.requests[seen:]}
    assert not asked & {f"m{number:03d}" for number in done}


def test_killed_outright(hub: LoopbackHub, tmp_path: Path) -> None:
    for number in range(40):
        add(hub, number)
    run(tmp_path / "undisturbed")
    slow = hub.delay("resolve", 0.03)
    words = ["crawl", "--output", str(tmp_path / "zoo"), "--jobs", "2"]
    code = f"from weightspace.cli.main import main; main({words!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    spool = tmp_path / "zoo" / "fetched"
    deadline = time.monotonic() + 1800
    while len(list(spool.glob("*.fetched"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    slow.times = 0
    finished = {f"m{int(path.stem):03d}" for path in spool.glob("[!.]*.fetched")}
    assert 8 <= len(finished) < 40
    seen = len(hub.requests)
    run(tmp_path / "zoo")
    assert content(tmp_path / "zoo") == content(tmp_path / "undisturbed")
    asked = {request.path.split("/")[2] for request in hub.requests[seen:] if "resolve" in request.path}
    assert asked == {f"m{number:03d}" for number in range(40)} - finished


@pytest.mark.usefixtures("small_shards")
def test_killed_at_any_call_the_result_is_the_same(hub: LoopbackHub, tmp_path: Path) -> None:
    for number in range(6):
        add(hub, number, **({"model.safetensors": save({"ids": torch.arange(3)})} if number == 4 else {}))
    watch = Watch()
    watch.run(tmp_path / "undisturbed", lambda: run(tmp_path / "undisturbed", jobs=1))
    expected, calls = content(tmp_path / "undisturbed"), watch.count
    for fatal in range(1, calls + 1, calls // 7):
        target = tmp_path / f"killed-{fatal}"
        with pytest.raises(Killed):
            watch.run(target, partial(run, target, jobs=1), fatal)
        run(target, jobs=2)
        assert content(target) == expected, fatal


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_models(hub: LoopbackHub, tmp_path: Path) -> None:
    """A crawl of a thousand models of different headers takes as much memory as one of a hundred."""
    for number in range(1000):
        hub.create(f"org/m{number:04d}", {"model.safetensors": save({"w": torch.rand(120 + number, 64)})})
    code = (
        "import resource, sys\n"
        "from weightspace.crawl.plan import CrawlSettings\n"
        "from weightspace.crawl.run import crawl, prepare_crawl\n"
        "from weightspace.zoo import writer\n"
        "writer.SHARD_BYTES = 2**22\n"
        "crawl(prepare_crawl(CrawlSettings(limit=int(sys.argv[2])), sys.argv[1]), sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    peaks = {}
    for count in (100, 1000):
        words = [sys.executable, "-c", code, str(tmp_path / f"zoo-{count}"), str(count)]
        peaks[count] = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    fetched = sum(file.stat().st_size for file in (tmp_path / "zoo-1000" / "weights").iterdir())
    assert fetched > 150 * 2**20
    assert peaks[1000] - peaks[100] < 40 * 2**20


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "partial"])
def test_damaged_files_are_fetched_again(
    hub: LoopbackHub, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        add(hub, number)
    run(tmp_path / "undisturbed")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(ZooWriter, "write_shard", lambda *_, **__: _stop())
        run(tmp_path / "zoo")
    files = sorted((tmp_path / "zoo" / "fetched").iterdir())
    assert len(files) == 3
    raw = bytearray(files[1].read_bytes())
    match damage:
        case "cut":
            files[1].write_bytes(raw[:-1])
        case "flip":
            raw[-1] ^= 1
            files[1].write_bytes(raw)
        case "empty":
            files[1].write_bytes(b"")
        case "partial":
            files[1].rename(files[1].with_name(f".{files[1].name}.partial"))
    seen = len(hub.requests)
    run(tmp_path / "zoo")
    assert content(tmp_path / "zoo") == content(tmp_path / "undisturbed")
    assert {request.path.split("/")[2] for request in hub.requests[seen:]} == {"m001"}


def _stop() -> None:
    raise RuntimeError("stop")


def test_a_full_disk_is_said(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, 0)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("weightspace.crawl.spool.Spool.put", full)
        with pytest.raises(ZooError, match=r"fetched: cannot be written \(No space left on device\); make room"):
            run(tmp_path / "zoo")
    assert run(tmp_path / "zoo").models == 1


# A Hub in trouble


def test_passing_trouble_is_outlasted(hub: LoopbackHub, tmp_path: Path) -> None:
    for number in range(4):
        add(hub, number)
    hub.fail("/api/models", 503)
    hub.fail("m000", 429, headers={"Retry-After": "0"}, times=2)
    hub.fail("m001", 500, times=2)
    hub.drop("m002", times=2)
    hub.truncate("m003.*safetensors", 30)
    assert run(tmp_path / "zoo").models == 4


def test_bytes_that_differ_from_the_listed_hash_come_again(hub: LoopbackHub, tmp_path: Path) -> None:
    add(hub, 0)
    add(hub, 1)
    hub.corrupt("m000.*safetensors")
    hub.corrupt("m001.*safetensors", times=None)
    summary = run(tmp_path / "zoo")
    assert load_zoo(tmp_path / "zoo").blob(0) == save(tensors(0))
    assert [ref.partition("@")[0] for ref, _ in summary.skipped] == ["org/m001"]
    assert "do not have the listed hash" in summary.skipped[0][1]


def test_one_repository_that_always_fails_is_left_out(hub: LoopbackHub, tmp_path: Path) -> None:
    for number in range(3):
        add(hub, number)
    hub.fail("m001", 500, times=None)
    summary = run(tmp_path / "zoo")
    assert summary.models == 2
    ((ref, reason),) = summary.skipped
    assert ref.startswith("org/m001@")
    assert "the Hub answers 500" in reason
    assert "twice; the Hub does answer" in reason


def test_a_hub_that_goes_away_is_no_reason_to_skip(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        add(hub, number)
    run(tmp_path / "undisturbed")
    monkeypatch.setattr("weightspace.io.hub.ATTEMPTS", 2)
    gone = threading.Event()

    def go() -> None:
        if not gone.is_set():
            gone.set()
            hub.stop()

    hub.call("resolve", go, skip=20)
    with pytest.raises(HubError, match=r"out of reach .*kept, run the same command again to go on"):
        run(tmp_path / "zoo", jobs=2)
    hub.start()
    seen = len(hub.requests)
    finished = {f"m{int(path.stem):03d}" for path in (tmp_path / "zoo" / "fetched").glob("[!.]*.fetched")}
    assert finished
    assert run(tmp_path / "zoo").models == 30
    assert content(tmp_path / "zoo") == content(tmp_path / "undisturbed")
    assert not {request.path.split("/")[2] for request in hub.requests[seen:]} & finished


def test_a_lone_model_waits_for_the_hub(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, 0)
    prepare_crawl(CrawlSettings(), tmp_path / "zoo")
    monkeypatch.setattr("weightspace.io.hub.ATTEMPTS", 2)
    hub.stop()
    try:
        with pytest.raises(HubError, match="out of reach"):
            run(tmp_path / "zoo")
    finally:
        hub.start()
    assert run(tmp_path / "zoo").skipped == ()


def test_a_token_that_expires_is_no_reason_to_skip(hub: LoopbackHub, tmp_path: Path) -> None:
    for number in range(8):
        add(hub, number)
    prepare_crawl(CrawlSettings(), tmp_path / "zoo")
    with pytest.raises(HubError, match="refuses access"):
        run(tmp_path / "zoo", options=HubOptions(token="hf_expired"))
    assert run(tmp_path / "zoo").models == 8


def test_repositories_that_are_closed_or_gone(hub: LoopbackHub, tmp_path: Path) -> None:
    for number in range(4):
        add(hub, number)
    token = hub.add_user("eve")
    hub.create("org/gated", {"model.safetensors": save(tensors(50))}, gated="manual")
    hub.create("org/private", {"model.safetensors": save(tensors(51))}, private=True)
    plan = prepare_crawl(CrawlSettings(), tmp_path / "zoo", HubOptions(token=token))
    hub.delete("org/m001")
    hub.move("org/m002", "org/new-name")
    summary = crawl(plan, tmp_path / "zoo", options=HubOptions(token=token))
    reasons = {ref.partition("@")[0]: reason for ref, reason in summary.skipped}
    assert set(reasons) == {"org/gated", "org/m001"}  # what is private is not even listed
    assert "gated; ask for access" in reasons["org/gated"]
    assert "no such repository" in reasons["org/m001"]
    assert summary.models == 3


# Hostile repositories


def blob(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]}


def index_to(path: str) -> str:
    return json.dumps({"weight_map": {"w": path}})


PICKLE = b"\x80\x04cposix\nsystem\n(S'touch executed'\ntR."
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "up": ({"model.safetensors.index.json": index_to("../../etc/x.safetensors")}, "is not the name of a file"),
    "absolute": ({"model.safetensors.index.json": index_to("/etc/x.safetensors")}, "is not the name of a file"),
    "claims": ({"model.safetensors": blob({}, length=2**60)}, "header length 1152921504606846976 is above the limit"),
    "overlap": ({"model.safetensors": blob({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12))}, "overlap"),
    "holes": ({"model.safetensors": blob({"a": entry(8, 16)}, bytes(16))}, "model.safetensors"),
    "outside": ({"model.safetensors": blob({"a": entry(0, 2**40)}, bytes(8))}, "truncated"),
    "pickle": ({"model.safetensors": PICKLE}, "model.safetensors"),
    "torch": ({"model.safetensors": b"PK\x03\x04" + PICKLE}, "pickles are never executed here"),
    "bin": ({"pytorch_model.bin": PICKLE}, "pickles can run any code"),
    "control": ({"model.safetensors": blob({"a\x1b[2J": entry(0, 4)}, bytes(4))}, "model.safetensors"),
    "empty": ({"model.safetensors": b""}, "too few for a safetensors file"),
    "none": ({"model.safetensors": blob({})}, "none of its 0 tensors has floating point entries"),
    "integers": ({"model.safetensors": save({"w": torch.ones(3, dtype=torch.int32)})}, "floating point"),
    "nan": ({"model.safetensors": save({"w": torch.tensor([1.0, torch.nan])})}, "1 NaN or infinite values of 2"),
    "foreign": (
        {"model.safetensors": save(tensors(3)), "config.json": '{"family": "mlp", "width": 3}'},
        "mlp config: unknown key 'width'",
    ),
    "others": (
        {
            "model.safetensors": save(tensors(4)),
            "config.json": '{"family": "mlp", "image_shape": [1, 9, 9], "classes": 3}',
        },
        "the config describes",
    ),
    "hollow": (
        {"model.safetensors": save({**tensors(4), **{f"e{i}": torch.empty(0) for i in range(4)}})},
        "4 of its 8 tensors are empty",
    ),
    "quantised": (
        {
            "model.safetensors": save({"w.qweight": torch.ones(4, 4, dtype=torch.int32), "w.scales": torch.ones(4)}),
            "config.json": '{"quantization_config": {"quant_method": "gptq"}}',
        },
        "gptq",
    ),
}


def test_hostile_repositories_are_named_and_left_out(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    add(hub, 0)
    for name, (files, _) in HOSTILE.items():
        hub.create(f"bad/{name}", files)
    before = set(tmp_path.parent.rglob("*"))
    summary = run(tmp_path / "zoo")
    reasons = {ref.partition("@")[0]: reason for ref, reason in summary.skipped}
    assert set(reasons) == {f"bad/{name}" for name in HOSTILE}
    assert summary.models == 1
    for name, (_, expected) in HOSTILE.items():
        assert expected in reasons[f"bad/{name}"], name
        assert reasons[f"bad/{name}"].isprintable()
    written = {path for path in set(tmp_path.parent.rglob("*")) - before if tmp_path / "zoo" not in path.parents}
    assert written == {tmp_path / "zoo"}


def test_a_giant_card_is_never_read(hub: LoopbackHub, tmp_path: Path) -> None:
    giant = tmp_path / "README.md"
    giant.touch()
    os.truncate(giant, 10**9)
    add(hub, 0)
    hub.create("org/a", {"model.safetensors": save(tensors(1))})
    hub.add_file("org/a", "README.md", giant)
    hub.create(
        "org/b", {"model.safetensors": save(tensors(2)), "README.md": "---\ntags: [generated_from_trainer]\n---"}
    )
    plan = prepare_crawl(CrawlSettings(), tmp_path / "zoo")
    summary = crawl(plan, tmp_path / "zoo")
    assert summary.models == 3
    assert hub.bytes_served("README.md") < 1000


def test_a_card_that_grew_too_long_for_a_listing_is_named(hub: LoopbackHub, tmp_path: Path) -> None:
    long = "---\ntags: [generated_from_trainer]\n---\n" + "x" * 2**20
    hub.create("org/a", {"model.safetensors": save(tensors(1)), "README.md": long})
    add(hub, 0)
    plan = prepare_crawl(CrawlSettings(), tmp_path / "zoo")
    if not plan.repos[-1].facts.trained_by_trainer:
        pytest.skip("this Hub does not read such cards")
    summary = crawl(plan, tmp_path / "zoo")
    assert "its card has" in summary.skipped[0][1]


@pytest.mark.slow
def test_twenty_thousand_tensors_are_within_limits(hub: LoopbackHub, tmp_path: Path) -> None:
    count = 20_000
    header = {f"layer.{i}.weight": entry(4 * i, 4 * i + 4) for i in range(count)}
    hub.create("org/many", {"model.safetensors": blob(header, torch.arange(count).float().numpy().tobytes())})
    assert run(tmp_path / "zoo").models == 1
    assert len(load_zoo(tmp_path / "zoo").checkpoint(0).specs) == count


# Sharing out


@pytest.mark.slow
def test_a_local_ray_cluster_makes_the_same_zoo(hub: LoopbackHub, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for number in range(12):
        add(hub, number)
    hub.create("bad/pickle", {"model.safetensors": PICKLE})
    words = ["crawl", "--output", str(tmp_path / "zoo"), "--jobs", "4", "--ray", "--json"]
    code = f"import ray; ray.init(num_cpus=2); from weightspace.cli.main import main; raise SystemExit(main({words!r}))"
    variables = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    variables["RAY_memory_monitor_refresh_ms"] = "0"  # what else runs on this machine is no reason to stop
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["models"] == 12
    assert [skip["file"].partition("@")[0] for skip in summary["skipped"]] == ["bad/pickle"]
    run(tmp_path / "threads")
    assert content(tmp_path / "zoo") == content(tmp_path / "threads")


def test_without_ray_the_package_is_named(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, 0)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "weightspace.crawl.ray", raising=False)
    with pytest.raises(SettingsError, match=r"pip install 'weightspace-hub\[ray\]'"):
        run(tmp_path / "zoo", ray=True)


def test_room_bounds_what_is_held_at_once() -> None:
    room, held, most = Room(10), 0, 0
    lock = threading.Lock()

    def work(size: int) -> None:
        nonlocal held, most
        with room.for_bytes(size):
            with lock:
                held += size
                most = max(most, held if size <= 10 else 0)
            time.sleep(0.002)
            with lock:
                held -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in (4, 5, 6, 3, 50, 2, 9, 1) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=1800)
    assert 0 < most <= 10
    assert held == 0
