"""Embeddings of models: made with a trained encoder, kept as a table, and searched."""

from __future__ import annotations

from weightspace.index.embedding import Encoder, embed, embed_zoo, load_encoder, save_embeddings
from weightspace.index.finding import Answer, Question, find_models, open_index
from weightspace.index.queries import dataset_for, described_dataset, joint_query
from weightspace.index.results import WantedResult, parse_results
from weightspace.index.search import EXACT_UP_TO, EmbeddingIndex

__all__ = [
    "EXACT_UP_TO",
    "Answer",
    "EmbeddingIndex",
    "Encoder",
    "Question",
    "WantedResult",
    "dataset_for",
    "described_dataset",
    "embed",
    "embed_zoo",
    "find_models",
    "joint_query",
    "load_encoder",
    "open_index",
    "parse_results",
    "save_embeddings",
]
