from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub

from weightspace.crawl.plan import CrawlSettings, Plan, make_plan, read_plan, write_plan
from weightspace.errors import HubError, SettingsError, ZooError
from weightspace.io.hub import HubOptions

WEIGHTS = b"\x08\0\0\0\0\0\0\0{}      "
CARD = "---\nlicense: {licence}\npipeline_tag: image-classification\nlibrary_name: timm\n---\n"


def ids(plan: Plan) -> list[str]:
    return [repo.repo_id for repo in plan.repos]


def add(hub: LoopbackHub, name: str, files: dict[str, Any] | None = None, licence: str = "mit", **options: Any) -> str:
    files = {"model.safetensors": WEIGHTS} if files is None else files
    return hub.create(name, {"README.md": CARD.format(licence=licence), **files}, **options)


def test_one_listing_with_all_that_is_needed(hub: LoopbackHub) -> None:
    sha = add(hub, "org/a", {"model.safetensors": WEIGHTS, "training_args.bin": b"x", "logs/x.txt": "x"})
    plan = make_plan(CrawlSettings())
    (repo,) = plan.repos
    assert (repo.repo_id, repo.sha, repo.checkpoints) == ("org/a", sha, ("model.safetensors",))
    assert repo.files == ("README.md", "model.safetensors")
    assert (repo.facts.licence, repo.facts.task, repo.facts.library) == ("mit", "image-classification", "timm")
    (request,) = hub.requests
    assert request.path == "/api/models"
    assert "expand=cardData" in request.target


def test_filters_of_the_hub(hub: LoopbackHub) -> None:
    add(hub, "org/a", licence="mit")
    add(hub, "org/b", licence="apache-2.0")
    add(hub, "other/a", licence="mit")
    hub.create("org/none", {"model.safetensors": WEIGHTS})
    assert ids(make_plan(CrawlSettings(author="other"))) == ["other/a"]
    assert ids(make_plan(CrawlSettings(licences=("apache-2.0",)))) == ["org/b"]
    assert set(ids(make_plan(CrawlSettings(task="image-classification")))) == {"org/a", "org/b", "other/a"}
    assert set(ids(make_plan(CrawlSettings(library="timm", tags=("license:mit",))))) == {"org/a", "other/a"}
    assert ids(make_plan(CrawlSettings(search="/b"))) == ["org/b"]
    hub.create("org/child", {"model.safetensors": WEIGHTS, "README.md": "---\nbase_model: org/a\n---\n"})
    assert ids(make_plan(CrawlSettings(base_model="org/a"))) == ["org/child"]


def test_several_licences_and_what_is_left_out_is_counted(hub: LoopbackHub) -> None:
    for name, licence in (("a", "mit"), ("b", "apache-2.0"), ("c", "gpl-3.0"), ("d", "gpl-3.0")):
        add(hub, f"org/{name}", licence=licence)
    plan = make_plan(CrawlSettings(licences=("mit", "apache-2.0")))
    assert set(ids(plan)) == {"org/a", "org/b"}
    assert plan.excluded == {"another licence": 2}


def test_the_listing_tells_how_large_models_are(hub: LoopbackHub) -> None:
    from safetensors.torch import save
    from torch import zeros

    add(hub, "org/small", {"model.safetensors": save({"w": zeros(10)})})
    add(hub, "org/large", {"model.safetensors": save({"w": zeros(11)})})
    add(hub, "org/unknown", {"other.safetensors": save({"w": zeros(100)})})
    plan = make_plan(CrawlSettings(max_params=10))
    assert set(ids(plan)) == {"org/small", "org/unknown"}
    assert plan.excluded == {"more than 10 parameters": 1}
    assert {repo.repo_id: repo.size for repo in plan.repos} == {"org/small": 40, "org/unknown": None}


def test_sorted_and_limited_over_pages(hub: LoopbackHub) -> None:
    hub.page_size = 3
    for number in range(10):
        add(hub, f"org/m{number}", downloads=(number * 7) % 10, likes=number)
    by_downloads = sorted(range(10), key=lambda number: -((number * 7) % 10))
    assert ids(make_plan(CrawlSettings())) == [f"org/m{number}" for number in by_downloads]
    assert ids(make_plan(CrawlSettings(limit=4, sort="likes"))) == ["org/m9", "org/m8", "org/m7", "org/m6"]


def test_the_limit_counts_what_can_be_fetched(hub: LoopbackHub) -> None:
    hub.page_size = 2
    for number in range(6):
        files = {"pytorch_model.bin": b"x"} if number % 2 else {"model.safetensors": WEIGHTS}
        add(hub, f"org/m{number}", files, downloads=10 - number)
    plan = make_plan(CrawlSettings(limit=2))
    assert ids(plan) == ["org/m0", "org/m1", "org/m2"]
    assert plan.models == 2


