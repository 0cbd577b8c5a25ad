"""`hf-rnn forecast DATA --model CHECKPOINT --horizon 48`: forecast the series of a table, and draw them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from hf_rnn.cli.device import add_device, find_device
from hf_rnn.cli.plot import check_picture
from hf_rnn.cli.series import Columns, cut_series, load_forecaster, panels, read_table
from hf_rnn.forecasting.backtest import Backtest, backtest
from hf_rnn.forecasting.frames import FORECAST, ID, TIME, VALUE, LongFrame
from hf_rnn.forecasting.pictures import Forecast, draw_calibration, draw_forecasts

_MEASURES = {"mase": "MASE", "wql": "WQL", "smape": "sMAPE", "coverage_80": "inside the 80% interval"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn forecast", description=__doc__)
    parser.add_argument("data", help="a csv or parquet file, a row for each series and time")
    parser.add_argument("--model", required=True, help="a forecaster's folder, or its name on the Hub")
    parser.add_argument("--horizon", type=int, help="steps to forecast; default: as many as the model was trained for")
    parser.add_argument("--output", default="forecast.csv", metavar="FILE", help="table to write, as .csv")
    parser.add_argument(
        "--picture", metavar="FILE", help=".png, .svg or .pdf; default: beside the table; 'none': no picture"
    )
    parser.add_argument("--quantiles", help="such as 0.1,0.5,0.9; default: all that the model has")
    parser.add_argument("--past_covariates", help="columns known up to now, separated by commas")
    parser.add_argument(
        "--future_covariates", metavar="FILE", help="table of the columns that are known for the steps to forecast"
    )
    parser.add_argument(
        "--id_column", default=ID, help="column that names the series of a row; not needed with a single series"
    )
    parser.add_argument("--time_column", default=TIME)
    parser.add_argument("--value_column", default=VALUE)
    parser.add_argument(
        "--backtest",
        type=int,
        default=0,
        metavar="N",
        help="also forecast the last N known horizons, and measure the errors",
    )
    parser.add_argument("--season", type=int, default=1, help="steps of a season, to scale MASE")
    parser.add_argument("--batch_size", type=int, default=256, help="series in a batch")
    add_device(parser)
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    if output.suffix != ".csv" or not output.absolute().parent.is_dir():
        raise ValueError(f"output: expected a .csv in an existing folder, got {output}")
    picture = output.with_suffix(".png") if arguments.picture is None else Path(arguments.picture)
    if arguments.picture != "none":
        check_picture(picture, "picture")
    if arguments.backtest < 0:
        raise ValueError(f"backtest: expected a number of horizons, got {arguments.backtest}")
    quantiles = _quantiles(arguments.quantiles)
    past = arguments.past_covariates.split(",") if arguments.past_covariates else []
    columns = Columns(arguments.id_column, arguments.time_column, arguments.value_column)
    frame, future, known = read_table("data", arguments.data, columns), None, []
    if arguments.future_covariates is not None:
        future = read_table("future_covariates", arguments.future_covariates, columns._replace(value=VALUE))
        future = future.drop(columns=VALUE, errors="ignore")  # nothing is known of it, if a file has it
        known = list(cut_series("future_covariates", future).values)
    read = cut_series("data", frame, [VALUE, *past, *known])
    model = load_forecaster(arguments.model).to(find_device(arguments.device))
    horizon = model.config.prediction_length if arguments.horizon is None else arguments.horizon
    options = dict(quantiles=quantiles, batch_size=arguments.batch_size, progress=True)
    quantiles = quantiles or list(model.config.quantiles)

    found = model.predict(frame, horizon, past or None, future, **options)
    own = {ID: columns.id, TIME: columns.time}
    found.rename(columns=own).to_csv(output, index=False, float_format="%.9g")
    print(f"{len(read.ids)} series, {horizon} steps each: {output}")
    if arguments.picture != "none":
        forecasts = [[one] for one in ahead(cut_series("forecast", found), [f"{q:g}" for q in quantiles])]
        if draw_forecasts(panels(read, forecasts), quantiles, picture, columns.value, columns.time):
            print(f"picture: {picture}")
    if not arguments.backtest:
        return
    covariates = [side_by_side(read, names) for names in (past, known)]
    tested = backtest(model, read.values[VALUE], horizon, arguments.backtest, *covariates, **options)  # type: ignore[arg-type]
    metrics = tested.metrics(arguments.season)
    print("backtest: " + ", ".join(f"{name} {metrics[key]:.3f}" for key, name in _MEASURES.items() if key in metrics))
    if arguments.picture != "none":
        over, below = (picture.with_stem(f"{picture.stem}-{name}") for name in ("backtest", "calibration"))
        draw_backtest(tested, read, over, below, columns)


def ahead(found: LongFrame, names: Sequence[str]) -> list[Forecast]:
    """The forecast of each series."""
    quantiles = [numpy.stack(parts, 1) for parts in zip(*(found.values[name] for name in names), strict=True)]
    return [Forecast(*parts) for parts in zip(found.times, found.values[FORECAST], quantiles, strict=True)]


def side_by_side(read: LongFrame, names: Sequence[str]) -> list[numpy.ndarray] | None:
    """Columns of each series, (C, T); None where there are none."""
    if not names:
        return None
    return [numpy.stack(parts) for parts in zip(*(read.values[name] for name in names), strict=True)]


def draw_backtest(tested: Backtest, read: LongFrame, over: Path, below: Path, columns: Columns) -> None:
    """Forecasts over what came, and the calibration of their quantiles."""
    forecasts: list[list[Any]] = [[] for _ in read.ids]
    for number, start, predictions in zip(tested.series, tested.starts, tested.predictions, strict=True):
        times = read.times[number][start : start + len(predictions)]
        median = predictions[:, predictions.shape[1] // 2]
        forecasts[number].append(Forecast(times, median, predictions))
    if draw_forecasts(panels(read, forecasts), tested.quantiles, over, columns.value, columns.time):
        draw_calibration(tested.values, tested.predictions, tested.quantiles, below)
        print(f"pictures: {over}, {below}")


def _quantiles(told: str | None) -> list[float] | None:
    try:
        return [float(x) for x in told.split(",")] if told else None
    except ValueError:
        raise ValueError(f"quantiles: expected numbers separated by commas, got {told!r}") from None
