"""What a joint model finds on models that it was not trained on: datasets, weights and results by each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from weightspace.data.features import features_of_datasets
from weightspace.data.image_encoders import open_image_encoder
from weightspace.encoder import Encoder, embed_dataset, embed_zoo
from weightspace.models.joint.modeling_joint import JointModel, unit
from weightspace.stats.resampling import Estimate
from weightspace.stats.retrieval import Retrieval, result_correlation, retrieval, same_identity
from weightspace.training.run import TrainingRecord
from weightspace.zoo.dataset import Zoo

_RESULT = "test_accuracy"
_QUERIES = 40  # accuracies that are asked for, at equally spaced quantiles of those that there are
_FIRST = 10  # models an accuracy, but no more than a tenth of all: all of them would answer every question alike


@dataclass(frozen=True)
class RetrievalRow:
    """What a joint model finds on test models.

    Attributes:
        pair: what is asked and what is found, e.g. ``"D → W"``.
        question: the same in words.
        measure: name of the number.
        value: the number.
        low: lower end of its 95 % interval.
        high: upper end.
        chance: what answers at random give.
        queries: number of questions.
        candidates: number of possible answers.
    """

    pair: str
    question: str
    measure: str
    value: float
    low: float
    high: float
    chance: float
    queries: int
    candidates: int


def retrieval_table(zoo: Zoo, encoder: Encoder, training: TrainingRecord) -> list[RetrievalRow]:
    """Measures what is found among the models of the test runs, of datasets that were trained on.

    Questions that the model was not trained to answer, or that have no right answer, are left out.

    Args:
        zoo: the zoo that the joint model was trained on.
        encoder: the joint model.
        training: its training record, which names the test runs.
    """
    model, index = encoder.model, zoo.index
    assert isinstance(model, JointModel)
    held_out = index["dataset"].isin(training.held_out_datasets)
    rows = np.flatnonzero(index["run_id"].isin(training.test_runs) & ~held_out)
    if not len(rows):
        return []
    weights = F.normalize(torch.from_numpy(embed_zoo(encoder, zoo, rows)), dim=-1)
    _, runs = np.unique(index["run_id"].to_numpy()[rows], return_inverse=True)
    table = []
    known = sorted(set(index["dataset"][~held_out].dropna()) - set(training.extras["datasets_left_out"]))
    if "dataset_weight" in model.config.pairs and known:
        trained_on = index["dataset"].to_numpy()[rows].tolist()
        table += _by_dataset(model, known, weights, trained_on, runs)
    if "weight_result" in model.config.pairs and _RESULT in model.result_model.config.results and _RESULT in index:
        table += _by_result(model, weights, index[_RESULT].to_numpy(dtype=np.float64)[rows], runs)
    return table


def _by_dataset(
    model: JointModel,
    known: list[str],
    weights: Float[Tensor, "models size"],
    trained_on: list[Any],
    runs: Int[np.ndarray, "models"],
) -> list[RetrievalRow]:
    tower = model.dataset_model.config
    assert tower.image_encoder is not None
    seen = features_of_datasets(known, open_image_encoder(tower.image_encoder), images=tower.sample)
    similarity = (torch.cat([embed_dataset(model, dataset) for dataset in seen]) @ weights.T).numpy()
    place = {name: number for number, name in enumerate(known)}
    datasets, own = np.arange(len(known)), np.array([place.get(name, -1) for name in trained_on])
    generator = np.random.default_rng(0)
    models = retrieval(similarity, same_identity(datasets, own), generator, candidate_runs=runs, cutoffs=(1,))
    found = retrieval(similarity.T, same_identity(own, datasets), generator, query_runs=runs, cutoffs=(1,))
    return [
        *_first_is_right("D → W", "for a dataset, a model that was trained on it", models),
        *_first_is_right("W → D", "for a model, the dataset that it was trained on", found),
    ]


def _first_is_right(pair: str, question: str, measured: Retrieval | None) -> list[RetrievalRow]:
    if measured is None:
        return []
    estimate = measured.recall[1]
    return [_row(pair, question, "R@1", estimate, estimate.null_mean or 0.0, measured.queries, measured.candidates)]


def _by_result(
    model: JointModel,
    weights: Float[Tensor, "models size"],
    accuracies: Float[np.ndarray, "models"],
    runs: Int[np.ndarray, "models"],
) -> list[RetrievalRow]:
    known = accuracies[np.isfinite(accuracies)]
    if not len(known):
        return []
    wanted = np.quantile(known, np.linspace(0.02, 0.98, _QUERIES))
    names = model.result_model.config.results
    results = torch.full((len(wanted), len(names)), torch.nan)
    results[:, names.index(_RESULT)] = torch.from_numpy(wanted)
    with torch.no_grad():
        similarity = (unit(model.get_result_features(results)) @ weights.T).numpy()
    generator, first = np.random.default_rng(0), max(1, min(_FIRST, len(known) // 10))
    found = result_correlation(similarity, wanted, accuracies, generator, candidate_runs=runs, first=first)
    question = f"for a test accuracy, the mean accuracy of the first {first}"
    return [] if found is None else [_row("R → W", question, "Spearman", found, 0.0, len(wanted), len(known))]


def _row(
    pair: str, question: str, measure: str, estimate: Estimate, chance: float, queries: int, candidates: int
) -> RetrievalRow:
    return RetrievalRow(
        pair, question, measure, estimate.value, estimate.low, estimate.high, chance, queries, candidates
    )
