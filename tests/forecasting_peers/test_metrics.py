"""Measures of forecasts against utilsforecast's, which statsforecast brings along."""

import numpy
import pandas
import pytest
from utilsforecast import losses

from hf_rnn.forecasting.metrics import coverage, mase, smape, wql

QUANTILES = [0.1, 0.5, 0.9]


def test_against_utilsforecast():
    random = numpy.random.default_rng(0)
    rows, horizon, season = 5, 8, 4
    y, f = random.normal(3, 2, (rows, horizon)), numpy.sort(random.normal(3, 2, (rows, horizon, 3)))
    pasts = [random.normal(size=20 + n) for n in range(rows)]
    ids = numpy.repeat(numpy.arange(rows), horizon)
    columns = {f"q{n}": f[..., n].ravel() for n in range(3)}
    frame = pandas.DataFrame(
        {"unique_id": ids, "ds": numpy.tile(numpy.arange(horizon), rows), "y": y.ravel(), **columns}
    )
    training = pandas.concat(
        pandas.DataFrame({"unique_id": n, "ds": numpy.arange(len(x)), "y": x}) for n, x in enumerate(pasts)
    )
    assert mase(f[..., 1], y, pasts, season) == pytest.approx(losses.mase(frame, ["q1"], season, training)["q1"])
    theirs = losses.smape(frame, ["q1"])["q1"].mean()  # half of ours: |y - f| / (|y| + |f|)
    assert smape(f[..., 1], y) == pytest.approx(2 * theirs)
    several = {"model": list(columns)}
    pinball = losses.mqloss(frame, several, numpy.array(QUANTILES))["model"].mean()
    assert wql(f, y, QUANTILES) == pytest.approx(2 * pinball / numpy.abs(y).mean())
    inside = frame.rename(columns={"q1": "m", "q0": "m-lo-80", "q2": "m-hi-80"})
    assert coverage(f, y, QUANTILES)[0.8] == pytest.approx(losses.coverage(inside, ["m"], 80)["m"].mean())
