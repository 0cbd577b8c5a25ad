"""`hf-rnn forecast FILE --model CHECKPOINT`: what comes next in the series of a file, as a file and as a picture."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from hf_rnn.cli.device import add_device, find_device
from hf_rnn.cli.plot import check_picture
from hf_rnn.cli.series import Columns, cut_series, load_forecaster, panels, read_series_file
from hf_rnn.forecasting.backtest import Backtest, backtest
from hf_rnn.forecasting.frames import FORECAST, ID, TIME, VALUE, LongFrame
from hf_rnn.forecasting.pictures import Forecast, draw_calibration, draw_forecasts


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn forecast", description=__doc__)
    parser.add_argument("data", help="a .csv or .parquet file, a row for each time of each series")
    parser.add_argument("--model", required=True, help="a forecaster's folder, or its name on the Hub")
    parser.add_argument("--horizon", type=int, help="steps to forecast; default: as many as the model was made for")
    parser.add_argument("--output", default="forecast.csv", help="a .csv file; default: forecast.csv")
    parser.add_argument("--picture", help="a .png, .svg or .pdf; default: beside the output")
    parser.add_argument("--quantiles", type=float, nargs="+", help="default: the model's own")
    parser.add_argument("--past_covariates", nargs="+", metavar="COLUMN", help="columns known until now")
    parser.add_argument(
        "--future_covariates", metavar="FILE", help="columns known beforehand: a file of the rows to come, without y"
    )
    parser.add_argument(
        "--backtest", type=int, metavar="N", help="also: N forecasts of each series' end, beside what came"
    )
    parser.add_argument("--season", type=int, default=1, help="--backtest: steps of a season, which MASE is told")
    for name, column in zip(Columns._fields, Columns(), strict=True):
        parser.add_argument(f"--{name}_column", default=column, help=f"default: {column}")
    parser.add_argument("--batch_size", type=int, default=256, help="series at once")
    add_device(parser)
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    if output.suffix != ".csv" or not output.absolute().parent.is_dir():
        raise ValueError(f"output: expected a .csv in a folder that is there, got {output}")
    picture = output.with_suffix(".png") if arguments.picture is None else Path(arguments.picture)
    check_picture(picture, "picture")
    if arguments.backtest is not None and arguments.backtest < 1:
        raise ValueError(f"backtest: expected at least 1 forecast of each series, got {arguments.backtest}")
    columns = Columns(arguments.id_column, arguments.time_column, arguments.value_column)
    frame, future, known = read_series_file("data", arguments.data, columns), None, []
    if arguments.future_covariates is not None:
        future = read_series_file("future_covariates", arguments.future_covariates, columns._replace(value=VALUE))
        future = future.drop(columns=VALUE, errors="ignore")  # nothing is known of it, if a file has it
        known = list(cut_series("future_covariates", future).values)
    past = arguments.past_covariates or []
    read = cut_series("data", frame, [VALUE, *past, *known])
    device = find_device(arguments.device)
    model = load_forecaster(arguments.model).to(device)
    horizon = model.config.prediction_length if arguments.horizon is None else arguments.horizon
    options = dict(batch_size=arguments.batch_size, progress=True)

    found = model.predict(frame, horizon, arguments.past_covariates, future, arguments.quantiles, **options)
    found.rename(columns={ID: columns.id, TIME: columns.time}).to_csv(output, index=False, float_format="%.9g")
    print(f"{len(read.ids)} series, {horizon} steps: {output}")
    names = [name for name in found.columns if name not in (ID, TIME, FORECAST)]
    forecasts = [[one] for one in ahead(cut_series("forecast", found), names)]
    drawn = draw_forecasts(
        panels(read, forecasts), [float(name) for name in names], picture, columns.value, columns.time
    )
    if arguments.backtest is not None:
        covariates = [side_by_side(read, names) for names in (past, known)]
        tested = backtest(model, read.values[VALUE], horizon, arguments.backtest, *covariates, **options)  # type: ignore[arg-type]
        print_metrics(tested.metrics(arguments.season), "backtest")
        over, calibration = (picture.with_stem(f"{picture.stem}_{what}") for what in ("backtest", "calibration"))
        draw_backtest(tested, read, over, calibration, columns)
    if drawn:
        print(f"drawn in {picture}")


def ahead(found: LongFrame, names: Sequence[str]) -> list[Forecast]:
    """The forecast of each series."""
    quantiles = [numpy.stack(parts, 1) for parts in zip(*(found.values[name] for name in names), strict=True)]
    return [Forecast(*parts) for parts in zip(found.times, found.values[FORECAST], quantiles, strict=True)]


def side_by_side(read: LongFrame, names: Sequence[str]) -> list[numpy.ndarray] | None:
    """Columns of each series, (C, T); None where there are none."""
    if not names:
        return None
    return [numpy.stack(parts) for parts in zip(*(read.values[name] for name in names), strict=True)]


def print_metrics(metrics: dict[str, float], where: str) -> None:
    """MASE, WQL, sMAPE, then the coverage of intervals from the widest on."""
    for name in sorted(metrics, key=["mase", "wql", "smape", *metrics].index):
        print(f"{where} {name}: {metrics[name]:.4f}")


def draw_backtest(tested: Backtest, read: LongFrame, over: Path, calibration: Path, columns: Columns) -> None:
    """Forecasts over what came, and the calibration of their quantiles."""
    forecasts: list[list[Any]] = [[] for _ in read.ids]
    for number, start, predictions in zip(tested.series, tested.starts, tested.predictions, strict=True):
        times = read.times[number][start : start + len(predictions)]
        median = predictions[:, predictions.shape[1] // 2]
        forecasts[number].append(Forecast(times, median, predictions))
    draw_forecasts(panels(read, forecasts), tested.quantiles, over, columns.value, columns.time)
    if draw_calibration(tested.values, tested.predictions, tested.quantiles, calibration):
        print(f"drawn in {over}, {calibration}")
