"""`hf-rnn forecast DATA --model CHECKPOINT --horizon 48`: what comes next in a table of series, and a picture of it."""

import argparse
from pathlib import Path
from typing import Any

import numpy
from tqdm import tqdm
from transformers import AutoModelForTimeSeriesPrediction

from hf_rnn.cli.device import add_device, find_device
from hf_rnn.cli.series import read_table
from hf_rnn.forecasting.frames import FORECAST, ID, TIME, VALUE, read_frame
from hf_rnn.forecasting.metrics import forecast_metrics
from hf_rnn.forecasting.pictures import Forecast, Panel, draw_calibration, draw_forecasts

_MEASURES = {"mase": "MASE", "wql": "WQL", "smape": "sMAPE", "coverage_80": "inside the 80% interval"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn forecast", description=__doc__)
    parser.add_argument("data", help="a csv or parquet file, a row for each series and time")
    parser.add_argument("--model", required=True, help="a forecaster's folder, or its name on the Hub")
    parser.add_argument("--horizon", type=int, required=True, help="steps to forecast")
    parser.add_argument("--output", default="forecast.csv", metavar="FILE", help="table to write")
    parser.add_argument("--picture", metavar="FILE", help=".png, .svg or .pdf; default: beside the table; 'none': none")
    parser.add_argument("--quantiles", help="such as 0.1,0.5,0.9; default: all of the model's")
    parser.add_argument("--past_covariates", help="columns known until now, with commas between")
    parser.add_argument(
        "--future_covariates", metavar="FILE", help="table of the rows to come, of columns known beforehand"
    )
    parser.add_argument("--id_column", default=ID, help="which series a row is of; may be missing where there is one")
    parser.add_argument("--time_column", default=TIME)
    parser.add_argument("--value_column", default=VALUE)
    parser.add_argument(
        "--backtest",
        type=int,
        default=0,
        metavar="N",
        help="also forecast the last N horizons that are known: how good?",
    )
    parser.add_argument("--season", type=int, default=1, help="steps of a season, by which MASE is scaled")
    add_device(parser)
    arguments = parser.parse_args(argv)
    picture = _picture(arguments.picture, arguments.output)
    quantiles = _quantiles(arguments.quantiles)
    if arguments.backtest < 0:
        raise ValueError(f"backtest: expected a number of horizons, got {arguments.backtest}")
    columns = (arguments.id_column, arguments.time_column, arguments.value_column)
    frame = read_table("data", arguments.data, columns)
    future = None
    if arguments.future_covariates:
        future = read_table("future_covariates", arguments.future_covariates, columns, needs_value=False)
    model = AutoModelForTimeSeriesPrediction.from_pretrained(arguments.model).eval().to(find_device(arguments.device))
    past = arguments.past_covariates.split(",") if arguments.past_covariates else None
    told = dict(horizon=arguments.horizon, past_covariates=past, quantiles=quantiles)
    quantiles = quantiles or model.config.quantiles
    try:
        forecast = model.predict(frame, future_covariates=future, **told)
        panels = [_panel(frame, [forecast], one, quantiles) for one in _ids(frame)]
        own = dict(zip((ID, TIME, FORECAST), columns[:2], strict=False))
        forecast.rename(columns=own).to_csv(arguments.output, index=False)
        print(f"{len(panels)} series, {arguments.horizon} steps each: {arguments.output}")
        if picture and draw_forecasts(panels, quantiles, picture, columns[2], columns[1]):
            print(f"picture: {picture}")
        if arguments.backtest:
            _backtest(model, frame, future, told, arguments, quantiles, picture)
    except TypeError as error:  # a column of another type, in a file that a user gave
        raise ValueError(str(error)) from error


def _backtest(
    model: Any, frame: Any, future: Any, told: dict, arguments: Any, quantiles: list[float], picture: Path | None
) -> None:
    """Forecast each series from earlier places; print measures and draw pictures."""
    horizon, places = arguments.horizon, range(arguments.backtest, 0, -1)
    groups = frame.groupby(ID, sort=False) if ID in frame else frame.groupby(lambda _: 0)
    left = groups.cumcount(ascending=False)  # rows behind each
    shortest = int(groups.size().min())
    if shortest < horizon * arguments.backtest + 2:
        raise ValueError(
            f"backtest: expected {horizon * arguments.backtest + 2} rows of each series at least, {arguments.backtest} "
            f"horizons and two before, got one of {shortest}"
        )
    known = [] if future is None else [column for column in future.columns if column not in (ID, TIME, VALUE)]
    keys = [column for column in (ID, TIME) if column in frame]
    forecasts, values, predictions, pasts = [], [], [], []
    for place in tqdm(places, desc="backtest", unit="place"):
        before, after = (
            frame[left >= horizon * place],
            frame[(left < horizon * place) & (left >= horizon * (place - 1))],
        )
        forecast = model.predict(before, future_covariates=after[[*keys, *known]] if known else None, **told)
        forecasts.append(forecast)
        values += read_frame("data", after, [VALUE]).values[VALUE]
        pasts += read_frame("data", before, [VALUE]).values[VALUE]
        predictions.append(forecast[[f"{q:g}" for q in quantiles]].to_numpy().reshape(-1, horizon, len(quantiles)))
    everything = numpy.concatenate(predictions)
    found = forecast_metrics(everything, numpy.stack(values), quantiles, pasts, arguments.season)
    print("backtest: " + ", ".join(f"{name} {found[key]:.3f}" for key, name in _MEASURES.items() if key in found))
    if picture:
        panels = [_panel(frame, forecasts, one, quantiles) for one in _ids(frame)]
        over, below = (picture.with_stem(f"{picture.stem}-{name}") for name in ("backtest", "calibration"))
        if draw_forecasts(panels, quantiles, over, arguments.value_column, arguments.time_column):
            draw_calibration(numpy.stack(values), everything, quantiles, below)
            print(f"pictures: {over}, {below}")


def _ids(frame: Any) -> list[Any]:
    return list(frame[ID].unique()) if ID in frame else [None]


def _panel(frame: Any, forecasts: list[Any], one: Any, quantiles: list[float]) -> Panel:
    def of(x: Any) -> Any:
        return x if one is None else x[x[ID] == one]

    said = [
        Forecast(x[TIME].to_numpy(), x[FORECAST].to_numpy(), x[[f"{q:g}" for q in quantiles]].to_numpy())
        for x in map(of, forecasts)
    ]
    own = of(frame)
    return Panel("" if one is None else str(one), own[TIME].to_numpy(), own[VALUE].to_numpy(float), said)


def _picture(told: str | None, output: str) -> Path | None:
    if told == "none":
        return None
    path = Path(told) if told else Path(output).with_suffix(".png")
    if path.suffix not in (".png", ".svg", ".pdf") or not path.absolute().parent.is_dir():
        raise ValueError(f"picture: expected a .png, .svg or .pdf in a folder that is there, got {path}")
    return path


def _quantiles(told: str | None) -> list[float] | None:
    try:
        return [float(x) for x in told.split(",")] if told else None
    except ValueError:
        raise ValueError(f"quantiles: expected numbers with commas between, got {told!r}") from None
