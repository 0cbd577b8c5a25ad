"""Synthetic series: of a seed and a number, of every kind, and what their equations say."""

import time

import numpy as np
import pytest

from hf_rnn.tasks import SyntheticSeries
from hf_rnn.tasks.series import SERIES_KINDS

COUNT = len(SERIES_KINDS)


def of_kind(kind: str, length: int = 400, count: int = 5, seed: int = 0) -> list[np.ndarray]:
    data = SyntheticSeries(length, seed=seed)
    first = list(SERIES_KINDS).index(kind)
    rows = [data[first + COUNT * n] for n in range(count)]
    assert {row["kind"] for row in rows} == {kind}
    return [row["values"] for row in rows]


@pytest.mark.parametrize("length", [2, 37, 300])
def test_every_kind(length):
    data = SyntheticSeries(length, size=2 * COUNT, seed=1)
    rows = [data[n] for n in range(len(data))]
    assert [row["kind"] for row in rows] == 2 * list(SERIES_KINDS)
    for row in rows:
        x = row["values"]
        assert x.shape == (length,) and x.dtype == np.float64 and np.isfinite(x).all()
        assert length < 37 or x.std() > 1e-3


def test_a_series_is_a_function_of_seed_and_number():
    one, other = SyntheticSeries(50, size=30, seed=3), SyntheticSeries(50, size=30, seed=4)
    for n in range(-COUNT, COUNT):
        assert np.array_equal(one[n]["values"], SyntheticSeries(50, size=30, seed=3)[n % 30]["values"])
        assert not np.array_equal(one[n]["values"], other[n]["values"])
    with pytest.raises(IndexError, match="30 rows, got 30"):
        one[30]


def test_chaos_follows_its_equations():
    for x in of_kind("logistic"):
        ratio = x[1:] / (x[:-1] * (1 - x[:-1]))
        assert np.allclose(ratio, ratio[0]) and 3.6 <= ratio[0] <= 4
    for x in of_kind("lorenz"):  # within the attractor, and moving between its wings or up and down
        assert np.abs(x).max() < 60 and x.std() > 5
    for x in of_kind("mackey_glass"):
        assert x.min() > 0.1 and x.max() < 1.6 and x.std() > 0.05


def test_lorenz_against_scipy():
    """From the same start: errors are a thousandth of its size, though they double each unit of time."""
    from scipy.integrate import solve_ivp

    class Fixed:
        """Random numbers that are known."""

        def uniform(self, low, high):
            return 0.02

        def standard_normal(self, size):
            return np.array([1.0, 2.0, 20.0])

        def integers(self, most):
            return 0

    def slope(_, p):
        x, y, z = p
        return [10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z]

    times = 0.02 * np.arange(1, 561)
    expected = solve_ivp(slope, (0, 11.3), [1.0, 2.0, 20.0], t_eval=times, rtol=1e-11, atol=1e-11).y[0]
    found = SERIES_KINDS["lorenz"](Fixed(), 60)
    assert np.abs(found - expected[500:]).max() < 0.02


def test_autoregression_is_stable_and_walks_are_not():
    for x in of_kind("autoregressive", 4000):
        first, last = x[:2000].std(), x[2000:].std()
        assert 0.3 < first / last < 3
    for x in of_kind("random_walk", 4000):
        assert 0.95 < np.diff(x).std() < 1.05


def test_counts_are_whole_and_steps_hold():
    assert all(np.array_equal(x, x.round()) and x.min() >= 0 for x in of_kind("counts"))
    for x in of_kind("steps"):
        assert np.median(np.abs(np.diff(x))) < 0.5 * x.std()


def test_seasons_come_back():
    """A season of whole steps explains most of what comes a period later."""
    found = of_kind("seasonal", 800, 12)
    best = [max(np.corrcoef(x[:-lag], x[lag:])[0, 1] for lag in range(3, 400)) for x in found]
    assert np.median(best) > 0.8


def test_they_are_quick():
    data, start = SyntheticSeries(256), time.perf_counter()
    for n in range(COUNT):
        data[n]
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name, value", [("length", 1), ("size", 0), ("seed", -1), ("length", 2.5), ("size", True)])
def test_bad_input(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a whole number of at least .*, got {value}"):
        SyntheticSeries(**{name: value})
