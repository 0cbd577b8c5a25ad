"""What a model would have forecast from earlier origins, beside what came."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from hf_rnn.forecasting.metrics import forecast_metrics


class Backtest(NamedTuple):
    """Forecasts of N windows, those of each series from the earliest origin to the latest.

    Attributes:
        series: (N,), which series a window is of.
        starts: (N,), the step that is forecast first.
        past_values: of each window what lies before it, (start,).
        values: (N, horizon), what came, NaN where missing.
        predictions: (N, horizon, Q).
        quantiles: Q numbers.
    """

    series: numpy.ndarray
    starts: numpy.ndarray
    past_values: list[numpy.ndarray]
    values: numpy.ndarray
    predictions: numpy.ndarray
    quantiles: list[float]

    def metrics(self, season: int = 1) -> dict[str, float]:
        """WQL, sMAPE, MASE and the coverage of intervals, see `hf_rnn.forecasting.metrics.forecast_metrics`.

        Args:
            season: steps of a season, whose naive forecast is what MASE compares with.
        """
        return forecast_metrics(self.predictions, self.values, self.quantiles, self.past_values, season)


def backtest(
    model: Any,
    series: Sequence[numpy.ndarray],
    horizon: int,
    origins: int | Sequence[int] = 1,
    past_covariates: Sequence[numpy.ndarray] | None = None,
    future_covariates: Sequence[numpy.ndarray] | None = None,
    quantiles: Sequence[float] | None = None,
    **options: Any,
) -> Backtest:
    """Forecast the last `origins` pieces of `horizon` steps of each series, each from all that lies before it.

    Args:
        model: with `predict`.
        series: (T,) each, of any lengths, NaN where missing.
        horizon: steps of a forecast, and from one origin to the next.
        origins: how many forecasts of all series, or of each.
        past_covariates, future_covariates: (T,) or (C, T) of each series; both of what has been.
        quantiles: which to give; None: the model's own.
        options: of `predict`.

    Raises:
        ValueError: no origin at all, or a series that is too short for its origins.
    """
    counts = [origins] * len(series) if isinstance(origins, int) else list(origins)
    if len(counts) != len(series) or min(counts, default=0) < 0 or not sum(counts):
        raise ValueError(f"origins: expected a number of forecasts for {len(series)} series, got {origins}")
    windows = []
    for number, (x, count) in enumerate(zip(series, counts, strict=True)):
        if len(x) <= count * horizon:
            raise ValueError(
                f"origins: expected values before the first of {count} forecasts of {horizon} steps, "
                f"series[{number}] has {len(x)} in all"
            )
        windows += [(number, len(x) - horizon * piece) for piece in range(count, 0, -1)]
    past, future = (
        None if given is None else [given[number][..., : start + more] for number, start in windows]
        for given, more in ((past_covariates, 0), (future_covariates, horizon))
    )
    pasts = [numpy.asarray(series[number][:start], numpy.float64) for number, start in windows]
    found = model.predict(pasts, horizon, past, future, quantiles, **options)
    return Backtest(
        numpy.array([number for number, _ in windows]),
        numpy.array([start for _, start in windows]),
        pasts,
        numpy.stack([series[number][start : start + horizon] for number, start in windows]),
        numpy.stack(found.full_predictions),
        list(model.config.quantiles if quantiles is None else quantiles),
    )
