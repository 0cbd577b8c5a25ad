"""`hf-rnn train --task forecasting`: a forecaster of the series in a file."""

from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoConfig, AutoModelForTimeSeriesPrediction, PreTrainedModel

from hf_rnn import ARCHITECTURES, FORECASTERS
from hf_rnn.cli.forecast import draw_backtest
from hf_rnn.cli.plot import plot_losses
from hf_rnn.cli.series import Columns, cut_series, load_forecaster, read_series_file
from hf_rnn.cli.settings import read_settings
from hf_rnn.forecasting.backtest import backtest
from hf_rnn.forecasting.frames import VALUE
from hf_rnn.forecasting.windows import ForecastWindows, pad_past
from hf_rnn_trainers import RecurrentTrainer, RecurrentTrainingArguments

# Of new models: small ones, for series of a few hundred values
SIZES: dict[str, Any] = dict(patch_size=8, context_length=128, prediction_length=24, hidden_size=64)
SIZES |= dict(num_hidden_layers=2)
LEAST = 16  # values that a window's past has at least
EPOCH = 1024  # windows of an epoch, at least: series of a few hundred values have not many more that differ


def build_forecaster(model: str, config: str) -> PreTrainedModel:
    """A checkpoint, or a new forecaster of an architecture, with the settings `config` beside `SIZES`."""
    if Path(model).is_dir() or "/" in model:
        if config:
            raise ValueError(f"config: the checkpoint {model} has its own settings")
        return load_forecaster(model)
    names = [*ARCHITECTURES.values(), *FORECASTERS.values()]
    if model not in names:
        raise ValueError(f"model: expected one of {names} or a checkpoint's folder, got {model!r}")
    settings = SIZES | dict(patch_intermediate_size=128) if model in FORECASTERS.values() else SIZES
    settings = settings | dict(num_input_features=1) | read_settings(model, config)
    return AutoModelForTimeSeriesPrediction.from_config(AutoConfig.for_model(f"hf_rnn_{model}", **settings))


def count_origins(lengths: list[int], horizon: int, share: float) -> list[int]:
    """How many forecasts of `horizon` steps are held out at each series' end: the share of it, at least one, where half
    of the series and twice `LEAST` values are left to train on."""
    if not share:
        return [0] * len(lengths)
    most = [max(0, min(length // 2, length - 2 * LEAST)) // horizon for length in lengths]
    return [min(max(1, round(share * length / horizon)), own) for length, own in zip(lengths, most, strict=True)]


def train_forecaster(
    model: Any, data: Any, training: RecurrentTrainingArguments, trainer_class: type[RecurrentTrainer]
) -> dict[str, float]:
    """Train a forecaster on windows of a file's series, test it on their ends, and save it, with a card and pictures of
    the losses, of the forecasts of the ends and of their calibration; returns the held-out metrics.

    Args:
        data: `hf_rnn.cli.train.DataArguments`.
    """
    if training.stream:
        raise ValueError("stream: expected --task causal-lm, got forecasting")
    columns = Columns(data.id_column, data.time_column, data.value_column)
    read = cut_series("data", read_series_file("data", data.data, columns), [VALUE])
    series, config = read.values[VALUE], model.config
    horizon, folder = config.prediction_length, Path(str(training.output_dir))
    origins = count_origins([len(x) for x in series], horizon, data.held_out)
    cut = [x[: len(x) - count * horizon] for x, count in zip(series, origins, strict=True)]
    if short := [one for one, x in zip(read.ids, cut, strict=True) if (~numpy.isnan(x)).sum() <= LEAST]:
        raise ValueError(f"data: expected more than {LEAST} values of each series to train on, {short[0]!r} has fewer")
    size = max(EPOCH, sum(map(len, cut)) // config.patch_size)
    windows = ForecastWindows(cut, config.context_length, horizon, size, training.seed, min_past=LEAST)
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=windows,
        eval_dataset=held_out_rows(series, origins, config) or None,
        data_collator=pad_past,
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    if not training.push_to_hub:
        trainer.save_model()
    metrics: dict[str, float] = {}
    if any(origins):
        trainer.evaluate()
        tested = backtest(model.eval(), series, horizon, origins, progress=True)
        metrics = tested.metrics(data.season)
        trainer.log({f"eval_{name}": value for name, value in metrics.items()})
        if trainer.is_world_process_zero():
            draw_backtest(tested, read, folder / "forecast.png", folder / "calibration.png", columns)
    elif data.held_out:
        print(f"nothing held out: expected a series of at least {2 * horizon} values, twice the horizon")
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, folder / "loss.png")
    about = dict(dataset=f"{len(series):,} series of {Path(data.data).name}, {sum(origins):,} forecasts held out")
    trainer.push_to_hub(**about) if training.push_to_hub else trainer.create_model_card(**about)
    return metrics


def held_out_rows(series: list[numpy.ndarray], origins: list[int], config: Any) -> list[dict[str, torch.Tensor]]:
    """The windows of the series' held-out ends."""
    rows, horizon = [], config.prediction_length
    for x, count in zip(series, origins, strict=True):
        y = torch.from_numpy(x).float()
        for start in range(len(x) - count * horizon, len(x), horizon):
            past = y[max(0, start - config.context_length) : start]
            rows.append({"past_values": past, "future_values": y[start : start + horizon]})
    return rows
