from __future__ import annotations

import numpy as np
import pytest

from weightspace.report import plots


def test_neighbours_stay_neighbours_on_the_map() -> None:
    rng = np.random.default_rng(0)
    cluster = np.arange(120) % 4
    points = plots.place_models(rng.normal(size=(4, 16))[cluster] * 5 + rng.normal(size=(120, 16)) * 0.3)
    assert points.method == "PCA, then t-SNE"
    away = np.linalg.norm(points.places[:, None] - points.places, axis=-1) + np.eye(120) * 1e9
    assert (cluster[away.argmin(axis=1)] == cluster).mean() > 0.95


def test_a_large_zoo_is_drawn_by_a_fixed_choice() -> None:
    embeddings = np.random.default_rng(0).normal(size=(90, 5))
    first, second = (plots.place_models(embeddings, limit=40) for _ in range(2))
    assert len(first.rows) == 40 and (np.diff(first.rows) > 0).all()
    assert (first.rows == second.rows).all() and (first.places == second.places).all()


@pytest.mark.parametrize(
    ("embeddings", "method"),
    [
        (np.random.default_rng(0).normal(size=(5, 3)), "PCA"),
        (np.ones((20, 3)), "nothing to place: all embeddings are equal"),
        (np.random.default_rng(0).normal(size=(1, 3)), "nothing to place: all embeddings are equal"),
        (np.full((4, 3), np.nan), "nothing to place: all embeddings are equal"),
    ],
)
def test_few_or_equal_models_are_placed_as_far_as_possible(embeddings: np.ndarray, method: str) -> None:
    points = plots.place_models(embeddings)
    assert points.method == method
    assert points.places.shape == (len(points.rows), 2) and np.isfinite(points.places).all()


def test_many_points_become_one_picture() -> None:
    true = np.linspace(0, 1, plots.MAX_VECTOR_POINTS + 1)
    many, _ = plots.predicted_true(true, true, "many", "many")
    few, _ = plots.predicted_true(true[:50], true[:50], "few", "few")
    assert "data:image/png" in many and many.count("<use") < 50
    assert "data:image/png" not in few and few.count("<use") >= 50


def test_labels_and_ids_are_safe() -> None:
    svg = plots.curves({"loss": ([0, 1], [1.0, 0.5])}, "one", '"><script>')
    assert "<script" not in svg and 'aria-label="&quot;&gt;&lt;script&gt;"' in svg
    assert all(part.startswith("one-") for part in svg.split(' id="')[1:])
