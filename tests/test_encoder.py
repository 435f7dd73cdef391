from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from weightspace.cli.main import main
from weightspace.encoder import embed, embed_zoo, load_encoder, save_embeddings
from weightspace.errors import WeightspaceError, ZooError
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.transfer import export_folder
from weightspace.zoo.writer import ZooWriter


class TestEncoder:
    def test_embeds_to_as_many_numbers_as_it_says(self, tiny_encoder: Path, tiny_zoo: Zoo) -> None:
        encoder = load_encoder(tiny_encoder)
        for batch in tiny_zoo.batches():
            found = encoder.embed(batch.flat, batch.architecture)
            assert found.shape == (len(batch.rows), encoder.embedding_size)
            assert found.isfinite().all()
            assert len(torch.unique(found, dim=0)) == len(found)

    def test_chunks_change_nothing(self, tiny_encoder: Path, tiny_zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder, batch = load_encoder(tiny_encoder), next(tiny_zoo.batches())
        whole = [run(batch.flat, batch.architecture) for run in (encoder.embed, encoder.reconstruct)]
        monkeypatch.setattr("weightspace.encoder._CHUNK", 5)
        for run, expected in zip((encoder.embed, encoder.reconstruct), whole, strict=True):
            torch.testing.assert_close(run(batch.flat, batch.architecture), expected)

    def test_reconstructions_are_the_decoded_latents(self, tiny_encoder: Path, tiny_zoo: Zoo) -> None:
        encoder, batch = load_encoder(tiny_encoder), next(tiny_zoo.batches())
        inputs = encoder.extractor.batch(batch.flat, batch.architecture)
        with torch.no_grad():
            latents = encoder.model.encode(**inputs)
            tokens = encoder.model.decode(
                latents, inputs["weight_mask"], inputs["position_ids"], inputs["attention_mask"]
            )
        assert latents[0].numel() == encoder.latent_size(batch.architecture)
        expected = encoder.extractor.restore(tokens, batch.architecture)
        torch.testing.assert_close(encoder.reconstruct(batch.flat, batch.architecture), expected)

    def test_what_is_no_encoder_is_refused(self, tiny_encoder: Path, tmp_path: Path) -> None:
        with pytest.raises(WeightspaceError, match=r"nowhere: no encoder"):
            load_encoder(tmp_path / "nowhere")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
        with pytest.raises(WeightspaceError, match="cannot be loaded"):
            load_encoder(tmp_path)
        shutil.copytree(tiny_encoder, tmp_path / "half")
        (tmp_path / "half" / "model.safetensors").unlink()
        with pytest.raises(WeightspaceError, match="half: the encoder cannot be loaded"):
            load_encoder(tmp_path / "half")
        stored = load_file(tiny_encoder / "model.safetensors")
        lacking = {name: value for name, value in stored.items() if "attention" not in name}
        save_file(lacking, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
        lacks = rf"its file lacks {len(stored) - len(lacking)} of the tensors .* e\.g\. .*attention"
        words = rf"cannot be loaded: .*half/model\.safetensors: {lacks}"
        with pytest.raises(WeightspaceError, match=words):
            load_encoder(tmp_path / "half")


class TestEmbedZoo:
    def test_rows_are_in_the_asked_order(self, tiny_encoder: Path, tiny_zoo: Zoo) -> None:
        encoder = load_encoder(tiny_encoder)
        whole = embed_zoo(encoder, tiny_zoo)
        assert whole.shape == (48, encoder.embedding_size)
        chosen = np.array([40, 3, 29, 3])
        np.testing.assert_allclose(embed_zoo(encoder, tiny_zoo, chosen), whole[chosen], rtol=1e-4, atol=1e-5)

    def test_a_row_is_its_models_embedding(self, tiny_encoder: Path, tiny_zoo: Zoo) -> None:
        encoder = load_encoder(tiny_encoder)
        whole = embed_zoo(encoder, tiny_zoo)
        for row in (0, 13, 47):
            inputs = encoder.extractor(tiny_zoo.checkpoint(row))
            with torch.no_grad():
                alone = encoder.model.get_weight_features(**inputs).pooler_output
            np.testing.assert_allclose(whole[row], alone[0].numpy(), rtol=1e-4, atol=1e-5)

    def test_no_rows_are_refused(self, tiny_encoder: Path, tiny_zoo: Zoo) -> None:
        with pytest.raises(ZooError, match="no rows"):
            embed_zoo(load_encoder(tiny_encoder), tiny_zoo, np.array([], dtype=np.int64))


class TestEmbed:
    def test_zoos_folders_and_files_embed_alike(self, tiny_encoder: Path, tiny_zoo: Zoo, tmp_path: Path) -> None:
        export_folder(tiny_zoo, tmp_path / "models", [0, 30])
        paths = sorted((tmp_path / "models").rglob("*.safetensors"))
        frame = embed([str(tiny_zoo.path), str(tmp_path / "models"), str(paths[0])], tiny_encoder)
        assert len(frame) == 48 + 2 + 1
        assert frame["location"].nunique() == 3
        assert set(tiny_zoo.index.columns) <= set(frame.columns)
        embeddings = np.stack(frame["embedding"].to_list())
        np.testing.assert_allclose(embeddings[48:50], embeddings[[0, 30]], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(embeddings[50], embeddings[0], rtol=1e-4, atol=1e-5)

    def test_models_of_a_folder_are_told_apart(self, tiny_encoder: Path, tiny_zoo: Zoo, tmp_path: Path) -> None:
        export_folder(tiny_zoo, tmp_path / "models", [0, 30])
        frame = embed([str(tmp_path / "models")], tiny_encoder)
        assert sorted(frame["model_id"]) == sorted(
            path.name for path in (tmp_path / "models").iterdir() if path.is_dir()
        )

    def test_what_cannot_be_embedded_is_listed(self, tiny_encoder: Path, tiny_zoo: Zoo, tmp_path: Path) -> None:
        export_folder(tiny_zoo, tmp_path / "models", [0, 30])
        good, other = sorted((tmp_path / "models").rglob("*.safetensors"))
        save_file({"ids": torch.arange(3)}, tmp_path / "models" / "no-floats.safetensors")
        (tmp_path / "models" / "cut.safetensors").write_bytes(good.read_bytes()[:-8])
        other.with_name("config.json").write_text('{"family": "mlp", "depth": 3}')
        gone = str(tmp_path / "gone")
        frame = embed([str(tmp_path / "models"), gone], tiny_encoder)
        assert frame["model_id"].tolist() == [good.parent.name]
        reasons = dict(frame.attrs["left_out"])
        names = ["cut.safetensors", "no-floats.safetensors", str(other.relative_to(tmp_path / "models"))]
        assert set(reasons) == {*(str(tmp_path / "models" / name) for name in names), gone}
        assert "truncated" in reasons[str(tmp_path / "models" / "cut.safetensors")]
        save_embeddings(frame, tmp_path / "e.parquet")
        words = [
            "embed",
            str(tmp_path / "models"),
            "--encoder",
            str(tiny_encoder),
            "--output",
            str(tmp_path / "f.parquet"),
        ]
        assert main(words) == 2
        assert len(pd.read_parquet(tmp_path / "f.parquet")) == 1
        with pytest.raises(WeightspaceError, match="none of 3 models can be embedded: "):
            embed([str(tmp_path / "models" / name) for name in names], tiny_encoder)

    def test_rows_of_a_zoo_that_cannot_be_embedded_are_listed(
        self, tiny_encoder: Path, tiny_zoo: Zoo, tmp_path: Path
    ) -> None:
        writer = ZooWriter(tmp_path / "zoo", settings={})
        blobs = [tiny_zoo.blob(0), save({"ids": torch.arange(3)})]
        writer.write_shard("0", [replace(tiny_zoo.entry(0), model_id=name) for name in ("a", "b")], blobs)
        writer.finish()
        frame = embed([str(tmp_path / "zoo")], tiny_encoder)
        assert frame["model_id"].tolist() == ["a"]
        assert [where for where, _ in frame.attrs["left_out"]] == [f"{tmp_path / 'zoo'}: b"]

    def test_nothing_to_embed_is_refused(self, tiny_encoder: Path, tmp_path: Path) -> None:
        with pytest.raises(WeightspaceError, match="nowhere"):
            embed([str(tmp_path / "nowhere")], tiny_encoder)
        with pytest.raises(WeightspaceError, match="no safetensors file"):
            embed([str(tmp_path)], tiny_encoder)


class TestTable:
    def frame(self) -> pd.DataFrame:
        return pd.DataFrame({"model_id": ["a", "b"], "embedding": [np.arange(3.0), np.ones(3)]})

    def test_survives_saving(self, tmp_path: Path) -> None:
        save_embeddings(self.frame(), tmp_path / "e.parquet")
        read = pd.read_parquet(tmp_path / "e.parquet")
        assert read["model_id"].tolist() == ["a", "b"]
        assert np.array_equal(np.stack(read["embedding"].to_list()), [[0, 1, 2], [1, 1, 1]])
        assert [path.name for path in tmp_path.iterdir()] == ["e.parquet"]

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        target: Any = tmp_path / "file" / "e.parquet"
        with pytest.raises(ZooError, match=r"e\.parquet: cannot be written"):
            save_embeddings(self.frame(), target)
