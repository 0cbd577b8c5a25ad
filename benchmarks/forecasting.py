"""Do small recurrent networks forecast, trained from scratch, beside what is fitted to each series?

    python benchmarks/forecasting.py        # make bench-forecasting

Networks of about a million parameters (of TiRex-2's, 0.5 million mix variates and rest here), four blocks, patches of
16 values, 256 values of the past and 48 to come at most, are trained on windows of synthetic series
(`hf_rnn.tasks.SyntheticSeries`) and of the beginnings of measured ones (real_series.py), half of each; measured ones of
a kind, yearly or monthly, as often as those of the others. Tested are the last `horizon` values of every series, of
those that training knows but for their ends ("ends"), of other measured ones ("unseen"), and of new synthetic ones;
horizons are the M4 competition's. The learning rate is the better of two on the values before those, after 240 steps,
and so is, of each run, whether series with a trend are forecast by their differences. AdamW, cosine schedule, the same
windows and number of steps for all, 3 seeds. Beside them seasonal naive, AutoETS and AutoARIMA by statsforecast, with
their defaults, fitted to all of a series before its end and told its season; where values are missing they get a
straight line.

MASE and WQL of each series, `hf_rnn.forecasting.metrics`. One thread a run, as many at once as there are cores; an
interrupted measurement goes on. Weights stay in runs/forecasting.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from driver import save
from models import nearest_width
from real_series import NamedSeries, real_series
from resumable import finish, run_all
from tagging import fit
from torch import Tensor
from transformers import PreTrainedModel, set_seed

import hf_rnn
from hf_rnn.forecasting.metrics import forecast_metrics
from hf_rnn.forecasting.windows import ForecastWindows, pad_past, split_series
from hf_rnn.tasks import SyntheticSeries

PARAMETERS, STEPS, TRIAL, BATCH, SEEDS, RATES = 1_000_000, 800, 240, 32, (0, 1, 2), (1e-3, 3e-3)
SIZES = dict(num_hidden_layers=4, patch_size=16, context_length=256, prediction_length=48)
SYNTHETIC, TESTED = 2000, 30
QUANTILES = [n / 10 for n in range(1, 10)]
PEERS = {"seasonal naive": "SeasonalNaive", "AutoETS": "AutoETS", "AutoARIMA": "AutoARIMA"}
CHECKPOINTS = Path(__file__).resolve().parents[1] / "runs" / "forecasting"
GROUPS = ("ends, yearly", "ends, quarterly", "ends, monthly", "unseen", "synthetic")
ACCEPTED = (
    "fitted to each series and told its season; the network has one set of weights for all series, of a million "
    "parameters and minutes of training"
)


def _ours(name: str, **settings) -> Callable[[int], PreTrainedModel]:
    def build(width: int) -> PreTrainedModel:
        config = getattr(hf_rnn, f"{name}Config")(hidden_size=width, num_input_features=1, **SIZES, **settings)
        return getattr(hf_rnn, f"{name}ForPrediction")(config)

    return build


def _tirex(width: int) -> PreTrainedModel:
    return _ours("TiRex2", patch_intermediate_size=4 * width, head_intermediate_size=4 * width)(width)


NETWORKS = {"TiRex-2": _tirex, "minGRU": _ours("MinGRU"), "LSTM": _ours("LSTM"), "xLSTM": _ours("XLSTM", num_heads=4)}


def make(name: str) -> PreTrainedModel:
    return NETWORKS[name](nearest_width(NETWORKS[name], PARAMETERS, range(32, 513, 8)))


@cache
def windows(seed: int) -> ForecastWindows:
    """What all networks are trained on."""
    known = [x for x in real_series() if x.known]
    count = {x.kind: sum(y.kind == x.kind for y in known) for x in known}
    data = SyntheticSeries(SIZES["context_length"] + SIZES["prediction_length"], SYNTHETIC)
    series = [split_series([x.values], x.horizon).train[0] for x in known] + [row["values"] for row in data]
    weights = [1 / count[x.kind] / len(count) for x in known] + [1 / SYNTHETIC] * SYNTHETIC
    return ForecastWindows(series, SIZES["context_length"], SIZES["prediction_length"], seed=seed, weights=weights)


def batches(seed: int) -> Iterator[dict[str, Tensor]]:
    rows = windows(seed)
    for first in range(0, len(rows), BATCH):
        yield pad_past([rows[n] for n in range(first, first + BATCH)])


@cache
def places(validation: bool) -> list[tuple[NamedSeries, np.ndarray, np.ndarray]]:
    """Series, what is known of them, and what is to be forecast."""
    series = [x for x in real_series() if x.known or not validation]
    if not validation:
        new = SyntheticSeries(SIZES["context_length"] + SIZES["prediction_length"], TESTED, seed=1)
        series += [NamedSeries(f"{row['kind']} {n}", "synthetic", row["values"], False) for n, row in enumerate(new)]
    found = []
    for x in series:
        values = x.values[: -x.horizon] if validation else x.values
        found.append((x, values[: -x.horizon], values[-x.horizon :]))
    return found


def score(forecasts: list[np.ndarray], validation: bool) -> dict[str, dict[str, float]]:
    """Of each series' forecast (horizon, Q), by its name."""
    scores = {}
    for (x, past, future), forecast in zip(places(validation), forecasts, strict=True):
        found = forecast_metrics(forecast[None], future[None], QUANTILES, [past], x.season)
        scores[x.name] = {key: found[key] for key in ("mase", "wql", "smape", "coverage_80")}
    return scores


