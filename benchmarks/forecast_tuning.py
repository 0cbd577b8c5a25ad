"""Does a forecaster get better on a series by being tuned on its past?

    python benchmarks/forecast_tuning.py        # make bench-forecasting, behind forecasting.py, whose checkpoint it is

The TiRex-2 that forecasting.py trained, seed 0, which never saw this series: a blood pressure of 7,501 values (number
135 of the UCR anomaly archive, which aeon brings along). Tuned on its first 6,061 values, the learning rate by the next
10 windows of 48 values, tested on the last 20, each forecast from what lies before it: all weights and LoRA of rank 8
(PEFT) with `RecurrentTrainer`, and all weights with `ZOTrainer`, which sees no gradient; what only series of several
variates use is frozen there. AdamW and plain SGD, constant rate; 3 seeds of windows and directions. One thread a run;
an interrupted measurement goes on.
"""

import argparse
import statistics
import tempfile
import time
from functools import cache
from typing import Any

import numpy as np
from driver import save
from forecasting import CHECKPOINTS, QUANTILES, SEEDS, SIZES
from peft import LoraConfig, get_peft_model
from resumable import finish, run_all
from transformers import set_seed

import hf_rnn
from hf_rnn.forecasting.metrics import forecast_metrics
from hf_rnn.forecasting.windows import ForecastWindows, SeriesSplit, pad_past, split_series

CHECKPOINT = "TiRex-2, seed 0"
CONTEXT, HORIZON = SIZES["context_length"], SIZES["prediction_length"]
STEPS, BATCH = {"full": 100, "LoRA": 100, "ZO": 60}, 16
DIRECTIONS, EPSILON = 16, 1e-3
RATES = {"full": (3e-4, 1e-3), "LoRA": (3e-3, 1e-2), "ZO": (1e-3, 1e-2, 3e-2)}
ONLY_VARIATES = ("variates", "directions_proj")  # which one series alone never reads


@cache
def series() -> SeriesSplit:
    import aeon.datasets

    values, _ = aeon.datasets.load_kdd_tsad_135()
    return split_series([np.asarray(values)], HORIZON, validation=10, test=20)


def score(model: Any, validation: bool) -> dict[str, float]:
    rows = series().validation if validation else series().test
    pasts, futures = ([row[name].numpy() for row in rows] for name in ("past_values", "future_values"))
    found = model.predict([past[-CONTEXT:] for past in pasts], HORIZON).full_predictions
    return forecast_metrics(np.stack(found), np.stack(futures), QUANTILES, pasts)


def load() -> Any:
    return hf_rnn.TiRex2ForPrediction.from_pretrained(CHECKPOINTS / CHECKPOINT)


def run(method: str, seed: int, learning_rate: float, validation: bool) -> dict:
    """Tune one and test it."""
    set_seed(seed)
    model = load()
    trainer, settings, config = hf_rnn.RecurrentTrainer, {}, hf_rnn.RecurrentTrainingArguments
    if method == "LoRA":
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    elif method == "ZO":
        trainer, config = hf_rnn.ZOTrainer, hf_rnn.ZOConfig
        settings = dict(num_directions=DIRECTIONS, epsilon=EPSILON, replay_log=False)
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in ONLY_VARIATES))
    else:
        assert method == "full"
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder,
            max_steps=STEPS[method],
            per_device_train_batch_size=BATCH,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            label_names=["future_values"],
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            seed=seed,
            **settings,
        )
        windows = ForecastWindows(series().train, CONTEXT, HORIZON, size=STEPS[method] * BATCH, seed=seed)
        start = time.perf_counter()
        trainer(model=model, args=arguments, train_dataset=windows, data_collator=pad_past).train()
        seconds = time.perf_counter() - start
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    scores = score((model.merge_and_unload() if method == "LoRA" else model).eval(), validation)
    return {"seed": seed, "learning_rate": learning_rate, "trained": trained, "seconds": seconds, **scores}


def untuned(validation: bool) -> dict:
    return score(load().eval(), validation)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    trials = run_all(
        "forecast_tuning",
        run,
        {f"{m}, learning rate {lr:g}": (m, len(SEEDS), lr, True) for m, rates in RATES.items() for lr in rates},
    )
    best = {
        m: min(rates, key=lambda lr, m=m: trials[f"{m}, learning rate {lr:g}"]["wql"]) for m, rates in RATES.items()
    }
    jobs = {f"{m}, seed {seed}": (m, seed, best[m], False) for seed in SEEDS for m in RATES}
    runs = run_all("forecast_tuning", run, jobs)
    validation = {m: {f"{lr:g}": trials[f"{m}, learning rate {lr:g}"]["wql"] for lr in RATES[m]} for m in RATES}
    before = run_all("forecast_tuning", untuned, {"untuned": (False,), "untuned, validation": (True,)})
    validation["untuned"] = {"": before["untuned, validation"]["wql"]}
    results = {
        "steps": STEPS,
        "batch": BATCH,
        "directions": DIRECTIONS,
        "validation_wql": validation,
        "untuned": before["untuned"],
        "tuned": {m: [runs[f"{m}, seed {seed}"] for seed in SEEDS] for m in RATES},
    }
    print(f"{'untuned':8} WQL {before['untuned']['wql']:.4f}  MASE {before['untuned']['mase']:.3f}")
    for method, rows in results["tuned"].items():
        means = {key: statistics.mean(row[key] for row in rows) for key in ("wql", "mase", "seconds")}
        print(f"{method:8} WQL {means['wql']:.4f}  MASE {means['mase']:.3f}  {means['seconds']:.0f} s")
    save("forecast_tuning", results)
    finish("forecast_tuning")


if __name__ == "__main__":
    main()
