"""What determines the weights: the share of an embedding's variance that goes with each factor of the experiment.

The embedding is decomposed by a linear model on the levels of all factors, summed over its columns. For Euclidean
distances that is permutational multivariate analysis of variance (Anderson, 2001). Sums of squares are of type II
(Yates, 1934): a factor gets what it adds to all the others, so that nothing is counted twice where a grid was drawn at
random and is not quite balanced; interactions get what they add to all the factors.

A share is omega squared (Hays, 1963), ``(SS - df * MSE) / (SS_total + MSE)``. Unlike R squared it is zero on average
for a factor that does nothing, however many levels it has, and it can therefore be slightly negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from weightspace.errors import ZooError
from weightspace.stats.resampling import Estimate, estimated, permutation_p, run_weights, with_interval

MIN_FREE = 10
"""Degrees of freedom that must be left to tell noise from factors."""

JOINT = " + "
"""Between the names of factors that cannot be separated."""

# Share of a factor's direction that the others must leave free; with less, they cannot be separated.
_LEAST_FREE = 0.05
_TOLERANCE = 1e-9

Part = Literal["factor", "interactions", "together", "shared", "residual"]
Kind = Literal["data", "training", "architecture"]


@dataclass(frozen=True, eq=False)
class Factor:
    """Something that differs between runs.

    Attributes:
        name: of a data characteristic or a hyper-parameter, or ``"architecture"``.
        kind: what it belongs to.
        codes: number of each run's level.
        levels: the levels, as text.
        in_dataset: whether the dataset's id says it.
    """

    name: str
    kind: Kind
    codes: Int[np.ndarray, "runs"]
    levels: tuple[str, ...]
    in_dataset: bool = False


@dataclass(frozen=True)
class VarianceShare:
    """The part that something has in an embedding's variance.

    Attributes:
        name: of a factor, of factors that cannot be separated (``"a + b"``), or of several factors.
        kind: ``"data"``, ``"training"`` or ``"architecture"``; ``"mixed"`` for several of them; empty for what is left.
        part: ``"factor"``; ``"interactions"`` of factors; ``"together"`` for all factors of a kind with their
            interactions; ``"shared"`` for what the factors explain and none of them can claim (negative where they
            hide each other); ``"residual"``.
        df: degrees of freedom.
        share: omega squared; not tested for ``"shared"`` and ``"residual"``.
    """

    name: str
    kind: str
    part: Part
    df: int
    share: Estimate


def variance_shares(
    values: Float[np.ndarray, "runs dims"],
    factors: Sequence[Factor],
    generator: np.random.Generator,
    draws: int = 1000,
) -> list[VarianceShare]:
    """Decomposes the variance of embeddings over the factors of an experiment.

    Factors that cannot be separated, because one follows from the others in all but a few runs, become one. With the
    factors go two groups of interactions where there are enough runs for them: those of the characteristics that a
    dataset's id names, which together say all that is particular to a dataset, and those of the architecture with
    every other factor.

    Intervals are those of the Bayesian bootstrap over runs. For the tests, the residuals of the whole model are
    permuted over runs and the pseudo-F statistics compared (ter Braak, 1992).

    Args:
        values: embeddings, one row a run, their columns in comparable units: every column counts by its variance.
        factors: at least one, each with two or more levels.
        generator: draws permutations and weights.
        draws: number of permutations and of bootstrap replicates.

    Returns:
        Factors in the order given, interactions, sums over the factors of a kind, what is shared, and the residual.

    Raises:
        ZooError: there are too few runs for so many factors, or the embeddings do not vary.
    """
    matrix, terms = _design(factors)
    runs, columns = matrix.shape
    if runs - columns < MIN_FREE:
        raise ZooError(
            f"{runs} runs are too few for factors of {columns - 1} degrees of freedom; "
            f"give {columns + MIN_FREE} or more"
        )
    if np.square(values - values.mean(axis=0)).sum() <= _TOLERANCE * runs:
        raise ZooError(f"the embeddings of all {runs} runs are equal: there is no variance to explain")
    plain = _Regression(matrix, terms, np.ones(runs))
    shares, ratios = plain.shares(values)
    replicates = np.array(
        [_Regression(matrix, terms, run_weights(runs, generator)).shares(values)[0] for _ in range(draws)]
    )
    residuals = values - plain.fitted(values)
    null = [plain.shares(residuals[generator.permutation(runs)]) for _ in range(draws)]
    null_shares, null_ratios = (np.array(side) for side in zip(*null, strict=True))
    rows = []
    for number, term in enumerate(terms[:-1]):
        share = estimated(shares[number], replicates[:, number], null_shares[:, number])
        share = replace(share, p_value=permutation_p(ratios[number], null_ratios[:, number]))
        rows.append(VarianceShare(term.name, term.kind, term.part, len(term.columns), share))
    single = [number for number, term in enumerate(terms) if term.part in ("factor", "interactions")]
    if len(single) > 1:
        spread = replicates[:, -1] - replicates[:, single].sum(axis=1)
        shared = with_interval(shares[-1] - shares[single].sum(), spread)
        rows.append(VarianceShare("shared", "", "shared", 0, shared))
    residual = with_interval(1 - shares[-1], 1 - replicates[:, -1])
    return [*rows, VarianceShare("residual", "", "residual", runs - columns, residual)]


# --- the design ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Block:
    """One factor, or several that cannot be separated: an orthonormal basis of its levels' indicators, centred."""

    factors: tuple[Factor, ...]
    basis: Float[np.ndarray, "runs df"]

    @property
    def kind(self) -> str:
        kinds = {factor.kind for factor in self.factors}
        return kinds.pop() if len(kinds) == 1 else "mixed"


