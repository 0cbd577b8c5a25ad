"""Measures of forecasts by hand, against the same written with loops, and against scores of distributions."""

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_rnn.forecasting.metrics import coverage, forecast_metrics, mase, smape, wql

NAN = float("nan")
DECILES = [n / 10 for n in range(1, 10)]


def test_by_hand():
    past = [[1.0, 3.0, 2.0, 6.0], [10.0, NAN, 14.0, 20.0]]
    y, f = [[8.0, 4.0], [20.0, NAN]], [[6.0, 5.0], [17.0, 99.0]]
    # one step apart: |2|, |-1|, |4|, mean 7 / 3; 6; errors 1.5 and 3
    assert mase(f, y, past) == pytest.approx([1.5 / (7 / 3), 3 / 6])
    # two apart: |1|, |3|; |4|
    assert mase(f, y, past, season=2) == pytest.approx([1.5 / 2, 3 / 4])
    assert mase(f, y, past, season=[2, 1]) == pytest.approx([1.5 / 2, 3 / 6])
    assert smape(f, y) == pytest.approx((2 * 2 / 14 + 2 * 1 / 9 + 2 * 3 / 37) / 3)
    quantiles = [0.2, 0.5, 0.8]
    predictions = [[[5.0, 6.0, 9.0], [5.0, 5.0, 6.0]], [[1.0, 17.0, 19.0], [0.0, 0.0, 0.0]]]
    # 0.2: 0.2 * 3 + 0.8 * 1 + 0.2 * 19; 0.5: (2 + 1 + 3) / 2; 0.8: 0.2 * 1 + 0.2 * 2 + 0.8 * 1; twice, over 32
    assert wql(predictions, y, quantiles) == pytest.approx(2 * (5.2 + 3.0 + 1.4) / 3 / 32)
    assert coverage(predictions, y, quantiles) == {0.6: pytest.approx(1 / 3)}  # 8 in [5, 9]
    found = forecast_metrics(predictions, y, quantiles, past)
    assert set(found) == {"wql", "smape", "mase", "coverage_60"}
    assert found["mase"] == pytest.approx(mase(f, y, past).mean()) and found["smape"] == pytest.approx(smape(f, y))


@given(
    rows=st.integers(1, 4), horizon=st.integers(1, 5), seed=st.integers(0, 99), missing=st.floats(0, 0.6),
    quantiles=st.sampled_from([[0.5], DECILES, [0.05, 0.3, 0.7, 0.95]]), season=st.integers(1, 3),
)  # fmt: skip
def test_against_loops(rows, horizon, seed, missing, quantiles, season):
    random = numpy.random.default_rng(seed)
    y, f = random.normal(size=(rows, horizon)), random.normal(size=(rows, horizon, len(quantiles)))
    y[random.random(y.shape) < missing] = NAN
    pasts = [random.normal(size=random.integers(1, 9)) for _ in range(rows)]
    total, size, ratios, inside, scaled = 0.0, 0.0, [], [], []
    for r in range(rows):
        errors = []
        for t in range(horizon):
            if math.isnan(y[r, t]):
                continue
            size += abs(y[r, t])
            for q, p in zip(quantiles, f[r, t], strict=True):
                total += 2 * (q * (y[r, t] - p) if y[r, t] > p else (1 - q) * (p - y[r, t])) / len(quantiles)
            middle = f[r, t, len(quantiles) // 2]
            errors.append(abs(y[r, t] - middle))
            ratios.append(200 * abs(y[r, t] - middle) / (abs(y[r, t]) + abs(middle)))  # as M4 does, in percent
            inside.append(f[r, t, 0] <= y[r, t] <= f[r, t, -1])
        naive = [abs(pasts[r][t] - pasts[r][t - season]) for t in range(season, len(pasts[r]))]
        scaled.append(numpy.mean(errors) / numpy.mean(naive) if errors and naive else NAN)
    median = f[..., len(quantiles) // 2]
    assert wql(f, y, quantiles) == pytest.approx(total / size if size else NAN, nan_ok=True)
    assert 100 * smape(median, y) == pytest.approx(numpy.mean(ratios) if ratios else NAN, nan_ok=True)
    assert mase(median, y, pasts, season) == pytest.approx(scaled, nan_ok=True)
    if len(quantiles) > 1:
        widest = next(iter(coverage(f, y, quantiles).values()))
        assert widest == pytest.approx(numpy.mean(inside) if inside else NAN, nan_ok=True)


def test_many_quantiles_are_the_crps():
    """Of a normal distribution, whose CRPS Gneiting and Raftery (2007) give in closed form."""
    from scipy.stats import norm

    quantiles = [(n + 0.5) / 2000 for n in range(2000)]
    y = numpy.array([[0.3, -1.2, 2.5]])
    mean, deviation = 0.5, 1.7
    z = (y - mean) / deviation
    crps = deviation * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi))
    predictions = numpy.broadcast_to(norm.ppf(quantiles, mean, deviation), (1, 3, 2000))
    assert wql(predictions, y, quantiles) == pytest.approx(crps.sum() / numpy.abs(y).sum(), rel=1e-4)


def test_calibrated_forecasts_cover_what_they_say():
    from scipy.stats import norm

    y = numpy.random.default_rng(0).normal(size=(100, 500))
    shares = coverage(numpy.broadcast_to(norm.ppf(DECILES), (100, 500, 9)), y, DECILES)
    assert list(shares) == [0.8, 0.6, 0.4, 0.2] and all(abs(a - b) < 0.01 for a, b in shares.items())


def test_what_nothing_is_known_of():
    y, f = numpy.full((1, 2), NAN), numpy.zeros((1, 2))
    assert math.isnan(smape(f, y)) and math.isnan(wql(f[..., None], y, [0.5])) and math.isnan(mase(f, y, [[1, 2]])[0])
    assert math.isnan(mase(f, f, [[3.0, 3.0, 3.0]])[0]) and math.isnan(mase(f, f, [[3.0]])[0])  # constant, short
    assert smape(f, f) == 0 and math.isnan(wql(f[..., None], f, [0.5]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: smape([[1.0]], [1.0]), r"values: expected \(R, horizon\), got \(1,\)"),
        (lambda: smape([[1.0]], [[1.0, 2.0]]), r"predictions: expected \(1, 2\) beside values \(1, 2\), got \(1, 1\)"),
        (lambda: smape([[NAN]], [[1.0]]), "predictions: expected numbers, got NaN"),
        (lambda: wql([[1.0]], [[1.0]], [0.5]), r"predictions: expected \(1, 1, 1\)"),
        (lambda: wql([[[1.0, 2.0]]], [[1.0]], [0.5, 0.1]), "quantiles: expected numbers between 0 and 1 that rise"),
        (lambda: coverage([[[1.0, 2.0]]], [[1.0]], [0.1, 0.8]), "quantiles: expected with each q also 1 - q"),
        (lambda: mase([[1.0]], [[1.0]], []), "past_values: expected one for each of 1 series, got 0"),
        (lambda: mase([[1.0]], [[1.0]], [[[1.0]]]), r"past_values\[0\]: expected \(T,\), got \(1, 1\)"),
        (lambda: mase([[1.0]], [[1.0]], [[1.0]], 0), "season: expected at least 1 step, got 0"),
        (lambda: mase([[1.0]], [[1.0]], [[1.0]], [1, 2]), "season: expected one for each of 1 series, got 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