def forecasts_of(model: PreTrainedModel, validation: bool) -> list[np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for horizon in {x.horizon for x, _, _ in places(validation)}:
        those = [(x.name, past) for x, past, _ in places(validation) if x.horizon == horizon]
        outputs = model.predict([past for _, past in those], horizon).full_predictions
        found |= {name: output for (name, _), output in zip(those, outputs, strict=True)}
    return [found[x.name] for x, _, _ in places(validation)]


def run(name: str, seed: int, learning_rate: float, trial: bool) -> dict:
    """Train one and test it."""
    set_seed(seed)
    model = make(name).train()
    seconds = fit(model, batches(seed), TRIAL if trial else STEPS, learning_rate)
    model.eval()
    if not trial:
        choose_differencing(model)
        model.save_pretrained(CHECKPOINTS / f"{name}, seed {seed}")
    return {
        "seed": seed,
        "learning_rate": learning_rate,
        "parameters": model.num_parameters(),
        "width": model.config.hidden_size,
        "seconds": seconds,
        **tested(model, trial),
    }


def choose_differencing(model: PreTrainedModel) -> None:
    """Whether `predict` forecasts series with a trend by their differences: what is better on the validation's ends."""

    def error(differencing: bool) -> float:
        model.config.differencing = differencing
        return mean_mase(score(forecasts_of(model, validation=True), validation=True))

    model.config.differencing = min((True, False), key=error)


def tested(model: PreTrainedModel, validation: bool) -> dict:
    start = time.perf_counter()
    forecasts = forecasts_of(model, validation)
    return {
        "differencing": model.config.differencing,
        "forecast_seconds": time.perf_counter() - start,
        "scores": score(forecasts, validation),
    }


def mean_mase(scores: dict) -> float:
    return float(np.nanmean([row["mase"] for row in scores.values()]))


def run_peer(name: str) -> dict:
    """Fit and test one of statsforecast's."""
    import statsforecast.models

    forecasts, start = [], time.perf_counter()
    for x, past, _ in places(validation=False):
        there = ~np.isnan(past)
        filled = np.interp(np.arange(len(past)), np.flatnonzero(there), past[there])
        model = getattr(statsforecast.models, PEERS[name])(season_length=x.season)
        found = model.forecast(filled, x.horizon, level=[20, 40, 60, 80])
        columns = [*(f"lo-{level}" for level in (80, 60, 40, 20)), "mean", *(f"hi-{n}" for n in (20, 40, 60, 80))]
        forecasts.append(np.stack([found[column] for column in columns], -1))
    return {"forecast_seconds": time.perf_counter() - start, "scores": score(forecasts, validation=False)}


def group_of(x: NamedSeries) -> str:
    return f"ends, {x.kind}" if x.known else "unseen" if x.kind != "synthetic" else "synthetic"


def summary(scores: dict, naive: dict) -> dict[str, dict[str, float]]:
    """Of each group the mean MASE, and the geometric mean of WQL over that of seasonal naive; of all, the share of
    values in the 80% interval."""
    found: dict[str, dict[str, float]] = {}
    for group in GROUPS:
        names = [x.name for x, _, _ in places(validation=False) if group_of(x) == group]
        ratios = np.array([scores[name]["wql"] / naive[name]["wql"] for name in names])
        found[group] = {
            "series": len(names),
            "mase": float(np.nanmean([scores[name]["mase"] for name in names])),
            "wql": float(np.exp(np.nanmean(np.log(ratios)))),
            "coverage_80": float(np.nanmean([scores[name]["coverage_80"] for name in names])),
        }
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    trials = run_all(
        "forecasting",
        run,
        {f"{name}, learning rate {lr:g}": (name, len(SEEDS), lr, True) for name in NETWORKS for lr in RATES},
    )

    def error(name: str, lr: float) -> float:
        return mean_mase(trials[f"{name}, learning rate {lr:g}"]["scores"])

    best = {name: min(RATES, key=lambda lr, name=name: error(name, lr)) for name in NETWORKS}
    jobs = {f"{name}, seed {seed}": (name, seed, best[name], False) for seed in SEEDS for name in NETWORKS}
    runs = run_all("forecasting", run, jobs)
    peers = run_all("forecasting", run_peer, {name: (name,) for name in PEERS})
    naive = peers["seasonal naive"]["scores"]
    models = {name: [runs[f"{name}, seed {seed}"] for seed in SEEDS] for name in NETWORKS}
    models |= {name: [row] for name, row in peers.items()}
    for rows in models.values():
        for row in rows:
            row["summary"] = summary(row["scores"], naive)
    validation = {name: {f"{lr:g}": error(name, lr) for lr in RATES} for name in NETWORKS}
    results = {"steps": STEPS, "batch": BATCH, "validation_mase": validation, "models": models, "accepted": {}}
    for group in GROUPS:
        for measure in ("mase", "wql"):
            means = {n: statistics.mean(row["summary"][group][measure] for row in rows) for n, rows in models.items()}
            ours = min(means[name] for name in NETWORKS)
            if better := [name for name in PEERS if means[name] < ours]:
                results["accepted"][f"{measure}, {group}"] = f"{', '.join(better)}: {ACCEPTED}"
            print(f"{measure:5} {group:16}" + "".join(f"  {name} {mean:.3f}" for name, mean in means.items()))
    save("forecasting", results)
    finish("forecasting")


if __name__ == "__main__":
    main()
