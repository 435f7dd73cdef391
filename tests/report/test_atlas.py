from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from weightspace.cli.main import main
from weightspace.errors import ZooError
from weightspace.report import atlas as module
from weightspace.report.atlas import (
    MAX_COLUMNS,
    NEIGHBOURS,
    Atlas,
    build_atlas,
    embedded_models,
    nearest_neighbours,
    write_atlas,
)

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    "a\u2028b\u2029c",
    "\u202egnp.exe",
    "&lt;b&gt;",
    "]]>\x00\x1b[2J",
    "x" * 5000,
    "${window.hacked=1}",
]
HALF = "\ud800 half of a pair, which JSON can hold and UTF-8 cannot"
SHA = "0123456789abcdef0123456789abcdef01234567"
DTYPES = {"u1": "<u1", "u2": "<u2", "u4": "<u4", "f4": "<f4", "f8": "<f8"}


def frame(models: int, size: int = 6, **columns: Any) -> pd.DataFrame:
    embeddings = np.random.default_rng(0).normal(size=(models, size)).astype(np.float32)
    names = [f"model-{i}" for i in range(models)]
    return pd.DataFrame({"model_id": names, "embedding": list(embeddings), **columns})


class Scripts(HTMLParser):
    """Collects the scripts of a page and its security policy."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.links: list[str | None] = []
        self.policy = ""
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append((values, ""))
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(values["content"])
        self.links += [values[name] for name in ("src", "href") if name in values]

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


def records(atlas: Atlas, folder: Path) -> dict[str, Any]:
    page = Scripts(write_atlas(atlas, folder / "atlas.html").read_text(encoding="utf-8"))
    return json.loads(page.scripts[0][1])


def unpacked(packed: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["bytes"]), dtype=DTYPES[packed["type"]])


@pytest.mark.parametrize("block", [1, 7, 64])
def test_neighbours_are_those_of_a_plain_loop(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightspace.stats.clustering._CHUNK_ENTRIES", 40 * block)
    embeddings = np.random.default_rng(1).normal(size=(40, 5))
    neighbours, distances = nearest_neighbours(embeddings, 6)
    for row, one in enumerate(embeddings):
        away = [1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other) for other in embeddings]
        expected = sorted((i for i in range(40) if i != row), key=lambda i: away[i])[:6]
        assert neighbours[row].tolist() == expected
        np.testing.assert_allclose(distances[row], [away[i] for i in expected], atol=1e-6)


def test_equal_models_are_each_others_nearest_in_the_order_of_their_rows() -> None:
    embeddings = np.array([[1.0, 2], [-1, 0], [1, 2], [2, 4], [0, 0], [0, 0]])
    neighbours, distances = nearest_neighbours(embeddings, 2)
    assert neighbours[0].tolist() == [2, 3]
    assert neighbours[3].tolist() == [0, 2]
    np.testing.assert_allclose(distances[0], [0, 0], atol=1e-6)
    # Without a direction: as near as can be to its like, unrelated to all others.
    assert neighbours[4].tolist() == [5, 0]
    assert distances[4].tolist() == [0, 1]


@pytest.mark.parametrize("models", [1, 2, 3, 11, 12, 40])
def test_small_zoos_get_a_page(models: int, tmp_path: Path) -> None:
    atlas = build_atlas(frame(models), "small")
    assert atlas.places.shape == (models, 2)
    assert np.abs(atlas.places).max() <= 1
    assert atlas.neighbours.shape == (models, min(NEIGHBOURS, models - 1))
    assert records(atlas, tmp_path)["names"] == list(atlas.names)


def test_equal_embeddings_share_one_place(tmp_path: Path) -> None:
    models = frame(20)
    models["embedding"] = [np.full(6, 0.1, dtype=np.float32)] * 20
    atlas = build_atlas(models, "equal")
    assert not atlas.places.any()
    assert not atlas.distances.any()
    assert "equal" in atlas.method
    assert len(records(atlas, tmp_path)["names"]) == 20


def test_columns_count_alike_whatever_their_scale_and_constant_ones_not_at_all() -> None:
    models = frame(30)
    embeddings = np.stack(models["embedding"].to_list()).astype(np.float64)
    scaled = models.assign(embedding=list(np.hstack([embeddings * [1e200, 1, 1e-200, 1, 1, 1], np.full((30, 1), 0.1)])))
    one, other = build_atlas(models, "a"), build_atlas(scaled, "b")
    assert np.array_equal(one.neighbours, other.neighbours)
    np.testing.assert_allclose(one.distances, other.distances, atol=1e-6)


def test_models_without_a_finite_embedding_are_left_out_and_counted(tmp_path: Path) -> None:
    models = frame(20, dataset=[f"d{i % 3}" for i in range(20)])
    models.at[4, "embedding"] = np.full(6, np.nan, dtype=np.float32)
    models.at[7, "embedding"] = np.full(6, np.inf, dtype=np.float32)
    atlas = build_atlas(models, "gaps")
    assert atlas.left_out == 2
    assert atlas.names == [f"model-{i}" for i in range(20) if i not in (4, 7)]
    assert list(atlas.columns["dataset"]) == [f"d{i % 3}" for i in range(20) if i not in (4, 7)]
    assert "2 without a finite embedding" in write_atlas(atlas, tmp_path / "a.html").read_text(encoding="utf-8")
    models["embedding"] = [np.full(6, np.nan)] * 20
    with pytest.raises(ZooError, match="gaps: none of 20 models has a finite embedding; embed"):
        build_atlas(models, "gaps")


def test_the_map_follows_from_the_seed_and_places_what_it_has_no_landmark_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LANDMARKS", 60)
    group = np.arange(150) % 3
    centres = 40 * np.random.default_rng(0).normal(size=(3, 6))
    models = frame(150)
    models["embedding"] = list(np.stack(models["embedding"].to_list()) + centres[group])
    atlas = build_atlas(models, "groups")
    assert atlas.method == "PCA, then t-SNE of 60 models, the others among their nearest of these"
    middles = np.array([np.median(atlas.places[group == one], axis=0) for one in range(3)])
    nearest = np.linalg.norm(atlas.places[:, None] - middles, axis=2).argmin(axis=1)
    assert np.array_equal(nearest, group)
    assert np.array_equal(build_atlas(models, "groups").places, atlas.places)
    assert not np.array_equal(build_atlas(models, "groups", seed=1).places, atlas.places)


def test_columns_hold_what_is_known_in_whatever_form() -> None:
    models = frame(
        4,
        dataset=["a", None, "", "b"],
        test_accuracy=[0.5, np.nan, np.inf, 1],
        lineage=["[]", "[]", '["x"]', "[]"],
        header=["0", "1", "2", "3"],
        parents=[["p", "q"], np.array([]), None, ["r"]],
        public=[True, False, None, True],
        empty=[None] * 4,
        big=[2**60, 1, 2, 3],
        hyperparameters=['{"rate": 0.1, "dataset": "z"}', "{broken", "[1]", '{"layers": [1, 2], "rate": null}'],
        config=['{"rate": 0.1}', None, None, '{"rate": 7}'],
    )
    columns = build_atlas(models, "all").columns
    assert columns == {
        "dataset": ["a", None, None, "b"],
        "test_accuracy": [0.5, None, float("inf"), 1.0],
        "lineage": [None, None, '["x"]', None],
        "parents": ["p, q", None, None, "r"],
        "public": [True, False, None, True],
        "big": [str(2**60), 1, 2, 3],
        "rate": [0.1, None, None, None],
        "hyperparameters.dataset": ["z", None, None, None],
        "layers": [None, None, None, "[1, 2]"],
        "config.rate": [0.1, None, None, 7],
    }
    assert list(build_atlas(models, "some", ["rate", "header"]).columns) == ["rate", "header"]
    with pytest.raises(ZooError, match=r"column 'embedding': not known of these models; choose from dataset, .*rate"):
        build_atlas(models, "none", ["embedding"])


def test_columns_known_of_the_fewest_models_give_way() -> None:
    rows = [json.dumps({"common": 1, **{f"rare-{i}-{j}": 1 for j in range(60)}}) for i in range(5)]
    atlas = build_atlas(frame(5, hyperparameters=rows), "many")
    assert len(atlas.columns) == MAX_COLUMNS
    assert "common" in atlas.columns
    assert atlas.left_out_columns == 301 - MAX_COLUMNS
    assert list(build_atlas(frame(5, hyperparameters=rows), "many", ["rare-4-59"]).columns) == ["rare-4-59"]


def test_numbers_keep_their_bits_and_texts_their_number(tmp_path: Path) -> None:
    third, half = [1 / 3, None, 2.0], [0.5, None, 2.0]
    texts = ["b", "a", "b"] * 100
    models = frame(300, third=third * 100, half=half * 100, text=texts, mixed=["a", 1, None] * 100)
    written = {column["name"]: column for column in records(build_atlas(models, "kinds"), tmp_path)["columns"]}
    assert written["third"]["numbers"]["type"] == "f8"
    assert written["half"]["numbers"]["type"] == "f4"
    for name, values in (("third", third), ("half", half)):
        read = unpacked(written[name]["numbers"])[:3]
        np.testing.assert_array_equal(read, [np.nan if value is None else value for value in values])
    assert [written["text"]["levels"][code] for code in unpacked(written["text"]["codes"])] == texts
    assert len(written["text"]["marks"]) == 2
    assert [*written["mixed"]["levels"], None] == ["1", "a", None]
    assert unpacked(written["mixed"]["codes"])[:3].tolist() == [1, 0, 2]


def test_common_texts_get_colours_and_names_none(tmp_path: Path) -> None:
    texts = [f"common-{i % 40}" for i in range(200)]
    written = records(build_atlas(frame(200, text=texts, name=[f"n{i}" for i in range(200)]), "texts"), tmp_path)
    text, name = written["columns"]
    assert len(text["marks"]) == 31
    assert len({tuple(mark) for mark in text["marks"]}) == 31
    assert name["marks"] == []


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    count = len(HOSTILE)
    models = frame(2 * count, model=HOSTILE * 2, **{HOSTILE[0]: [1.5] * 2 * count})
    models["model_id"] = HOSTILE * 2
    models["hyperparameters"] = [json.dumps({text: text, HALF: HALF}) for text in HOSTILE] * 2
    path = write_atlas(build_atlas(models, HOSTILE[0]), tmp_path / "atlas.html")
    page = Scripts(path.read_text(encoding="utf-8"))
    assert [values for values, _ in page.scripts] == [{"type": "application/json", "id": "records"}, {}]
    read = json.loads(page.scripts[0][1])
    names = read["names"]
    assert names[0] == HOSTILE[0]
    assert names[2] == "a\\u2028b\\u2029c"
    assert names[3] == "\\u202egnp.exe"
    assert len(names[6]) == 200
    assert {f"\\{HALF[0].encode('unicode_escape').decode()[1:]}{HALF[1:]}", names[0]} <= {
        one["name"] for one in read["columns"]
    }
    assert page.scripts[0][1].isascii()
    assert not re.search(r"[<>&\u2028\u2029]", page.scripts[0][1])


def test_the_page_lets_its_own_script_run_and_nothing_else(tmp_path: Path) -> None:
    page = Scripts(write_atlas(build_atlas(frame(3), "plain"), tmp_path / "a.html").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[1][1].encode()).digest()).decode()
    assert "default-src 'none'" in page.policy
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert page.links == ["data:,"]


def test_only_what_is_pinned_to_a_commit_links_to_the_hub(tmp_path: Path) -> None:
    locations = [
        f"org/name@{SHA}",
        f"org/name@{SHA}:sub/model.safetensors",
        "org/name",
        "org/name@main",
        f"org/name@{SHA}0",
        f"javascript:alert(1)//a/b@{SHA}",
        f"../x@{SHA}",
        None,
    ]
    page = f"https://huggingface.co/org/name/tree/{SHA}"
    assert build_atlas(frame(8, location=locations), "hub").pages == [page, page, *[None] * 6]
    refs = frame(3, ref=["org/name", "./file", "org/name"], revision=[SHA, None, "main"])
    atlas = build_atlas(refs, "hub")
    assert atlas.pages == [page, None, None]
    written = records(atlas, tmp_path)["pages"]
    assert written["levels"] == [page]
    assert unpacked(written["codes"]).tolist() == [0, 1, 1]


def test_a_page_of_20_000_models_and_15_columns_is_below_10_megabytes(tmp_path: Path) -> None:
    path = write_atlas(random_atlas(20_000), tmp_path / "atlas.html")
    assert path.stat().st_size < 10e6


def random_atlas(models: int) -> Atlas:
    """Models at random places, with ten columns of long numbers and five of texts."""
    rng = np.random.default_rng(0)
    numbers = {f"number_{i}": rng.normal(size=models).tolist() for i in range(10)}
    texts = {f"text_{i}": [f"some words {j}" for j in rng.integers(10 ** (i + 1), size=models)] for i in range(5)}
    return Atlas(
        title="random",
        names=[f"run-{i // 4:06d}-step-{i % 4:06d}" for i in range(models)],
        pages=[None] * models,
        columns=numbers | texts,
        left_out_columns=0,
        places=rng.uniform(-1, 1, size=(models, 2)),
        method="at random",
        neighbours=rng.integers(models, size=(models, NEIGHBOURS)),
        distances=np.sort(rng.uniform(0, 2, size=(models, NEIGHBOURS)), axis=1),
        left_out=0,
    )


def test_what_cannot_be_embedded_or_read_is_said(tmp_path: Path, tiny_zoo: Any) -> None:
    file = tmp_path / "embeddings.parquet"
    frame(3).drop(columns="embedding").to_parquet(file)
    with pytest.raises(ZooError, match=r"embeddings\.parquet: no column 'embedding'; give a file"):
        embedded_models(file)
    with pytest.raises(ZooError, match="holds embeddings already; leave out the encoder"):
        embedded_models(file, "encoder")
    file.write_text("no parquet")
    with pytest.raises(ZooError, match=r"embeddings\.parquet: cannot be read"):
        embedded_models(file)
    with pytest.raises(ZooError, match="a zoo needs an encoder; name one"):
        embedded_models(tiny_zoo.path)
    with pytest.raises(ZooError, match=r"of sizes \[2, 6\], not of one; embed all models with one encoder"):
        build_atlas(pd.concat([frame(2), frame(2, size=2)], ignore_index=True), "mixed")


def test_the_command_draws_a_zoo_and_its_embeddings_alike(
    tmp_path: Path, tiny_zoo: Any, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages, table = [tmp_path / "zoo.html", tmp_path / "table.html"], tmp_path / "zoo.parquet"
    assert main(["embed", str(tiny_zoo.path), "--encoder", str(tiny_encoder), "--output", str(table)]) == 0
    columns = ["--columns", "dataset, learning_rate"]
    assert main(["atlas", str(tiny_zoo.path), "--encoder", str(tiny_encoder), "--output", str(pages[0]), *columns]) == 0
    assert main(["atlas", str(table), "--output", str(pages[1]), *columns]) == 0
    assert pages[0].read_text(encoding="utf-8") == pages[1].read_text(encoding="utf-8")
    assert f"{pages[0]}: 48 models\n" in capsys.readouterr().out
    assert main(["atlas", str(table), "--output", str(pages[1]), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["models"] == 48
    assert {"dataset", "test_accuracy", "learning_rate", "family"} <= set(printed["columns"])
    assert main(["atlas", str(table), "--output", str(pages[1]), "--columns", "colour"]) == 2
    assert "column 'colour': not known" in capsys.readouterr().err