@dataclass(frozen=True, eq=False)
class _Term:
    """Columns of the design with a name; ``peers`` leading columns make the model that they are compared in."""

    name: str
    kind: str
    part: Part
    columns: Int[np.ndarray, "own"]
    peers: int


def _design(factors: Sequence[Factor]) -> tuple[Float[np.ndarray, "runs columns"], list[_Term]]:
    """Lays out the constant, the factors and their interactions; the last term is the whole model."""
    blocks = _joined([_Block((factor,), _basis(_indicators(factor.codes))) for factor in factors])
    matrix = np.hstack([np.ones((len(factors[0].codes), 1)), *(block.basis for block in blocks)])
    mains = matrix.shape[1]
    groups: list[tuple[str, str, np.ndarray]] = []
    for name, kind, products in _interactions(blocks):
        added = _basis(_orthogonal(products, matrix), _LEAST_FREE)
        if added.shape[1] and len(matrix) - matrix.shape[1] - added.shape[1] >= MIN_FREE:
            groups.append((name, kind, np.arange(matrix.shape[1], matrix.shape[1] + added.shape[1])))
            matrix = np.hstack([matrix, added])
    whole = matrix.shape[1]
    ends = 1 + np.cumsum([0, *(block.basis.shape[1] for block in blocks)])
    terms = [
        _Term(JOINT.join(factor.name for factor in block.factors), block.kind, "factor", np.arange(*own), mains)
        for block, own in zip(blocks, pairwise(ends), strict=True)
    ]
    terms += [_Term(name, kind, "interactions", columns, whole) for name, kind, columns in groups]
    for kind in ("data", "training"):
        members = [term.columns for term in terms if term.kind == kind]
        if len(members) > 1:
            terms.append(_Term(f"all of {kind}", kind, "together", np.concatenate(members), whole))
    return matrix, [*terms, _Term("", "", "residual", np.arange(1, whole), whole)]


def _indicators(codes: np.ndarray) -> np.ndarray:
    member = (codes[:, None] == np.arange(codes.max() + 1)).astype(np.float64)
    return member - member.mean(axis=0)


def _basis(columns: np.ndarray, least: float = 0.0) -> np.ndarray:
    """Orthonormal basis of the columns' span; directions of a squared singular value up to ``least`` are left out."""
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    limit = max(np.sqrt(least), 1e-7 * max(singular, default=0.0))
    return left[:, singular > limit]


