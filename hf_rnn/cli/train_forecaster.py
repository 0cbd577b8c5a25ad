"""`hf-rnn train --task forecasting`: a forecaster, from scratch or tuned, on a table of series."""

from pathlib import Path
from typing import Any

import numpy
from transformers import AutoConfig, AutoModelForTimeSeriesPrediction, PreTrainedModel

from hf_rnn import ARCHITECTURES, FORECASTERS
from hf_rnn.cli.forecast import draw_backtest
from hf_rnn.cli.plot import plot_losses
from hf_rnn.cli.series import Columns, cut_series, load_forecaster, read_table
from hf_rnn.cli.settings import read_settings
from hf_rnn.forecasting.backtest import backtest
from hf_rnn.forecasting.frames import VALUE
from hf_rnn.forecasting.windows import ForecastWindows, Window, pad_past, split_series

MIN_PAST = 16  # values that a window has before what is predicted, of fewer nothing is known of a scale
# Of a new model, so that series of some hundred values have windows
DEFAULTS = dict(hidden_size=128, num_hidden_layers=3, patch_size=8, context_length=256, prediction_length=24)
TIREX = dict(patch_intermediate_size=256, hidden_size=128, num_hidden_layers=4)


def build_forecaster(model: str, config: str) -> PreTrainedModel:
    """A checkpoint, or a new model of an architecture."""
    if Path(model).is_dir() or "/" in model:
        if config:
            raise ValueError(f"config: the checkpoint {model} has its own settings; drop --config")
        return load_forecaster(model)
    names = [*ARCHITECTURES.values(), *FORECASTERS.values()]
    if model not in names:
        raise ValueError(f"model: expected one of {names} or a checkpoint's folder, got {model!r}")
    settings = DEFAULTS | {"num_input_features": 1} | (TIREX if model in FORECASTERS.values() else {})
    settings |= read_settings(model, config, fixed=("vocab_size",))
    return AutoModelForTimeSeriesPrediction.from_config(AutoConfig.for_model(f"hf_rnn_{model}", **settings))


def train_forecaster(arguments: Any, data: Any, training: Any, trainer_class: Any) -> dict[str, float]:
    """Train on windows of all series but their last `prediction_length` steps, forecast these and save; returns the
    measures of the field."""
    if training.stream:
        raise ValueError(f"stream: expected --task causal-lm, got {arguments.task}")
    columns = Columns(data.id_column, data.time_column, data.value_column)
    read = cut_series("data", read_table("data", data.data, columns), [VALUE])
    series = read.values[VALUE]
    model = build_forecaster(arguments.model, arguments.config)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {len(series)} series")
    config = model.config
    horizon = config.prediction_length
    cut, rows = _held_out(series, horizon if data.held_out else 0)
    windows = ForecastWindows(cut, config.context_length, horizon, seed=training.seed, min_past=MIN_PAST)
    windows.size = sum(map(len, windows.ends))  # an epoch has as many as there are places
    if training.learning_rate is None:
        training.learning_rate = min(3e-3, 0.256 / config.hidden_size)
    trainer = trainer_class(
        model=model, args=training, train_dataset=windows, eval_dataset=rows or None, data_collator=pad_past
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    if not training.push_to_hub:
        trainer.save_model()
    folder, metrics = Path(str(training.output_dir)), {}
    if rows:  # measured on what `predict` says, which is more than the model's own forecast
        tested = backtest(model.eval(), series, horizon, [int(_is_long(x, horizon)) for x in series], progress=True)
        measures = {f"eval_{name}": value for name, value in tested.metrics(data.season).items()}
        metrics = trainer.evaluate() | measures
        trainer.log(measures)
        if trainer.is_world_process_zero():
            draw_backtest(tested, read, folder / "forecast.png", folder / "calibration.png", columns)
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, folder / "loss.png", what="quantile loss")
    name = Path(data.data).name
    about = dict(dataset=f"{name}, the last {horizon} steps of each series held out" if rows else name)
    trainer.push_to_hub(**about) if training.push_to_hub else trainer.create_model_card(**about)
    return metrics


def _held_out(series: list[numpy.ndarray], horizon: int) -> tuple[list[numpy.ndarray], list[Window]]:
    """Series without their last `horizon` steps, and these; shorter ones are trained on as they are."""
    if not horizon:
        return series, []
    long = [x for x in series if _is_long(x, horizon)]
    if not long:
        raise ValueError(
            f"data: expected a series of {horizon + 2 * MIN_PAST} steps at least, to hold out prediction_length = "
            f"{horizon}, got {max(map(len, series))}; choose --config prediction_length=..., or --held_out 0"
        )
    split = split_series(long, horizon, validation=0)
    return split.train + [x for x in series if not _is_long(x, horizon)], split.test


def _is_long(x: numpy.ndarray, horizon: int) -> bool:
    return len(x) >= horizon + 2 * MIN_PAST
