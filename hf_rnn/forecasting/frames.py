"""Forecasts of frames in the long format of the field: a row for each `unique_id` and time `ds`, the value in `y`.

pandas, polars, pyarrow and whatever else narwhals knows, and `datasets`.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy

ID = "unique_id"
TIME = "ds"
VALUE = "y"
FORECAST = "prediction"


class LongFrame(NamedTuple):
    """A frame's columns, cut into series in the order in which they first come.

    Attributes:
        ids: each series' id; [None] where there is no such column.
        times: each series' times, (T,) datetime64 or integers.
        values: of each column but these two, each series' (T,) in float64, NaN where missing.
    """

    ids: list[Any]
    times: list[numpy.ndarray]
    values: dict[str, list[numpy.ndarray]]


def needed(package: str) -> Any:
    """A package that frames are read by."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"series: frames need {package}; pip install 'hf-rnn[frames]'") from error


def is_frame(x: Any) -> bool:
    return hasattr(x, "columns") or hasattr(x, "column_names")


def forecast_frame(
    predict: Callable[..., Any],
    frame: Any,
    horizon: int,
    past_covariates: Sequence[str] | None,
    future_covariates: Any,
    quantiles: Sequence[float],
) -> Any:
    """Forecasts in a frame of the same kind, with `horizon` rows for each series.

    Args:
        predict: of lists of arrays, past covariates and future ones.
        frame: with `ds`, `y`, the columns of covariates and, where there are several series, `unique_id`. Times rise,
            each a step behind the one before it: an interval, or months, business days and others that pandas knows.
        past_covariates: names of columns.
        future_covariates: a frame of the `horizon` rows to come of each series, `y` left out: what is known of its
            other columns, which are also in `frame`.

    Returns:
        `unique_id`, `ds`, `prediction` (the median) and a column for each quantile, named by it.

    Raises:
        TypeError, ValueError: columns that are missing or no numbers; times that do not rise by one step; rows to come
            of other series or times.
    """
    names = [past_covariates] if isinstance(past_covariates, str) else list(past_covariates or [])
    future = None if future_covariates is None else read_frame("future_covariates", future_covariates)
    known = [] if future is None else list(future.values)
    read = read_frame("series", frame, [VALUE, *names, *known])
    coming = [_continue(times, horizon, one) for one, times in zip(read.ids, read.times, strict=True)]
    if future is not None:
        _check_future(read, future, coming)
    beforehand = [
        numpy.stack([numpy.concatenate([read.values[name][index], _of(future, one, name)]) for name in known])
        for index, one in enumerate(read.ids if future is not None and known else [])
    ]
    covariates = [numpy.stack([read.values[name][index] for name in names]) for index in range(len(read.ids)) if names]
    outputs = predict(read.values[VALUE], covariates or None, beforehand or None)
    columns: dict[str, Any] = {}
    if read.ids != [None]:
        columns[ID] = [one for one in read.ids for _ in range(horizon)]
    columns |= {TIME: numpy.concatenate(coming), FORECAST: numpy.concatenate(outputs.mean_predictions)}
    all_quantiles = numpy.concatenate(outputs.full_predictions)
    columns |= {f"{q:g}": all_quantiles[:, number] for number, q in enumerate(quantiles)}
    return _like(frame, columns)


