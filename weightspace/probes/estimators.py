"""Estimators of probes. What has to be chosen (penalty, boosting rounds) is chosen on the validation models.

``ESTIMATORS`` names them; another one is added to it, from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor

# Relative to a standardised feature's own variance.
PENALTIES = tuple(float(p) for p in np.logspace(-6, 4, 21))
_CHUNK_ENTRIES = 2**22


class RidgePath:
    """Ridge regression in float64 whose penalty is chosen on validation data, one for each target.

    With standardised features ``Z`` and centred targets ``y`` of ``n`` models, the coefficients minimise
    ``|y - Z c|^2 / n + penalty * |c|^2`` (Hoerl and Kennard, 1970). One eigendecomposition of ``Z^T Z / n``, or of
    ``Z Z^T / n`` where that is smaller, gives the coefficients of all penalties and targets; scikit-learn's ``RidgeCV``
    cannot choose on given validation data without fitting on it too. Constant features get coefficient zero. Features
    of new models are clipped to the range of the training models: a straight line says nothing beyond it, and one
    diverged model would otherwise outweigh a whole test set.

    Attributes:
        penalty_: the chosen penalty of each target.
        coef_: coefficients of the standardised features, ``(targets, features)``.
        intercept_: mean of the training targets.
    """

    def __init__(self, penalties: Sequence[float] = PENALTIES) -> None:
        """Takes the positive penalties to choose from."""
        self.penalties = np.asarray(penalties, dtype=np.float64)

    def fit(
        self,
        x: Float[np.ndarray, "train features"],
        y: Float[np.ndarray, "train targets"],
        x_validation: Float[np.ndarray, "validation features"],
        y_validation: Float[np.ndarray, "validation targets"],
    ) -> RidgePath:
        """Fits the path on ``x, y`` and keeps the penalty with the least squared validation error."""
        self._low, self._high, self._mean = x.min(axis=0), x.max(axis=0), x.mean(axis=0, dtype=np.float64)
        self._inverse_scale = np.ones(x.shape[1])
        scale = np.sqrt(sum(np.square(part).sum(axis=0) for part in self._standardised(x)) / len(x))
        # Rounding gives a constant feature a standard deviation just off zero.
        floor = 10 * np.finfo(x.dtype).eps * np.maximum(np.abs(self._low), np.abs(self._high))
        self._inverse_scale = np.divide(1, scale, out=np.zeros_like(scale), where=scale > floor)
        self.intercept_ = y.mean(axis=0)
        eigenvalues, basis, projected = self._decompose(x, y - self.intercept_)
        shrunk = projected / (eigenvalues[:, None] + self.penalties[:, None, None])  # (penalties, rank, targets)
        codes = np.concatenate([part @ basis for part in self._standardised(x_validation)])
        held_out = y_validation - self.intercept_
        best = np.stack([np.square(held_out - codes @ one).mean(axis=0) for one in shrunk]).argmin(axis=0)
        self.penalty_ = self.penalties[best]
        self.coef_ = (basis @ shrunk[best, :, np.arange(y.shape[1])].T).T
        return self

    def predict(self, x: Float[np.ndarray, "models features"]) -> Float[np.ndarray, "models targets"]:
        """Predicts all targets."""
        predicted: np.ndarray = (
            np.concatenate([part @ self.coef_.T for part in self._standardised(x)]) + self.intercept_
        )
        return predicted

    def _standardised(self, x: np.ndarray) -> Iterator[Float[np.ndarray, "chunk features"]]:
        step = max(1, _CHUNK_ENTRIES // x.shape[1])
        for begin in range(0, len(x), step):
            part = np.clip(x[begin : begin + step], self._low, self._high).astype(np.float64)
            yield (part - self._mean) * self._inverse_scale

    def _decompose(self, x: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns eigenvalues, basis and projection: the coefficients are ``basis @ (projection / (values + p))``."""
        models, features = x.shape
        if features <= models:
            gram, against, begin = np.zeros((features, features)), np.zeros((features, targets.shape[1])), 0
            for part in self._standardised(x):
                gram += part.T @ part
                against += part.T @ targets[begin : begin + len(part)]
                begin += len(part)
            values, vectors = np.linalg.eigh(gram / models)
            return np.maximum(values, 0), vectors, vectors.T @ against / models
        whole = np.concatenate(list(self._standardised(x)))
        values, vectors = np.linalg.eigh(whole @ whole.T / models)
        return np.maximum(values, 0), whole.T @ vectors, vectors.T @ targets / models


@dataclass(frozen=True)
class ProbeData:
    """What an estimator is fitted on: ``widths`` are the columns of each target, one each if there are none."""

    features: Float[np.ndarray, "train features"]
    targets: Float[np.ndarray, "train targets"]
    validation_features: Float[np.ndarray, "validation features"]
    validation_targets: Float[np.ndarray, "validation targets"]
    widths: tuple[int, ...] = ()


Predictor = Callable[[Float[np.ndarray, "models features"]], Float[np.ndarray, "models targets"]]


def _ridge(data: ProbeData, seed: int) -> Predictor:
    return RidgePath().fit(data.features, data.targets, data.validation_features, data.validation_targets).predict


def _boosting(data: ProbeData, seed: int) -> Predictor:
    def fit(target: int) -> HistGradientBoostingRegressor:
        estimator = HistGradientBoostingRegressor(
            max_iter=200,
            learning_rate=0.1,
            max_leaf_nodes=15,
            early_stopping=True,
            n_iter_no_change=10,
            random_state=seed,
        )
        validation = {"X_val": data.validation_features, "y_val": data.validation_targets[:, target]}
        return estimator.fit(data.features, data.targets[:, target], **validation)

    fitted = [fit(target) for target in range(data.targets.shape[1])]
    return lambda features: np.stack([estimator.predict(features) for estimator in fitted], axis=1)


def _extra_trees(data: ProbeData, seed: int) -> Predictor:
    def fit(columns: Float[np.ndarray, "train columns"]) -> ExtraTreesRegressor:
        estimator = ExtraTreesRegressor(100, max_features=0.33, min_samples_leaf=3, n_jobs=-1, random_state=seed)
        estimator.fit(data.features, columns if columns.shape[1] > 1 else columns[:, 0])
        # Threads add up the trees in any order, which changes the last bits of a prediction from call to call.
        return estimator.set_params(n_jobs=1)

    ends = np.cumsum(data.widths or (1,) * data.targets.shape[1])
    fitted = [fit(columns) for columns in np.split(data.targets, ends[:-1], axis=1)]
    return lambda features: np.hstack([estimator.predict(features).reshape(len(features), -1) for estimator in fitted])


ESTIMATORS: dict[str, Callable[[ProbeData, int], Predictor]] = {
    "ridge": _ridge,
    "boosting": _boosting,
    "extra-trees": _extra_trees,
}
# Trees on raw weights or linear codes cost most and say least, so these get ridge alone.
STANDARD_ESTIMATORS: dict[str, tuple[str, ...]] = {
    "s(W)": ("ridge", "boosting"),
    "s(W)+invariants": ("ridge", "extra-trees"),
    "autoencoder": ("ridge", "boosting", "extra-trees"),
    "joint": ("ridge", "boosting", "extra-trees"),
}
