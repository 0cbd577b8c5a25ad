"""`hf-rnn train --task forecasting`: a forecaster, from scratch or tuned, on a table of series."""

from pathlib import Path
from typing import Any

import numpy
from transformers import AutoConfig, AutoModelForTimeSeriesPrediction, PreTrainedModel

from hf_rnn import ARCHITECTURES, FORECASTERS
from hf_rnn.cli.plot import plot_losses
from hf_rnn.cli.series import read_series_of
from hf_rnn.cli.settings import read_settings
from hf_rnn.forecasting.metrics import forecast_metrics
from hf_rnn.forecasting.pictures import Forecast, Panel, draw_forecasts
from hf_rnn.forecasting.windows import ForecastWindows, Window, pad_past, split_series

MIN_PAST = 16  # values that a window has before what is predicted, of fewer nothing is known of a scale
# Of a new model, so that series of some hundred values have windows
DEFAULTS = dict(hidden_size=128, num_hidden_layers=3, patch_size=8, context_length=256, prediction_length=24)
TIREX = dict(patch_intermediate_size=256, hidden_size=128, num_hidden_layers=4)


def build_forecaster(model: str, config: str) -> PreTrainedModel:
    """A checkpoint, or a new model of an architecture."""
    if Path(model).is_dir() or "/" in model:
        if config:
            raise ValueError(f"config: the checkpoint {model} has its own settings")
        return AutoModelForTimeSeriesPrediction.from_pretrained(model)
    names = [*ARCHITECTURES.values(), *FORECASTERS.values()]
    if model not in names:
        raise ValueError(f"model: expected one of {names} or a checkpoint's folder, got {model!r}")
    settings = DEFAULTS | {"num_input_features": 1} | (TIREX if model in FORECASTERS.values() else {})
    settings |= read_settings(model, config, fixed=("vocab_size",))
    return AutoModelForTimeSeriesPrediction.from_config(AutoConfig.for_model(f"hf_rnn_{model}", **settings))


def train_forecaster(arguments: Any, data: Any, training: Any, trainer_class: Any) -> dict[str, float]:
    """Train on windows of all series but their last `prediction_length` steps, evaluate on these and save; returns the
    measures of the field."""
    ids, series = read_series_of("data", data.data)
    model = build_forecaster(arguments.model, arguments.config)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {len(series)} series")
    config = model.config
    horizon = config.prediction_length
    cut, rows = _held_out(series, horizon if data.held_out else 0)
    windows = ForecastWindows(cut, config.context_length, horizon, seed=training.seed, min_past=MIN_PAST)
    windows.size = sum(map(len, windows.ends))  # an epoch has as many as there are places
    pasts = [row["past_values"].numpy() for row in rows]

    def measures(found: Any) -> dict[str, float]:
        return forecast_metrics(found.predictions[1], found.label_ids, config.quantiles, pasts, data.season)

    if training.learning_rate is None:
        training.learning_rate = min(3e-3, 0.256 / config.hidden_size)
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=windows,
        eval_dataset=rows or None,
        data_collator=pad_past,
        compute_metrics=measures if rows else None,
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    metrics = trainer.evaluate() if rows else {}
    if not training.push_to_hub:
        trainer.save_model()
    folder = Path(str(training.output_dir))
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, folder / "loss.png", what="quantile loss")
        _draw(model.eval(), ids, series, horizon if rows else 0, folder / "forecast.png")
    name = Path(data.data).name
    about = dict(dataset=f"{name}, the last {horizon} steps of each series held out" if rows else name)
    trainer.push_to_hub(**about) if training.push_to_hub else trainer.create_model_card(**about)
    return metrics


def _held_out(series: list[numpy.ndarray], horizon: int) -> tuple[list[numpy.ndarray], list[Window]]:
    """Series without their last `horizon` steps, and these; shorter ones are trained on as they are."""
    if not horizon:
        return series, []
    long = [len(x) >= horizon + 2 * MIN_PAST for x in series]
    if not any(long):
        raise ValueError(
            f"data: expected a series of {horizon + 2 * MIN_PAST} steps at least, to hold out prediction_length = "
            f"{horizon}, got {max(map(len, series))}; choose --config prediction_length=..., or --held_out 0"
        )
    split = split_series([x for x, is_long in zip(series, long, strict=True) if is_long], horizon, validation=0)
    return split.train + [x for x, is_long in zip(series, long, strict=True) if not is_long], split.test


def _draw(model: Any, ids: list[Any], series: list[numpy.ndarray], horizon: int, path: Path) -> None:
    """The held-out steps of the first series, or what comes behind them, as forecast."""
    panels, steps = [], horizon or model.config.prediction_length
    for one, x in list(zip(ids, series, strict=True))[:9]:
        if len(x) <= horizon + 1:
            continue
        end = len(x) - horizon
        found = model.predict(x[:end], steps)
        forecast = Forecast(numpy.arange(end, end + steps), found.mean_predictions, found.full_predictions)
        panels.append(Panel("" if one is None else str(one), numpy.arange(len(x)), x, [forecast]))
    if panels:
        draw_forecasts(panels, model.config.quantiles, path, time="step")