def read_frame(name: str, frame: Any, wanted: Sequence[str] | None = None) -> LongFrame:
    """A frame's series; `wanted` columns, or all."""
    nw = needed("narwhals")

    if not is_frame(frame):
        raise TypeError(f"{name}: expected a frame beside a frame, got a {type(frame).__name__}")
    table = nw.from_native(_native(frame), eager_only=True)
    wanted = [c for c in table.columns if c not in (ID, TIME)] if wanted is None else wanted
    if missing := [column for column in (TIME, *wanted) if column not in table.columns]:
        raise ValueError(f"{name}: expected a column {missing[0]!r}, got {', '.join(map(str, table.columns))}")
    if not len(table):
        raise ValueError(f"{name}: expected rows, got none")
    rows: dict[Any, list[int]] = {}
    for number, one in enumerate(table[ID].to_list() if ID in table.columns else [None] * len(table)):
        rows.setdefault(one, []).append(number)
    if getattr(table[TIME].dtype, "time_zone", None):
        raise TypeError(f"{name}: {TIME}: expected times without a time zone, got {table[TIME].dtype}; take UTC's")
    times = numpy.asarray(table[TIME].to_list() if table[TIME].dtype == nw.Date else table[TIME].to_numpy())
    if times.dtype.kind not in "iuM":
        times = _datetimes(name, times)
    if times.dtype.kind == "M" and numpy.isnat(times).any():
        raise ValueError(f"{name}: {TIME}: expected a time in each row, got none in one")
    found: dict[str, list[numpy.ndarray]] = {}
    for column in wanted:
        if not (table[column].dtype.is_numeric() or table[column].dtype == nw.Boolean):
            raise TypeError(f"{name}: {column}: expected numbers, got {table[column].dtype}")
        values = table[column].cast(nw.Float64).to_numpy()
        found[column] = [values[index] for index in rows.values()]
    cut = [times[index] for index in rows.values()]
    for one, own in zip(rows, cut, strict=True):
        _check_rising(name, one, own)
    return LongFrame(list(rows), cut, found)


def _native(frame: Any) -> Any:
    """A `datasets.Dataset` as the table in it."""
    return frame.with_format("arrow")[:] if hasattr(frame, "with_format") else frame


def _like(frame: Any, columns: dict[str, Any]) -> Any:
    nw = needed("narwhals")

    made = nw.from_dict(columns, backend=nw.get_native_namespace(nw.from_native(_native(frame)))).to_native()
    return type(frame)(made) if hasattr(frame, "with_format") else made


def _datetimes(name: str, times: numpy.ndarray) -> numpy.ndarray:
    try:
        return times.astype("datetime64[us]")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: {TIME}: expected times or whole numbers, got {times.dtype} ({error})") from error


def _check_rising(name: str, one: Any, times: numpy.ndarray) -> None:
    ahead = numpy.diff(times)
    wrong = numpy.flatnonzero(ahead <= ahead.dtype.type(0))
    if len(wrong):
        first, second = times[wrong[0]], times[wrong[0] + 1]
        what = "twice" if first == second else f"and then {second}"
        raise ValueError(f"{name}: {TIME}: expected times that rise within each series, got {first} {what}, in {one!r}")


def _continue(times: numpy.ndarray, horizon: int, one: Any) -> numpy.ndarray:
    """The `horizon` times behind these."""
    ahead = numpy.diff(times)
    if times.dtype.kind == "M" and len(times) > 2:  # first, for two months may have as many days
        pandas = needed("pandas")
        with warnings.catch_warnings():  # it will be an offset, which serves as well
            warnings.simplefilter("ignore")
            step = pandas.infer_freq(pandas.DatetimeIndex(times))
        if step is not None:
            return pandas.date_range(times[-1], periods=horizon + 1, freq=step)[1:].to_numpy().astype(times.dtype)
    if len(ahead) and (ahead == ahead[0]).all():
        return times[-1] + ahead[0] * numpy.arange(1, horizon + 1)
    raise ValueError(
        f"series: {TIME}: expected one step between times, got several in {one!r}; add rows whose {VALUE} is missing"
        if len(ahead)
        else f"series: {TIME}: expected at least two times, by which a step is known, got one in {one!r}"
    )


def _check_future(read: LongFrame, future: LongFrame, coming: list[numpy.ndarray]) -> None:
    if unknown := [one for one in future.ids if one not in read.ids]:
        raise ValueError(f"future_covariates: {unknown[0]!r} is none of the series")
    for one, wanted in zip(read.ids, coming, strict=True):
        got = future.times[future.ids.index(one)] if one in future.ids else wanted[:0]
        if len(got) != len(wanted) or (got != wanted).any():
            raise ValueError(
                f"future_covariates: expected the {len(wanted)} times from {wanted[0]} to {wanted[-1]} of {one!r}, got "
                f"{f'{len(got)} from {got[0]} to {got[-1]}' if len(got) else 'none'}"
            )


def _of(frame: Any, one: Any, name: str) -> numpy.ndarray:
    return frame.values[name][frame.ids.index(one)]