def test_what_can_never_be_fetched_has_a_reason(hub: LoopbackHub) -> None:
    add(hub, "org/pickle", {"pytorch_model.bin": b"x"})
    add(hub, "org/nothing", {"config.json": "{}"})
    add(hub, "org/gated", gated="auto")
    add(hub, "org/shards", {"model-00001-of-00002.safetensors": WEIGHTS})
    plan = make_plan(CrawlSettings(), HubOptions(token=False))
    assert plan.models == 0
    problems = dict(plan.problems)
    assert "'pytorch_model.bin': pickles can run any code" in problems["org/pickle"]
    assert problems["org/nothing"] == "it has no safetensors file"
    assert "gated; ask for access" in problems["org/gated"]
    assert "index is missing" in problems["org/shards:model-00001-of-00002.safetensors"]
    assert make_plan(CrawlSettings(search="gated")).models == 1  # with a token


def test_adapters_by_their_files(hub: LoopbackHub) -> None:
    add(hub, "org/model")
    add(hub, "org/adapter", {"adapter_model.safetensors": WEIGHTS, "adapter_config.json": "{}"})
    add(hub, "org/both", {"model.safetensors": WEIGHTS, "lora/x.safetensors": WEIGHTS, "lora/adapter_config.json": ""})
    add(hub, "org/diffusers", {"pytorch_lora_weights.safetensors": WEIGHTS})
    hub.create("org/kohya", {"style.safetensors": WEIGHTS, "README.md": "---\ntags: [lora]\n---\n"})
    add(hub, "org/pickled", {"adapter_model.bin": b"x", "adapter_config.json": "{}"})
    add(hub, "org/bin", {"pytorch_model.bin": b"x"})
    found = {repo.repo_id: repo.checkpoints for repo in make_plan(CrawlSettings(adapters=True)).repos}
    assert found == {
        "org/adapter": ("adapter_model.safetensors",),
        "org/both": ("lora/x.safetensors",),
        "org/diffusers": ("pytorch_lora_weights.safetensors",),
        "org/kohya": ("style.safetensors",),
        "org/pickled": (),
    }
    plan = make_plan(CrawlSettings(adapters=False))
    assert {repo.repo_id for repo in plan.repos if repo.checkpoints} == {"org/model", "org/both"}
    assert plan.excluded == {"an adapter": 3}
    assert make_plan(CrawlSettings()).models == 6


def test_the_checkpoints_of_a_repository(hub: LoopbackHub) -> None:
    shards = {f"big/model-0000{i}-of-00002.safetensors": WEIGHTS for i in (1, 2)}
    add(
        hub,
        "org/a",
        {
            "model.safetensors": WEIGHTS,
            "model.fp16.safetensors": WEIGHTS,
            "big/model.safetensors.index.json": "{}",
            **shards,
            "odd/one.safetensors": WEIGHTS,
            "odd/two.safetensors": WEIGHTS,
            ".cache/model.safetensors": WEIGHTS,
        },
    )
    (repo,) = make_plan(CrawlSettings()).repos
    names = {path: repo.model_id(path) for path in repo.checkpoints}
    assert names == {
        "model.safetensors": "org/a",
        "big/model.safetensors.index.json": "org/a:big",
        "odd/one.safetensors": "org/a:odd/one.safetensors",
        "odd/two.safetensors": "org/a:odd/two.safetensors",
    }
    assert not repo.problems


@pytest.mark.parametrize(
    "shard",
    ["model-1-of-2", "model.00001-of-00002", "part_1_of_2", "model-00001-of-00002-fp16", "consolidated.01-OF-02"],
)
@pytest.mark.parametrize("beside", [(), ("adapter_model.safetensors",), ("other.safetensors",)])
def test_a_lone_shard_is_no_model(hub: LoopbackHub, shard: str, beside: tuple[str, ...]) -> None:
    add(hub, "org/a", dict.fromkeys((f"{shard}.safetensors", *beside), WEIGHTS))
    (repo,) = make_plan(CrawlSettings()).repos
    assert repo.checkpoints == beside
    assert repo.problems == ((f"org/a:{shard}.safetensors", "a part of a checkpoint whose index is missing"),)


def test_an_index_decides_over_shards_of_any_name(hub: LoopbackHub) -> None:
    names = ["model.safetensors.index.json", *(f"consolidated-0000{i}-of-00002.safetensors" for i in (1, 2))]
    add(hub, "org/a", dict.fromkeys(names, WEIGHTS))
    (repo,) = make_plan(CrawlSettings()).repos
    assert repo.checkpoints == ("model.safetensors.index.json",) and not repo.problems


def test_shards_are_disjoint_and_complete(hub: LoopbackHub) -> None:
    for number in range(30):
        add(hub, f"org/m{number}")
    whole = make_plan(CrawlSettings(limit=20))
    parts = [make_plan(CrawlSettings(limit=20, shard=(part, 3))) for part in (1, 2, 3)]
    assert sorted(name for part in parts for name in ids(part)) == sorted(ids(whole))
    assert all(ids(part) for part in parts)
    assert parts[0].excluded == {"part of another shard": 20 - len(parts[0].repos)}


