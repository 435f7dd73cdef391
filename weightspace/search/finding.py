"""Finds models of a zoo or an index: what ``weightspace search`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from weightspace.encoder import Encoder, embed, load_encoder
from weightspace.errors import SettingsError, WeightspaceError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.hub import HubOptions
from weightspace.io.locations import parse_ref
from weightspace.search.index import EmbeddingIndex, is_index
from weightspace.search.queries import dataset_for, described_dataset, joint_query
from weightspace.search.results import parse_results
from weightspace.zoo.dataset import load_zoo

# Of embeddings in float32: what is nearer than this is the model itself, or a copy.
_SAME = 1 - 1e-6


@dataclass(frozen=True)
class Question:
    """What is asked: a model, or a dataset (itself or in words) and results, together or alone.

    Attributes:
        dataset: folder or id; see `weightspace.data.images.load_images`.
        texts: descriptions of the dataset's classes, in place of ``dataset``; see `described_dataset`.
        result: see `parse_results`.
        model: ``model_id`` in the index, a path or ``org/name[@revision][:path]``, whose relatives are wanted.
        same_run: whether other checkpoints of the model's own training run count as relatives.
    """

    dataset: str | None = None
    texts: tuple[str, ...] = ()
    result: str | None = None
    model: str | None = None
    same_run: bool = False

    def __post_init__(self) -> None:
        joint = [name for name in ("dataset", "texts", "result") if getattr(self, name)]
        if self.model is not None and joint:
            raise SettingsError(
                f"model {self.model!a} and {joint[0]}: similarities to a model and to a dataset or a result have no "
                "common scale; ask one after the other"
            )
        if self.dataset is not None and self.texts:
            raise SettingsError(f"dataset {self.dataset!a} and a text: both say which dataset; give one of them")
        if self.model is None and not joint:
            raise SettingsError("nothing to search for; give a dataset, a text, a wanted result or a model")


@dataclass(frozen=True, eq=False)
class Answer:
    """Models, best first.

    Attributes:
        scores: of the models: nats for datasets and results (see `joint_query`), cosines for a model.
        rows: of the models in the index.
        itself: rows that are the model that was asked about, or copies of it.
    """

    scores: Float[np.ndarray, "found"]
    rows: Int[np.ndarray, "found"]
    itself: tuple[int, ...] = ()


def open_index(
    location: str | Path,
    encoder: str | Path | None = None,
    options: HubOptions | None = None,
    *,
    allow_pickle: bool = False,
) -> tuple[EmbeddingIndex, Encoder]:
    """Opens an index with its encoder, or makes one of what `embed` takes.

    Args:
        location: an index, a zoo, or checkpoints, on disk or, but for an index, on the Hub.
        encoder: folder or ``org/name`` of the encoder; an index remembers its own.
        options: how the Hub is reached.
        allow_pickle: also read plain tensors from pickled checkpoints.

    Raises:
        WeightspaceError: there is nothing to open, or the encoder is missing or not the one of the index.
    """
    if is_index(location):
        index = EmbeddingIndex.load(location)
        loaded = load_encoder(index.encoder if encoder is None else encoder, options)
        index.ensure_encoder(loaded)
        return index, loaded
    if encoder is None:
        raise SettingsError(f"{location}: a zoo needs an encoder; name one, or give an index, which knows its own")
    loaded = load_encoder(encoder, options)
    if (Path(location) / "zoo.json").exists():
        return EmbeddingIndex.from_zoo(load_zoo(location), loaded), loaded
    frame = embed([str(location)], loaded, options=options, allow_pickle=allow_pickle)
    return EmbeddingIndex.from_frame(frame, loaded), loaded


def find_models(
    index: EmbeddingIndex,
    encoder: Encoder,
    question: Question,
    k: int = 10,
    options: HubOptions | None = None,
    *,
    allow_pickle: bool = False,
) -> Answer:
    """Ranks the models of an index for a question, by their weights alone: none is run, and no known result is used.

    Args:
        index: the models.
        encoder: what they were embedded with.
        question: what is wanted.
        k: models to find.
        options: how the Hub is reached.
        allow_pickle: read plain tensors from pickles where the model or the image encoder has no safetensors file.

    Raises:
        WeightspaceError: the question cannot be embedded, or the encoder is not the one of the index.
    """
    index.ensure_encoder(encoder)
    if question.model is not None:
        vector = _embedded_model(index, encoder, question.model, options, allow_pickle)
        itself = _itself(index, question.model, vector)
        excluded = itself if question.same_run else _of_their_runs(index, itself)
        scores, rows = index.rank(vector, k, excluded=excluded)
        return Answer(scores, rows, itself)
    wanted = () if question.result is None else parse_results(question.result)
    dataset = None
    if question.texts:
        dataset = described_dataset(encoder, question.texts, options, allow_pickle=allow_pickle)
    elif question.dataset is not None:
        dataset = dataset_for(encoder, question.dataset, options, allow_pickle=allow_pickle)
    return Answer(*index.rank(joint_query(encoder, dataset, wanted), k))


def _embedded_model(
    index: EmbeddingIndex, encoder: Encoder, model: str, options: HubOptions | None, allow_pickle: bool
) -> Float[np.ndarray, "size"]:
    known = np.flatnonzero(index.models["model_id"] == model)
    if len(known):
        return index.vectors[known[0]]
    try:
        checkpoint = open_checkpoint(model, options=options, allow_pickle=allow_pickle)
        embedding = encoder.embed_checkpoint(checkpoint).double().numpy()
    except WeightspaceError as error:
        raise type(error)(f"{error} (and no model of the index has this name)") from error
    length = float(np.linalg.norm(embedding))
    if not length or not np.isfinite(length):
        raise SettingsError(f"{model}: its embedding has no direction; search for another model")
    return (embedding / length).astype(np.float32)


def _itself(index: EmbeddingIndex, model: str, vector: Float[np.ndarray, "size"]) -> tuple[int, ...]:
    """Rows of the model: of its name, of its repository whatever the revision, or of its embedding."""
    found = (index.models["model_id"] == model).to_numpy() | (index.vectors @ vector >= _SAME)
    ref = parse_ref(model)
    for column in ("ref", "location"):
        if column in index.models:
            texts = index.models[column].astype(str)
            for row in np.flatnonzero(texts.str.startswith(ref.location)):
                found[row] |= _place(texts.iloc[row]) == (ref.location, ref.subfolder)
    return tuple(np.flatnonzero(found).tolist())


def _place(text: str) -> tuple[str, str | None] | None:
    try:
        ref = parse_ref(text)
    except WeightspaceError:
        return None
    return ref.location, ref.subfolder


def _of_their_runs(index: EmbeddingIndex, rows: Sequence[int]) -> tuple[int, ...]:
    if "run_id" not in index.models:
        return tuple(rows)
    runs = index.models["run_id"]
    of_runs = runs.isin(runs.iloc[list(rows)].dropna()).to_numpy()
    return tuple(sorted({*rows, *np.flatnonzero(of_runs).tolist()}))
