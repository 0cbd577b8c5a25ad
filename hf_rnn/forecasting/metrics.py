"""How good forecasts are, in the measures of the field: numpy arrays, missing values left out.

Shapes: R series, `horizon` steps, Q quantiles; y are the values that came, f the forecasts.
"""

from collections.abc import Sequence
from typing import Any

import numpy

from hf_rnn.forecasting.quantiles import check_quantiles, is_symmetric


def mase(predictions: Any, values: Any, past_values: Sequence[Any], season: int | Sequence[int] = 1) -> numpy.ndarray:
    """Mean absolute scaled error of each series (Hyndman and Koehler, 2006, "Another look at measures of forecast
    accuracy"): mean |y - f| over mean |y_t - y_(t - m)| of its past, the error of the seasonal naive forecast there.

    Less than 1 is better than that forecast was. The M4 competition and GluonTS take the mean over series.

    Args:
        predictions: f, (R, horizon), medians.
        values: y, (R, horizon), NaN where missing.
        past_values: of each series its past (T,), of any length, NaN where missing.
        season: m, steps of a season, of all series or of each.

    Returns:
        (R,) float64; NaN where no value came, or where the past says nothing of the scale: no two values a season
        apart, or none that differ.

    Raises:
        ValueError: other shapes, or a season below 1.
    """
    f, y = _checked(predictions, values, dims=2)
    seasons = [season] * len(y) if isinstance(season, int) else list(season)
    for name, given in (("past_values", past_values), ("season", seasons)):
        if len(given) != len(y):
            raise ValueError(f"{name}: expected one for each of {len(y)} series, got {len(given)}")
    scales = numpy.full(len(y), numpy.nan)
    for row, (past, m) in enumerate(zip(past_values, seasons, strict=True)):
        x = numpy.asarray(past, numpy.float64)
        if x.ndim != 1:
            raise ValueError(f"past_values[{row}]: expected (T,), got {x.shape}")
        if m < 1:
            raise ValueError(f"season: expected at least 1 step, got {m}")
        scales[row] = _mean(numpy.abs(x[m:] - x[:-m]))
    errors = numpy.array([_mean(row) for row in numpy.abs(y - f)])
    return errors / numpy.where(scales > 0, scales, numpy.nan)


def wql(predictions: Any, values: Any, quantiles: Sequence[float]) -> float:
    """Weighted quantile loss of all series together, the mean over quantiles q of
    2 sum max(q (y - f_q), (q - 1) (y - f_q)) / sum |y| (GluonTS' `mean_weighted_sum_quantile_loss`; Park et al., 2022).

    The continuous ranked probability score is twice the integral of the quantile loss over q from 0 to 1 (Gneiting and
    Ranjan, 2011). Its mean over quantiles that lie evenly, 0.1 to 0.9 say, stands for the integral: then this is the
    sum of the CRPS over the sum of |y|, without the outermost tails. Series of large values count for more.

    Args:
        predictions: f, (R, horizon, Q).
        values: y, (R, horizon), NaN where missing.
        quantiles: Q numbers between 0 and 1 that rise.

    Returns:
        A number; NaN where all values that came are 0, or none came.

    Raises:
        ValueError: other shapes or quantiles.
    """
    f, y = _checked(predictions, values, dims=3, quantiles=quantiles)
    q, error = numpy.asarray(quantiles), y[..., None] - f
    size = numpy.nansum(numpy.abs(y))
    losses = 2 * numpy.nansum(numpy.maximum(q * error, (q - 1) * error), (0, 1))
    return float(losses.mean() / size) if size else float("nan")


def smape(predictions: Any, values: Any) -> float:
    """Symmetric mean absolute percentage error, mean 2 |y - f| / (|y| + |f|), from 0 to 2, of all values (GluonTS; the
    M4 competition, Makridakis et al., 2020, gives it in percent, 100 times as much). 0 where y and f are.

    Args:
        predictions: f, (R, horizon), medians.
        values: y, (R, horizon), NaN where missing.

    Returns:
        A number; NaN where no value came.

    Raises:
        ValueError: other shapes.
    """
    f, y = _checked(predictions, values, dims=2)
    size = numpy.abs(y) + numpy.abs(f)
    return _mean(2 * numpy.abs(y - f) / numpy.where(size == 0, 1.0, size))


def coverage(predictions: Any, values: Any, quantiles: Sequence[float]) -> dict[float, float]:
    """The share of values inside each central interval, which is 1 - 2 q of them between the quantiles q and 1 - q of a
    calibrated forecast (GluonTS' `Coverage` is of single quantiles).

    Args:
        predictions: (R, horizon, Q).
        values: (R, horizon), NaN where missing.
        quantiles: Q numbers between 0 and 1 that rise, with each q also 1 - q.

    Returns:
        1 - 2 q, to two digits, to the share, from the widest interval to the narrowest; NaN where no value came.

    Raises:
        ValueError: other shapes or quantiles.
    """
    f, y = _checked(predictions, values, dims=3, quantiles=quantiles)
    if not is_symmetric(quantiles):
        raise ValueError(f"quantiles: expected with each q also 1 - q, got {list(quantiles)}")
    shares = {}
    for low in range(len(quantiles) // 2):
        inside = (f[..., low] <= y) & (y <= f[..., -1 - low])
        shares[round(1 - 2 * quantiles[low], 2)] = _mean(numpy.where(numpy.isnan(y), numpy.nan, inside))
    return shares


def forecast_metrics(
    predictions: Any,
    values: Any,
    quantiles: Sequence[float],
    past_values: Sequence[Any] | None = None,
    season: int | Sequence[int] = 1,
) -> dict[str, float]:
    """All of them: `wql`, `smape`, `coverage_80` and so on where there are such intervals, and, where the past is
    given, `mase`, the mean over series that have one.

    With a Trainer: `compute_metrics=lambda p: forecast_metrics(p.predictions[1], p.label_ids, config.quantiles)`.

    Args:
        predictions: (R, horizon, Q); the quantile in the middle is the forecast.
        values, quantiles, past_values, season: see `wql` and `mase`.
    """
    f, y = _checked(predictions, values, dims=3, quantiles=quantiles)
    median = f[..., len(quantiles) // 2]
    found = {"wql": wql(f, y, quantiles), "smape": smape(median, y)}
    if is_symmetric(quantiles):
        found |= {f"coverage_{100 * level:.0f}": share for level, share in coverage(f, y, quantiles).items()}
    if past_values is not None:
        found["mase"] = _mean(mase(median, y, past_values, season))
    return found


def _checked(
    predictions: Any, values: Any, dims: int, quantiles: Sequence[float] | None = None
) -> tuple[numpy.ndarray, numpy.ndarray]:
    f, y = numpy.asarray(predictions, numpy.float64), numpy.asarray(values, numpy.float64)
    if y.ndim != 2:
        raise ValueError(f"values: expected (R, horizon), got {y.shape}")
    expected = y.shape
    if quantiles is not None:
        check_quantiles(quantiles)
        expected = (*y.shape, len(quantiles))
    if f.ndim != dims or f.shape != expected:
        raise ValueError(f"predictions: expected {expected} beside values {y.shape}, got {f.shape}")
    if numpy.isnan(f).any():
        raise ValueError("predictions: expected numbers, got NaN")
    return f, y


def _mean(x: numpy.ndarray) -> float:
    """Of what is there; NaN where nothing is."""
    there = x[~numpy.isnan(x)]
    return float(there.mean()) if len(there) else float("nan")