def test_lineage_as_far_as_the_listing_tells(hub: LoopbackHub) -> None:
    bases = {"a": "org/b", "b": "org/c", "c": "elsewhere/d", "loop": "org/pool", "pool": "org/loop"}
    for name, base in bases.items():
        hub.create(f"org/{name}", {"model.safetensors": WEIGHTS, "README.md": f"---\nbase_model: {base}\n---\n"})
    found = {repo.repo_id: repo.lineage for repo in make_plan(CrawlSettings()).repos}
    assert found["org/a"] == ("org/b", "org/c", "elsewhere/d")
    assert found["org/loop"] == ("org/pool",)


def test_a_plan_is_kept_as_it_is(hub: LoopbackHub, tmp_path: Path) -> None:
    card = "---\nmodel-index: [{name: m, results: [{dataset: {type: d}, metrics: [{type: f1, value: 0.5}]}]}]\n---\n"
    hub.create("org/a", {"model.safetensors": WEIGHTS, "README.md": card})
    add(hub, "org/b", {"pytorch_model.bin": b"x"})
    plan = make_plan(CrawlSettings(licences=(), shard=(1, 1), max_params=5))
    write_plan(plan, tmp_path)
    assert read_plan(tmp_path) == plan
    assert read_plan(tmp_path / "elsewhere") is None
    assert replace(plan, repos=plan.repos[:1]).digest != plan.digest


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"not json\n", b'{"version": 2, "repos": 0}\n'])
def test_a_damaged_plan_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "plan.jsonl").write_bytes(damage)
    with pytest.raises(ZooError, match=r"plan\.jsonl: damaged .*delete the folder"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [({"limit": 0}, "limit: 0"), ({"max_params": 0}, "max_params: 0"), ({"shard": (3, 2)}, "shard: 3/2")],
)
def test_impossible_settings(values: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        CrawlSettings(**values)


def test_a_refused_token_is_said_in_one_line(hub: LoopbackHub) -> None:
    with pytest.raises(HubError, match="the listing of models: the Hub refuses access"):
        make_plan(CrawlSettings(), HubOptions(token="hf_wrong"))


def test_a_listing_that_fails_between_pages_goes_on(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightspace.io.hub.FIRST_WAIT", 0.001)
    hub.page_size = 2
    for number in range(6):
        add(hub, f"org/m{number}")
    hub.fail("cursor=4", 503, times=2)
    hub.drop("cursor=2")
    assert len(ids(make_plan(CrawlSettings()))) == 6
    assert len(hub.seen("/api/models")) == 3 + 3


@pytest.mark.parametrize("body", [b"<html>", b'{"error": 1}'])
def test_what_is_no_hub_is_said(hub: LoopbackHub, body: bytes) -> None:
    hub.fail("/api/models", 200, body=body)
    with pytest.raises(HubError, match="the answer is no list; is http"):
        make_plan(CrawlSettings())


def test_the_token_goes_nowhere_else(hub: LoopbackHub) -> None:
    hub.fail("/api/models", 200, body=b"[]", headers={"Link": '<http://localhost:1/api/models>; rel="next"'})
    with pytest.raises(HubError, match="it goes on at 'http://localhost:1/api/models'"):
        make_plan(CrawlSettings())


def test_hostile_rows_are_named_and_the_listing_goes_on(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, "org/good", downloads=1)
    add(hub, "org/\x1b[2Jbad", downloads=9)
    add(hub, "org/files", {"../../up.safetensors": WEIGHTS, "/abs.safetensors": b"", "a\nb.safetensors": b""})
    card = "---\nself: 1\nignore_metadata_errors: 2\nmodel-index: [[[]]]\nlicense: {a: b}\ndatasets: [[], 7]\n---\n"
    hub.create("org/card", {"model.safetensors": WEIGHTS, "README.md": card}, downloads=8)
    plan = make_plan(CrawlSettings())
    assert {repo.repo_id for repo in plan.repos if repo.checkpoints} == {"org/good", "org/card"}
    problems = dict(plan.problems)
    assert r"'org/\x1b[2Jbad'" in problems
    for name in ("'../../up.safetensors'", "'/abs.safetensors'", r"'a\nb.safetensors'"):
        assert "not a plain one" in problems[f"org/files:{name}"]
    assert all(text.isprintable() for problem in plan.problems for text in problem)


@pytest.mark.parametrize(
    "row", [None, 3, "text", {}, {"id": 5}, {"id": "org/a"}, {"id": "org/a", "sha": "main"}, {"id": "a", "sha": None}]
)
def test_rows_of_other_forms_become_problems(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightspace.crawl.plan.list_models", lambda *_: iter([row]))
    plan = make_plan(CrawlSettings(), HubOptions(token=False))
    assert plan.models == 0
    assert len(plan.problems) == 1
