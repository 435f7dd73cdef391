from __future__ import annotations

import math

import numpy as np
import pytest

from weightspace.errors import SettingsError
from weightspace.search.queries import WantedResult, parse_results, values_of

EDGES = np.array([[0.0, 0.5, 0.8, 0.9, 1.0], [0.0, 1.0, 1.0, 1.0, 2.0]])
NAMES = ("test_accuracy", "step")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (">=0.9", [WantedResult("test_accuracy", low=0.9)]),
        ("<0.5", [WantedResult("test_accuracy", high=0.5)]),
        ("0.8..0.9", [WantedResult("test_accuracy", 0.8, 0.9)]),
        ("0.95", [WantedResult("test_accuracy", 0.95, 0.95)]),
        ("test_loss<0.3", [WantedResult("test_loss", high=0.3)]),
        (" test_loss = .1 .. 2e-1 ", [WantedResult("test_loss", 0.1, 0.2)]),
        ("generalization_gap>-0.1", [WantedResult("generalization_gap", low=-0.1)]),
        ("step=-1..2", [WantedResult("step", -1.0, 2.0)]),
        (
            "test_accuracy>=0.9,generalization_gap<0.1",
            [WantedResult("test_accuracy", low=0.9), WantedResult("generalization_gap", high=0.1)],
        ),
    ],
)
def test_wishes(text: str, expected: list[WantedResult]) -> None:
    assert list(parse_results(text)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is no wanted result; write e.g."),
        (">=90%", "'>=90%' is no wanted result"),
        (">=0.9,", "'' is no wanted result"),
        ("test_loss", "'test_loss' is no wanted result"),
        ("test_loss0.3", "'test_loss0.3' is no wanted result"),
        ("test_loss 0.3", "is no wanted result"),
        ("==1", "is no wanted result"),
        ("nan", "is no wanted result"),
        ("1e999", "too large a number"),
        ("0.9..0.8", "empty range; write the smaller number first"),
        ("step>1,step<2", "wants step twice; write a range"),
        ("\x1b[2J", "'\\x1b[2J' is no wanted result"),
        (">=" + "0" * 2000, "2,002 characters are too many"),
    ],
)
def test_what_is_no_wish_is_named(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse_results(text)
    assert words in str(error.value)


class TestValues:
    def test_a_range_becomes_the_middles_of_the_bins_it_covers(self) -> None:
        np.testing.assert_allclose(values_of(WantedResult("test_accuracy", low=0.5), NAMES, EDGES), [0.65, 0.85, 0.95])
        np.testing.assert_allclose(values_of(WantedResult("test_accuracy", 0.0, 0.8), NAMES, EDGES), [0.25, 0.65])

    def test_a_part_of_a_bin_becomes_its_middle_and_a_value_itself(self) -> None:
        np.testing.assert_allclose(values_of(WantedResult("test_accuracy", 0.85, 0.87), NAMES, EDGES), [0.86])
        np.testing.assert_allclose(values_of(WantedResult("test_accuracy", 0.5, 0.5), NAMES, EDGES), [0.5])

    def test_values_are_as_likely_as_each_other_among_the_models(self) -> None:
        models = np.random.default_rng(0).beta(8, 2, 20_000)
        edges = np.quantile(models, np.linspace(0, 1, 13))[None]
        within = np.sort(models[models >= 0.85])
        values = values_of(WantedResult("test_accuracy", low=0.85), NAMES[:1], edges)
        cuts = (np.arange(len(values)) + 0.5) / len(values)
        np.testing.assert_allclose(values, np.quantile(within, cuts), atol=0.01)

    def test_a_value_that_many_models_share(self) -> None:
        np.testing.assert_allclose(values_of(WantedResult("step", 1.0, 1.0), NAMES, EDGES), [1.0, 1.0])
        np.testing.assert_allclose(values_of(WantedResult("step", low=1.0), NAMES, EDGES), [1.0, 1.0, 1.5])
        np.testing.assert_allclose(values_of(WantedResult("step", high=1.0), NAMES, EDGES), [0.5, 1.0, 1.0])

    def test_bounds_beyond_the_edges_are_cut_off(self) -> None:
        everything = values_of(WantedResult("test_accuracy"), NAMES, EDGES)
        np.testing.assert_allclose(values_of(WantedResult("test_accuracy", -5.0, 7.0), NAMES, EDGES), everything)
        assert len(everything) == 4

    @pytest.mark.parametrize("bounds", [{"low": 1.1}, {"high": -1.0}])
    def test_what_no_model_had_is_refused(self, bounds: dict[str, float]) -> None:
        with pytest.raises(SettingsError, match=r"test_accuracy: wanted from .* knows models with 0 to 1 only"):
            values_of(WantedResult("test_accuracy", **bounds), NAMES, EDGES)

    def test_an_unknown_result_names_the_known_ones(self) -> None:
        with pytest.raises(SettingsError, match=r"'f1': the joint model knows test_accuracy, step; choose"):
            values_of(WantedResult("f1", low=0.0), NAMES, EDGES)

    def test_unbounded_is_no_bound(self) -> None:
        assert WantedResult("step") == WantedResult("step", -math.inf, math.inf)
