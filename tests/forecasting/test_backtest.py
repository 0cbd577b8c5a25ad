"""Forecasts from earlier origins, and pictures of forecasts: what they hold, by numbers that are known."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_rnn.forecasting.backtest import backtest
from hf_rnn.forecasting.output import ForecastOutput
from hf_rnn.forecasting.pictures import Forecast, Panel, draw_calibration, draw_forecasts

QUANTILES = [0.25, 0.5, 0.75]


class Naive:
    """Says the last value again, one less and one more, and keeps what it was told."""

    class config:
        quantiles = QUANTILES

    def predict(self, series, horizon, past_covariates=None, future_covariates=None, quantiles=None):
        self.told = series, past_covariates, future_covariates
        last = [np.full(horizon, x[-1]) for x in series]
        return ForecastOutput(mean_predictions=last, full_predictions=[np.stack([x - 1, x, x + 1], 1) for x in last])


def test_a_backtest_sees_only_what_lies_before():
    model, series = Naive(), [np.arange(10.0), np.arange(7.0) * 2]
    known = [np.arange(20).reshape(2, 10), np.arange(14).reshape(2, 7)]
    past = [x * -1.0 for x in series]
    found = backtest(model, series, 3, [2, 1], past, known)
    assert found.series.tolist() == [0, 0, 1] and found.starts.tolist() == [4, 7, 4]
    told = [[x.tolist() for x in part] for part in model.told]
    assert told[0] == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [0, 2, 4, 6]]
    assert told[1] == [[-x for x in row] for row in told[0]]
    assert [np.shape(x) for x in told[2]] == [(2, 7), (2, 10), (2, 7)] and told[2][0][1] == list(range(10, 17))
    assert found.values.tolist() == [[4, 5, 6], [7, 8, 9], [8, 10, 12]]
    assert found.predictions[0].tolist() == [[2, 3, 4]] * 3 and found.predictions[2, :, 1].tolist() == [6] * 3
    metrics = found.metrics()
    assert metrics["coverage_50"] == pytest.approx(2 / 9)
    assert metrics["mase"] == pytest.approx(2)  # errors of 1, 2, 3 steps, in steps
    assert found.metrics(season=2)["mase"] == pytest.approx(1)


@pytest.mark.parametrize(
    "origins, message",
    [
        (0, "origins: expected a number of forecasts for 1 series, got 0"),
        ([1, 1], "origins: expected a number of forecasts for 1 series"),
        (3, r"origins: expected values before the first of 3 forecasts of 2 steps, series\[0\] has 6 in all"),
    ],
)
def test_origins_that_are_none(origins, message):
    with pytest.raises(ValueError, match=message):
        backtest(Naive(), [np.arange(6.0)], 2, origins)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.mark.parametrize("dates", [True, False])
def test_picture_of_forecasts(tmp_path, drawn, dates):
    steps = np.arange(40)
    times = np.datetime64("2026-01-01") + steps if dates else steps
    quantiles = np.stack([steps - 2.0, steps - 1.0, steps * 1.0, steps + 1.0, steps + 2.0], 1)
    own = [Forecast(times[n : n + 5], steps[n : n + 5], quantiles[n : n + 5]) for n in (30, 35)]
    series = [Panel(f"series {n}", times, steps * 1.0, own) for n in range(11)]
    assert draw_forecasts(series, [0.1, 0.3, 0.5, 0.7, 0.9], tmp_path / "f.png", "sales", "day") == tmp_path / "f.png"
    (figure,) = drawn
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert len(figure.axes) == 9 and figure.get_supxlabel() == "day (9 of 11 series)"
    assert figure.get_supylabel() == "sales" and figure.axes[8].get_title() == "series 8"
    first = figure.axes[0]
    lines = {line.get_label(): line for line in first.lines}
    assert lines["values"].get_ydata().tolist() == list(range(15, 40))  # three horizons before the first forecast
    assert lines["median"].get_ydata().tolist() == list(range(30, 35))
    assert first.collections[0].get_label() == "quantiles 0.1 to 0.9" and len(first.collections) == 4
    outer, inner = (band.get_paths()[0].vertices[:, 1] for band in first.collections[:2])
    assert (outer.min(), outer.max()) == (28, 36) and (inner.min(), inner.max()) == (29, 35)


def test_picture_of_calibration(tmp_path, drawn):
    values = np.array([[1.0, 2.0, 3.0, np.nan], [4.0, 5.0, 6.0, 7.0]])
    predictions = np.broadcast_to([1.0, 4.5, 9.0], (2, 4, 3))
    draw_calibration(values, predictions, QUANTILES, tmp_path / "c.svg")
    line = drawn[0].axes[0].lines[1]
    assert list(line.get_xdata()) == QUANTILES and line.get_ydata() == pytest.approx([1 / 7, 4 / 7, 1])
    assert line.get_label() == "7 forecast values" and (tmp_path / "c.svg").exists()