def _orthogonal(columns: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What of ``columns`` lies outside the span of ``others``."""
    basis = _basis(others)
    return columns - basis @ (basis.T @ columns)


def _free(columns: np.ndarray, others: Sequence[np.ndarray]) -> float:
    """Least share that a direction of the orthonormal ``columns`` has outside the span of ``others``."""
    outside = _orthogonal(columns, np.hstack(others)) if others else columns
    return float(np.linalg.svd(outside, compute_uv=False).min() ** 2)


def _joined(blocks: list[_Block]) -> list[_Block]:
    """Joins blocks until each has all its directions to itself."""
    while True:
        for block in blocks:
            others = [other for other in blocks if other is not block]
            if _free(block.basis, [other.basis for other in others]) < _LEAST_FREE:
                break
        else:
            return blocks
        closest = blocks.index(min(others, key=lambda other: _free(block.basis, [other.basis])))
        first, second = sorted((blocks.index(block), closest))
        basis = _basis(np.hstack([blocks[first].basis, blocks[second].basis]))
        blocks[first] = _Block((*blocks[first].factors, *blocks[second].factors), basis)
        del blocks[second]


def _interactions(blocks: Sequence[_Block]) -> Iterator[tuple[str, str, np.ndarray]]:
    named = [factor.codes for block in blocks for factor in block.factors if factor.in_dataset]
    if len(named) > 1:
        _, datasets = np.unique(np.stack(named), axis=1, return_inverse=True)
        yield "data x data", "data", _basis(_indicators(datasets))
    own = [block.basis for block in blocks if block.kind == "architecture"]
    rest = [block.basis for block in blocks if block.kind != "architecture"]
    if own and rest:
        products = (own[0][:, :, None] * np.hstack(rest)[:, None, :]).reshape(len(own[0]), -1)
        yield "architecture x others", "mixed", _basis(products)


# --- sums of squares -------------------------------------------------------------------------------------------------


class _Regression:
    """The normal equations of weighted runs, solved for any number of embeddings."""

    def __init__(
        self, matrix: Float[np.ndarray, "runs columns"], terms: Sequence[_Term], weights: Float[np.ndarray, "runs"]
    ) -> None:
        self._matrix, self._terms, self._weights = matrix, terms, weights
        self._weighted = matrix * weights[:, None]
        gram = matrix.T @ self._weighted
        self._inverses = {peers: np.linalg.inv(gram[:peers, :peers]) for peers in {term.peers for term in terms}}
        self._inner = [np.linalg.inv(self._inverses[t.peers][np.ix_(t.columns, t.columns)]) for t in terms]

    def fitted(self, values: Float[np.ndarray, "runs dims"]) -> Float[np.ndarray, "runs dims"]:
        """Returns what the whole model predicts."""
        return self._matrix @ (self._inverses[self._matrix.shape[1]] @ (self._weighted.T @ values))

    def shares(
        self, values: Float[np.ndarray, "runs dims"]
    ) -> tuple[Float[np.ndarray, "terms"], Float[np.ndarray, "terms"]]:
        """Computes omega squared and pseudo-F of each term, over all columns together.

        The sum of squares of a term is ``tr(b^T C^-1 b)`` with its coefficients ``b`` and its part ``C`` of the
        inverse.
        """
        moments = self._weighted.T @ values
        solved = {peers: inverse @ moments[:peers] for peers, inverse in self._inverses.items()}
        coefficients = [solved[term.peers][term.columns] for term in self._terms]
        sums = np.array([np.sum(b * (inner @ b)) for b, inner in zip(coefficients, self._inner, strict=True)])
        total = float(self._weights @ np.square(values).sum(axis=1) - np.square(moments[0]).sum() / self._weights.sum())
        df = np.array([len(term.columns) for term in self._terms])
        mean_square = max(0.0, total - sums[-1]) / (len(values) - df[-1] - 1)
        ratios: np.ndarray = sums / df / max(mean_square, np.finfo(float).tiny)
        return (sums - df * mean_square) / (total + mean_square), ratios
