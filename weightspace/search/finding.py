"""Finds models of a zoo or an index by a dataset, wanted results or a related model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from weightspace.encoder import Encoder, embed, load_encoder
from weightspace.errors import SettingsError, WeightspaceError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.hub import HubOptions
from weightspace.io.locations import parse_ref
from weightspace.search.index import EmbeddingIndex, is_index
from weightspace.search.queries import dataset_for, described_dataset, joint_query, parse_results
from weightspace.zoo.dataset import load_zoo

# Cosine of embeddings in float32 from which on a model counts as a copy.
_SAME = 1 - 1e-6


@dataclass(frozen=True)
class Query:
    """What is searched for: models related to a model, or trained on a dataset, or with wanted results, or both.

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
class SearchResult:
    """Found models, best first.

    Attributes:
        scores: nats for datasets and results (see `joint_query`), cosines for a model.
        rows: rows of the index.
        itself: rows that are the model whose relatives are wanted, or copies of it.
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
    """Opens an index with its encoder, or embeds models and builds their index.

    Args:
        location: an index, a zoo, or checkpoints, on disk or, but for an index, on the Hub.
        encoder: folder or ``org/name`` of the encoder; an index remembers its own.
        options: how the Hub is reached.
        allow_pickle: also read plain tensors from pickled checkpoints.

    Raises:
        WeightspaceError: the location or the encoder cannot be opened, or the encoder is not the one of the index.
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
        return EmbeddingIndex.from_zoo(load_zoo(location).usable(), loaded), loaded
    frame = embed([str(location)], loaded, options=options, allow_pickle=allow_pickle)
    return EmbeddingIndex.from_frame(frame, loaded), loaded


def find_models(
    index: EmbeddingIndex,
    encoder: Encoder,
    query: Query,
    k: int = 10,
    options: HubOptions | None = None,
    *,
    allow_pickle: bool = False,
) -> SearchResult:
    """Ranks the models of an index by their weights alone: none is run, and no known result is used.

    Args:
        index: the models.
        encoder: the encoder that they were embedded with.
        query: what is wanted.
        k: models to find.
        options: how the Hub is reached.
        allow_pickle: read plain tensors from pickles where the model or the image encoder has no safetensors file.

    Raises:
        WeightspaceError: the query cannot be embedded, or the encoder is not the one of the index.
    """
    index.ensure_encoder(encoder)
    if query.model is not None:
        vector = _embedded_model(index, encoder, query.model, options, allow_pickle)
        itself = _itself(index, query.model, vector)
        excluded = itself if query.same_run else _of_their_runs(index, itself)
        scores, rows = index.rank(vector, k, excluded=excluded)
        return SearchResult(scores, rows, itself)
    wanted = () if query.result is None else parse_results(query.result)
    dataset = None
    if query.texts:
        dataset = described_dataset(encoder, query.texts, options, allow_pickle=allow_pickle)
    elif query.dataset is not None:
        dataset = dataset_for(encoder, query.dataset, options, allow_pickle=allow_pickle)
    return SearchResult(*index.rank(joint_query(encoder, dataset, wanted), k))


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
    """Rows of the model: of its name, of its repository at any revision, or of its embedding."""
    found = (index.models["model_id"] == model).to_numpy() | (index.vectors @ vector >= _SAME)
    ref = parse_ref(model)
    for column in ("ref", "location"):
        if column in index.models:
            texts = index.models[column].astype(str)
            for row in np.flatnonzero(texts.str.startswith(ref.location)):
                with suppress(WeightspaceError):
                    found[row] |= replace(parse_ref(texts.iloc[row]), revision=None) == replace(ref, revision=None)
    return tuple(np.flatnonzero(found).tolist())


def _of_their_runs(index: EmbeddingIndex, rows: Sequence[int]) -> tuple[int, ...]:
    """The rows, and all others of their runs."""
    if "run_id" not in index.models:
        return tuple(rows)
    runs = index.models["run_id"]
    of_runs = runs.isin(runs.iloc[list(rows)].dropna()).to_numpy()
    return tuple(sorted({*rows, *np.flatnonzero(of_runs).tolist()}))
