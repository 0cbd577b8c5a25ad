"""Forecast what places need hour by hour: train a small minGRU, forecast, backtest, draw; then tune it by LoRA for a
place of another kind.

python examples/forecasting.py        # about 20 s on 2 cores
"""

import argparse

import numpy as np
import pandas as pd
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForTimeSeriesPrediction, set_seed

import hf_rnn
from hf_rnn.forecasting.backtest import backtest
from hf_rnn.forecasting.pictures import Forecast, Panel, draw_calibration, draw_forecasts
from hf_rnn.forecasting.windows import ForecastWindows, pad_past

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=500, help="of training")
steps = parser.parse_args().steps
set_seed(0)
random = np.random.default_rng(0)
HORIZON, TESTED = 48, 5  # hours of a forecast, and how many of each series' end are held out
HOURS = np.arange(24 * 56)  # eight weeks
TIMES = np.datetime64("2026-01-05", "h") + HOURS


def demand(peak: float, weekend: float, width: float) -> np.ndarray:
    """A bump a day, other days at weekends, a slow drift, and noise that grows with the level."""
    day = np.exp(-(((HOURS - peak + 12) % 24 - 12) ** 2) / (2 * width**2))
    level = (1 + 3 * day) * np.where(HOURS // 24 % 7 >= 5, weekend, 1.0)
    drift = np.cumsum(0.01 * random.standard_normal(len(HOURS)))
    return 20 * level * np.exp(drift / 4 + 0.06 * random.standard_normal(len(HOURS)))


# Twelve shops to train on; a few hours of one are missing. What is held out is in no window.
places = {f"shop {n}": demand(random.uniform(10, 18), random.uniform(0.3, 0.9), 4) for n in range(12)}
places["shop 2"][500:530] = np.nan
series = list(places.values())
known = [x[: -HORIZON * TESTED] for x in series]

config = hf_rnn.MinGRUConfig(
    num_input_features=1,  # reads values
    patch_size=24,  # a day
    context_length=24 * 14,
    prediction_length=HORIZON,
    hidden_size=64,
    num_hidden_layers=2,
)
model = AutoModelForTimeSeriesPrediction.from_config(config)


def train(model, series: list[np.ndarray], steps: int, learning_rate: float, folder: str) -> None:
    arguments = hf_rnn.RecurrentTrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    windows = ForecastWindows(series, config.context_length, HORIZON)  # drawn as they are asked for
    trainer = hf_rnn.RecurrentTrainer(model, arguments, train_dataset=windows, data_collator=pad_past)
    trainer.train()
    trainer.save_model()


def show(tested, what: str) -> None:
    """MASE beside the value of the same hour a week ago; below 1 is better than that is on the past."""
    scores = tested.metrics(season=24 * 7)
    print(f"{what}: " + ", ".join(f"{name} {scores[name]:.3f}" for name in ("mase", "wql", "smape", "coverage_80")))


def forecasts(tested, number: int) -> list[Forecast]:
    own = tested.series == number
    found = zip(tested.starts[own], tested.predictions[own], strict=True)
    return [Forecast(TIMES[start : start + HORIZON], q[:, q.shape[1] // 2], q) for start, q in found]


train(model, known, steps, learning_rate=1e-2, folder="shops")

# From the ends of the series on, as a frame in, as a frame out
model = AutoModelForTimeSeriesPrediction.from_pretrained("shops")
frame = pd.concat(pd.DataFrame({"unique_id": name, "ds": TIMES, "y": values}) for name, values in places.items())
ahead = model.predict(frame, horizon=HORIZON, quantiles=[0.1, 0.25, 0.5, 0.75, 0.9])
print(ahead.groupby("unique_id").head(2).head(6).to_string(index=False))
panels = []
for name in ("shop 1", "shop 2"):
    rows = ahead[ahead.unique_id == name]
    quantiles = rows[["0.1", "0.25", "0.5", "0.75", "0.9"]].to_numpy()
    panels.append(
        Panel(name, TIMES, places[name], [Forecast(rows.ds.to_numpy(), rows.prediction.to_numpy(), quantiles)])
    )
draw_forecasts(panels, [0.1, 0.25, 0.5, 0.75, 0.9], "forecast.png", value="demand an hour", time="")

# Five forecasts of two days each over what came
tested = backtest(model, series, HORIZON, TESTED)
show(tested, "shops, held out")
over = [Panel(name, TIMES, places[name], forecasts(tested, n)) for n, name in enumerate(places) if n < 4]
draw_forecasts(over, config.quantiles, "backtest.png", value="demand an hour", time="")
draw_calibration(tested.values, tested.predictions, config.quantiles, "calibration.png")

# A bar opens when shops close, and is full at weekends. LoRA's few weights learn it from six weeks
bar = [demand(peak=23, weekend=2.0, width=2)]
show(backtest(model, bar, HORIZON, TESTED), "bar, before")
adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
adapted.print_trainable_parameters()
train(adapted, [bar[0][: -HORIZON * TESTED]], steps // 2, learning_rate=1e-2, folder="bar")  # the adapter alone
show(backtest(adapted.merge_and_unload().eval(), bar, HORIZON, TESTED), "bar, after")
print("drawn in forecast.png, backtest.png, calibration.png")
