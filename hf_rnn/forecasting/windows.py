"""What a forecaster is trained on and tested on: pieces of series, and what came after them.

A row is `past_values` (t,), of any length, and `future_values` (horizon,), float32, NaN where a value is missing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

Window = dict[str, Tensor]


class SeriesSplit(NamedTuple):
    """What `split_series` makes.

    Attributes:
        train: of each series what lies before its held-out end, float64 arrays.
        validation, test: rows, all series' at the first held-out place, then all series' at the next one.
    """

    train: list[numpy.ndarray]
    validation: list[Window]
    test: list[Window]


class ForecastWindows(Dataset[Window]):
    """A map-style data set of random windows of series, without end but for its `size`.

    Row i is a function of (seed, i): workers, shuffling and an exact resume need nothing else. A series is drawn, then
    the step at which its past ends, each as likely: any that leaves `prediction_length` steps behind it. Where a series
    has no such step its past ends anywhere and NaN, of which a loss knows nothing, stands where the series is over.

    Args:
        series: arrays or tensors (T,), of any lengths, NaN where missing.
        context_length: steps of the past at most; the first steps of a series have fewer before them.
        prediction_length: steps to predict.
        size: number of rows; they cost nothing until they are asked for.
        seed: other rows for another seed.
        weights: how often each series is drawn, numbers that need not add up to 1; None: each as often, long or short.
        min_past: values, not missing, that a past has at least: of fewer nothing is known of a series' scale.

    Raises:
        TypeError, ValueError: an argument of another type, shape or value, or a series that has no window, named in
            the message.
    """

    def __init__(
        self,
        series: Sequence[Any],
        context_length: int,
        prediction_length: int,
        size: int = 2**20,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        min_past: int = 16,
    ):
        least = dict(context_length=1, prediction_length=1, size=1, seed=0, min_past=1)
        given = (context_length, prediction_length, size, seed, min_past)
        for (name, lowest), value in zip(least.items(), given, strict=True):
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name}: expected a whole number of at least {lowest}, got {value!r}")
        self.series = _read_all(series)
        self.context_length, self.prediction_length, self.size, self.seed = given[:4]
        self.ends = [_ends(x, context_length, prediction_length, min_past) for x in self.series]
        if without := [n for n, ends in enumerate(self.ends) if not len(ends)]:
            values = int((~numpy.isnan(self.series[without[0]])).sum())
            raise ValueError(
                f"series[{without[0]}]: expected a step with at least {min_past} values before it and one behind it, "
                f"got {values} values in all; leave it out or lower min_past"
            )
        weight = numpy.ones(len(self.series)) if weights is None else numpy.asarray(weights, numpy.float64)
        if weight.shape != (len(self.series),) or not (weight >= 0).all() or not 0 < weight.sum() < numpy.inf:
            raise ValueError(f"weights: expected {len(self.series)} numbers, none below 0, not all 0, got {weights}")
        self.cumulative = numpy.cumsum(weight) / weight.sum()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Window:
        if not -self.size <= index < self.size:
            raise IndexError(f"index: expected one of {self.size} rows, got {index}")
        random = numpy.random.default_rng([self.seed, index % self.size])
        chosen = numpy.searchsorted(self.cumulative, random.random(), side="right")
        end = int(random.choice(self.ends[chosen]))
        return _row(self.series[chosen], end, self.context_length, self.prediction_length)


def split_series(series: Sequence[Any], horizon: int, validation: int = 1, test: int = 1) -> SeriesSplit:
    """Hold out the last horizon * (validation + test) steps of each series.

    What comes in validation and test is in no training series, and tests' are in no validation. The past of a row is
    all of the series before it, so of tests also what validation had to predict.

    Args:
        series: arrays or tensors (T,), of any lengths, NaN where missing.
        horizon: steps of each held-out piece.
        validation, test: pieces of each series.

    Raises:
        TypeError, ValueError: an argument of another type, shape or value; a series that is too short.
    """
    for name, value, lowest in (("horizon", horizon, 1), ("validation", validation, 0), ("test", test, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(f"{name}: expected a whole number of at least {lowest}, got {value!r}")
    arrays, held = _read_all(series), validation + test
    if short := [n for n, x in enumerate(arrays) if len(x) <= horizon * held]:
        raise ValueError(
            f"series[{short[0]}]: expected more than the {horizon * held} steps to hold out, "
            f"got {len(arrays[short[0]])}"
        )
    rows = [_row(x, len(x) - horizon * piece, len(x), horizon) for piece in range(held, 0, -1) for x in arrays]
    first = validation * len(arrays)
    return SeriesSplit([x[: len(x) - horizon * held] for x in arrays], rows[:first], rows[first:])


def pad_past(rows: Sequence[Window]) -> Window:
    """A batch of rows, as a `data_collator`: `past_values` (B, T) with NaN in front of shorter ones, `future_values`
    (B, horizon)."""
    longest = max(len(row["past_values"]) for row in rows)
    pasts = [F.pad(row["past_values"], (longest - len(row["past_values"]), 0), value=torch.nan) for row in rows]
    return {"past_values": torch.stack(pasts), "future_values": torch.stack([row["future_values"] for row in rows])}


def _row(x: numpy.ndarray, end: int, context_length: int, horizon: int) -> Window:
    past, future = (torch.from_numpy(part.astype(numpy.float32)) for part in (x[:end], x[end : end + horizon]))
    return {
        "past_values": past[-context_length:],
        "future_values": F.pad(future, (0, horizon - len(future)), value=torch.nan),
    }


def _ends(x: numpy.ndarray, context_length: int, horizon: int, min_past: int) -> numpy.ndarray:
    """The steps at which a past may end."""
    count = numpy.concatenate([[0], numpy.cumsum(~numpy.isnan(x))])  # of values that are there, before each step
    end = numpy.arange(1, len(x))
    past = count[end] - count[numpy.maximum(end - context_length, 0)]
    future = count[numpy.minimum(end + horizon, len(x))] - count[end]
    good = (past >= min_past) & (future >= 1)
    whole = good & (end <= len(x) - horizon)
    return end[whole if whole.any() else good]


def _read_all(series: Sequence[Any]) -> list[numpy.ndarray]:
    if not isinstance(series, list | tuple) or not len(series):
        raise TypeError(f"series: expected a list of arrays (T,), got {type(series).__name__} of {len(series)}")
    found = []
    for number, one in enumerate(series):
        if not isinstance(one, Tensor | numpy.ndarray):
            raise TypeError(f"series[{number}]: expected a tensor or a numpy array, got a {type(one).__name__}")
        x = numpy.asarray(one.detach().cpu() if isinstance(one, Tensor) else one, numpy.float64)
        if x.ndim != 1 or not len(x):
            raise ValueError(f"series[{number}]: expected (T,), got {x.shape}")
        if numpy.isinf(x).any():
            raise ValueError(
                f"series[{number}]: expected finite values, or NaN, got infinity at {numpy.isinf(x).argmax()}"
            )
        found.append(x)
    return found
