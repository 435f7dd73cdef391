from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from weightspace.encoder import Encoder, embed, load_encoder
from weightspace.errors import SettingsError, ZooError
from weightspace.io.writing import save_checkpoint
from weightspace.search import index as searching
from weightspace.search.index import EmbeddingIndex
from weightspace.zoo.dataset import Zoo


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    return load_encoder(tiny_encoder)


@pytest.fixture(scope="module")
def index(encoder: Encoder, tiny_zoo: Zoo) -> EmbeddingIndex:
    return EmbeddingIndex.from_zoo(tiny_zoo, encoder)


def random_index(models: int, size: int = 16, centres: int | None = None) -> EmbeddingIndex:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(models, size))
    if centres is not None:
        vectors = 0.5 * vectors + rng.normal(size=(centres, size))[rng.integers(centres, size=models)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    frame = pd.DataFrame({"model_id": [f"m{i}" for i in range(models)]})
    return EmbeddingIndex(frame, vectors.astype(np.float32), "encoder", "0" * 64)


class TestBuilding:
    def test_vectors_are_the_directions_of_the_embeddings(
        self, index: EmbeddingIndex, encoder: Encoder, tiny_zoo: Zoo
    ) -> None:
        frame = embed([str(tiny_zoo.path)], encoder)
        expected = np.stack(frame["embedding"].to_list())
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(index.vectors, expected, rtol=1e-5, atol=1e-6)
        assert index.models["model_id"].tolist() == tiny_zoo.index["model_id"].tolist()
        assert set(index.models["location"]) == {str(tiny_zoo.path)}
        assert (index.encoder, index.zoo_digest) == (str(encoder.path), tiny_zoo.digest)
        assert "embedding" not in index.models

    def test_embeddings_without_direction_are_left_out(self, encoder: Encoder) -> None:
        size = encoder.embedding_size
        rows = [np.ones(size), np.zeros(size), np.full(size, np.nan), np.full(size, -2.0)]
        made = EmbeddingIndex.from_frame(pd.DataFrame({"model_id": list("abcd"), "embedding": rows}), encoder)
        assert made.models["model_id"].tolist() == ["a", "d"]
        assert made.left_out == 2
        np.testing.assert_allclose(made.vectors @ made.vectors.T, [[1, -1], [-1, 1]], atol=1e-5)
        with pytest.raises(ZooError, match="none of 1 embeddings is finite and not zero"):
            EmbeddingIndex.from_frame(pd.DataFrame({"model_id": ["b"], "embedding": [np.zeros(size)]}), encoder)

    def test_nothing_and_embeddings_of_another_encoder_are_refused(self, encoder: Encoder) -> None:
        with pytest.raises(ZooError, match="no models to search; give at least one"):
            EmbeddingIndex.from_frame(pd.DataFrame({"model_id": [], "embedding": []}), encoder)
        frame = pd.DataFrame({"model_id": ["a"], "embedding": [np.ones(3)]})
        with pytest.raises(SettingsError, match=rf"of 3 numbers: the encoder .* makes {encoder.embedding_size}; embed"):
            EmbeddingIndex.from_frame(frame, encoder)


class TestExactSearch:
    def test_as_a_plain_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        index, queries = random_index(100), 3 * np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
        monkeypatch.setattr(searching, "_BLOCK", 7)
        scores, rows = index.search(queries, 10)
        for query, found, order in zip(queries, scores, rows, strict=True):
            products = np.array([vector @ query for vector in index.vectors])
            assert order.tolist() == np.argsort(-products)[:10].tolist()
            np.testing.assert_allclose(found, np.sort(products)[::-1][:10], rtol=1e-5)

    def test_more_than_there_are_and_a_single_model(self) -> None:
        index = random_index(3)
        scores, rows = index.search(index.vectors[:1], 10)
        assert rows.shape == scores.shape == (1, 3)
        assert set(rows[0]) == {0, 1, 2}
        scores, rows = random_index(1).search(np.ones((2, 16)), 5)
        assert rows.tolist() == [[0], [0]]

    def test_of_equal_models_the_first_comes_first(self) -> None:
        index = random_index(1)
        twins = EmbeddingIndex(pd.DataFrame({"model_id": list("abcd")}), np.repeat(index.vectors, 4, 0), "e", "d")
        assert twins.search(index.vectors, 4)[1].tolist() == [[0, 1, 2, 3]]

    def test_excluded_rows_make_room_for_others(self) -> None:
        index = random_index(20)
        everything = index.rank(index.vectors[0], 20)[1].tolist()
        scores, rows = index.rank(index.vectors[0], 5, excluded=everything[:3])
        assert rows.tolist() == everything[3:8]
        assert len(index.rank(index.vectors[0], 20, excluded=everything[:3])[0]) == 17
        assert len(index.rank(index.vectors[0], 5, excluded=everything)[0]) == 0
        assert (np.diff(scores) <= 0).all()


class TestSaving:
    def test_round_trip(self, index: EmbeddingIndex, encoder: Encoder, tmp_path: Path) -> None:
        again = EmbeddingIndex.load(index.save(tmp_path / "index"), encoder)
        assert np.array_equal(again.vectors, index.vectors)
        pd.testing.assert_frame_equal(again.models, index.models)
        assert (again.encoder, again.encoder_digest, again.zoo_digest) == (
            index.encoder,
            encoder.digest,
            index.zoo_digest,
        )
        again.save(tmp_path / "index")  # replaces
        assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
            "index.json",
            "models.parquet",
            "vectors.safetensors",
        ]

    def test_another_encoder_is_refused_by_both_names(
        self, index: EmbeddingIndex, tiny_encoder: Path, tiny_clip_joint: Path, tmp_path: Path
    ) -> None:
        index.save(tmp_path / "index")
        with pytest.raises(SettingsError) as error:
            EmbeddingIndex.load(tmp_path / "index", load_encoder(tiny_clip_joint))
        assert str(tiny_encoder) in str(error.value)
        assert str(tiny_clip_joint) in str(error.value)
        assert "search with that one, or build the index again" in str(error.value)

    def test_a_copy_of_the_encoder_is_the_same_encoder(
        self, index: EmbeddingIndex, tiny_encoder: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(tiny_encoder, tmp_path / "copy")
        index.ensure_encoder(load_encoder(tmp_path / "copy"))
        content = json.loads((tmp_path / "copy" / "preprocessor_config.json").read_text())
        (tmp_path / "copy" / "preprocessor_config.json").write_text(json.dumps(content | {"mean": 1.0}))
        with pytest.raises(SettingsError, match=r"copy .*the index was built with"):
            index.ensure_encoder(load_encoder(tmp_path / "copy"))

    def test_a_folder_that_holds_something_else_is_left_alone(self, index: EmbeddingIndex, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("x")
        with pytest.raises(ZooError, match=r"holds 'thesis\.tex', which is no part of an index"):
            index.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_place_that_cannot_be_written_is_named(self, index: EmbeddingIndex, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ZooError, match=r"file/index.* cannot be written"):
            index.save(tmp_path / "file" / "index")

    def test_what_is_no_index_or_damaged_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ZooError, match="no index"):
            EmbeddingIndex.load(tmp_path)
        folder = random_index(4).save(tmp_path / "index")

        def broken(words: str) -> None:
            with pytest.raises(ZooError, match=words) as error:
                EmbeddingIndex.load(folder)
            assert "build the index again" in str(error.value) or "write" in str(error.value)
            random_index(4).save(folder)

        record = json.loads((folder / "index.json").read_text())
        for change, words in (
            ({"version": 9}, "version 9"),
            ({"encoder": 3}, "encoder is 3"),
            ({"models": 5}, "damaged: 5 models in index.json, 4 in models.parquet"),
        ):
            (folder / "index.json").write_text(json.dumps(record | change))
            broken(words)
        (folder / "index.json").write_text("{")
        broken("index.json")
        for vectors in (torch.ones(4, 16), torch.full((4, 16), torch.nan)):
            save_checkpoint({"vectors": vectors}, folder / "vectors.safetensors")
            broken("not one vector of length 1")
        save_checkpoint({"vectors": torch.ones(4, 1, dtype=torch.float64)}, folder / "vectors.safetensors")
        broken("damaged")
        (folder / "vectors.safetensors").write_bytes(b"")
        broken("vectors")
        (folder / "models.parquet").write_bytes(b"PAR1")
        broken(r"models\.parquet")

    def test_an_index_that_is_half_replaced_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = random_index(4).save(tmp_path / "index")

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(searching, "save_checkpoint", full)
            with pytest.raises(OSError, match="No space"):
                random_index(5).save(folder)
        with pytest.raises(ZooError, match="no index"):
            EmbeddingIndex.load(folder)


class TestApproximateSearch:
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("faiss")
        monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))

    def test_finds_nearly_what_exact_search_finds(self) -> None:
        index = random_index(5000, centres=100)
        queries = index.vectors[:200] + 0.05 * np.random.default_rng(2).normal(size=(200, 16)).astype(np.float32)
        scores, rows = index.search(queries, 10, exact=False)
        expected_scores, expected = index.search(queries, 10, exact=True)
        assert (rows[:, 0] == expected[:, 0]).mean() > 0.98
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, expected, strict=True)]) > 0.95
        same = rows == expected
        np.testing.assert_allclose(scores[same], expected_scores[same], rtol=1e-5)
        # It is another way of search, and not the exact one under another name.
        assert type(index._approximate).__name__ == "IndexIVFFlat"

    def test_lists_are_built_once_for_a_content(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        index = random_index(2000, centres=20)
        first = index.search(index.vectors[:20], 5, exact=False)
        (kept,) = (tmp_path / "assets").rglob("*.faiss")
        monkeypatch.setattr("faiss.index_factory", None)  # another building would fail
        again = random_index(2000, centres=20).search(index.vectors[:20], 5, exact=False)
        assert all(map(np.array_equal, first, again))
        assert kept.parent.name == "faiss"

    def test_size_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        index = random_index(300)
        index.search(index.vectors[:1], 3)
        assert "_approximate" not in vars(index)
        monkeypatch.setattr(searching, "EXACT_UP_TO", 299)
        index.search(index.vectors[:1], 3)
        assert "_approximate" in vars(index)

    def test_asking_for_more_than_the_lists_hold_is_answered_exactly(self) -> None:
        index = random_index(5000, centres=70)
        assert np.array_equal(
            index.search(index.vectors[:3], 5000, exact=False)[1], index.search(index.vectors[:3], 5000)[1]
        )

    def test_without_faiss_large_indexes_are_searched_exactly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(searching, "is_faiss_available", lambda: False)
        monkeypatch.setattr(searching, "EXACT_UP_TO", 10)
        index = random_index(20)
        assert index.search(index.vectors[:1], 1)[1].tolist() == [[0]]
        with pytest.raises(SettingsError, match=r"needs FAISS; pip install 'weightspace-hub\[search\]'"):
            index.search(index.vectors[:1], 1, exact=False)
