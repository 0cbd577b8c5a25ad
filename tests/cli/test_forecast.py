"""`hf-rnn forecast` and `hf-rnn train --task forecasting`, as a user runs them, on files of a few short series."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import hf_rnn
from hf_rnn.cli.main import main
from hf_rnn.forecasting.backtest import backtest
from hf_rnn.forecasting.metrics import forecast_metrics
from hf_rnn_trainers.model_card.files import others

SMALL = "hidden_size=16,num_hidden_layers=1,patch_size=4,context_length=32,prediction_length=8"
SIZES = dict(hidden_size=16, num_hidden_layers=1, patch_size=4, context_length=32, prediction_length=8)
QUANTILES = [n / 10 for n in range(1, 10)]


def waves(**names):
    """Two series, of hours and of unequal lengths, one value missing."""
    parts, random = [], np.random.default_rng(0)
    for name, length in (("a", 90), ("b", 60)):
        y = 5 + np.sin(np.arange(length) * 2 * np.pi / 12) + 0.05 * random.standard_normal(length)
        y[3] = np.nan
        times = pd.date_range("2026-01-01", periods=length, freq="h")
        parts.append(pd.DataFrame({"unique_id": name, "ds": times, "y": y, "load": np.arange(length) % 5.0}))
    return pd.concat(parts, ignore_index=True).rename(columns=names)


def command(*arguments):
    return main([str(a) for a in arguments])


def train(folder, *more, data="series.csv"):
    options = ["--task", "forecasting", "--data", data, "--output_dir", folder, "--use_cpu", "--disable_tqdm", "True"]
    return command("train", *options, *more)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    waves().to_csv("series.csv", index=False)
    return tmp_path


@pytest.fixture
def forecaster(here):
    torch.manual_seed(0)
    model = hf_rnn.TiRex2ForPrediction(hf_rnn.TiRex2Config(**SIZES, patch_intermediate_size=16)).eval()
    model.save_pretrained("model")
    return model


def test_train_and_forecast(here, capsys):
    waves(unique_id="place", ds="hour", y="value").to_csv("mine.csv", index=False)
    columns = ["--id_column", "place", "--time_column", "hour", "--value_column", "value", "--season", 12]
    assert train("out", "--config", SMALL, "--max_steps", 100, *columns, data="mine.csv") == 0
    told = capsys.readouterr().out
    assert "MinGRUForPrediction" in told and "try: hf-rnn forecast mine.csv --model out" in told
    metrics = {name: float(x) for name, x in re.findall(r"^held-out (\w+): ([\d.]+)$", told, re.MULTILINE)}
    assert list(metrics) == ["loss", "mase", "wql", "smape", "coverage_80"] and metrics["wql"] < 0.05
    card = (here / "out" / "README.md").read_text()
    assert "pipeline_tag: time-series-forecasting" in card and "mine.csv, the last 8 steps of each series" in card
    shown = dict(re.findall(r"^\| eval_(\w+) \| ([\d.e-]+) \|$", card, re.MULTILINE))
    for name, value in metrics.items():
        assert float(shown[name]) == pytest.approx(value, abs=1e-4)
    for name in ("forecast.png", "calibration.png", "loss.png"):
        assert (here / "out" / name).stat().st_size > 5000
    assert others("out") == []  # that a push would refuse

    # The end of each series, forecast from all before it
    model = hf_rnn.MinGRUForPrediction.from_pretrained("out")
    y = [waves().y[waves().unique_id == name].to_numpy() for name in "ab"]
    expected = measured(model, [(x[:-8], x[-8:]) for x in y], 8)
    for name in ("mase", "wql", "smape", "coverage_80"):
        assert metrics[name] == pytest.approx(expected[name], abs=6e-5)

    more = ["--horizon", 6, "--quantiles", "0.1,0.5,0.9", "--output", "next.csv", "--backtest", 2, "--device", "cpu"]
    assert command("forecast", "mine.csv", "--model", "out", *columns, *more) == 0
    told = capsys.readouterr().out
    found = pd.read_csv("next.csv")
    assert list(found) == ["place", "hour", "prediction", "0.1", "0.5", "0.9"]
    assert list(found.place) == ["a"] * 6 + ["b"] * 6
    assert found.hour[0] == "2026-01-04 18:00:00" and found.hour[11] == "2026-01-03 17:00:00"
    expected = model.predict(y, 6)
    np.testing.assert_allclose(found.prediction, np.concatenate(expected.mean_predictions), rtol=1e-6)
    np.testing.assert_allclose(found["0.9"], np.concatenate(expected.full_predictions)[:, -1], rtol=1e-6)
    for name in ("next.png", "next-backtest.png", "next-calibration.png"):
        assert (here / name).stat().st_size > 5000
    expected = measured(model, [(x[: len(x) - n], x[len(x) - n :][:6]) for x in y for n in (12, 6)], 6, [0.1, 0.5, 0.9])
    got = re.search(
        r"^backtest: MASE ([\d.]+), WQL ([\d.]+), sMAPE ([\d.]+), inside the 80% interval ([\d.]+)$", told, re.M
    )
    wanted = [expected[name] for name in ("mase", "wql", "smape", "coverage_80")]
    assert [float(x) for x in got.groups()] == pytest.approx(wanted, abs=6e-4)


def measured(model, pieces, horizon, quantiles=QUANTILES):
    pasts, values = zip(*pieces, strict=True)
    predictions = np.stack(model.predict(list(pasts), horizon, quantiles=quantiles).full_predictions)
    return forecast_metrics(predictions, np.stack(values), quantiles, pasts, season=12)


def test_a_checkpoint_goes_on(forecaster):
    """By its own sizes; a series too short to hold its end out is trained on whole."""
    pd.concat([waves(), waves().iloc[:20].assign(unique_id="c")]).to_csv("series.csv", index=False)
    before = {name: p.clone() for name, p in forecaster.named_parameters()}
    assert train("out", "--model", "./model", "--max_steps", 2) == 0
    after = dict(hf_rnn.TiRex2ForPrediction.from_pretrained("out").named_parameters())
    assert after.keys() == before.keys()
    assert 0 < (after["model.norm.weight"] - before["model.norm.weight"]).abs().max() < 0.1


def test_files_of_the_tirex_2_package(forecaster):
    """NX-AI/TiRex-2's, whose config names no model_type."""
    assert command("convert", "model", "theirs") == 0
    assert command("forecast", "series.csv", "--model", "theirs", "--picture", "none", "--device", "cpu") == 0
    expected = forecaster.predict(waves(), 8)
    np.testing.assert_allclose(pd.read_csv("forecast.csv").prediction, expected.prediction, rtol=1e-5)
    assert not Path("forecast.png").exists()


@pytest.mark.parametrize("trainer", ["zo", "rate"])
def test_other_trainers(here, capsys, trainer):
    more = {"zo": ["--num_directions", 2], "rate": ["--rate_shrink", "0.01"]}[trainer]
    assert train("out", "--config", SMALL, "--max_steps", 2, "--trainer", trainer, *more) == 0
    assert "held-out wql" in capsys.readouterr().out
    assert json.loads(Path("out/config.json").read_text())["architectures"] == ["MinGRUForPrediction"]


def test_covariates(forecaster, capsys):
    """Known until now, and beforehand, as the model's `predict` has them; in parquet, with whole numbers for times."""
    frame = waves().assign(ds=lambda f: f.groupby("unique_id").cumcount(), heat=lambda f: f.load * f.ds % 7 + 0.5)
    frame.to_parquet("series.parquet")
    coming = frame.groupby("unique_id").tail(5).assign(ds=lambda f: f.ds + 5)[["unique_id", "ds", "load"]]
    coming.assign(y=0.0).to_csv("coming.csv", index=False)
    more = ["--past_covariates", "heat", "--future_covariates", "coming.csv", "--horizon", 5, "--backtest", 1]
    assert command("forecast", "series.parquet", "--model", "model", *more, "--device", "cpu") == 0
    expected = forecaster.predict(frame, 5, past_covariates=["heat"], future_covariates=coming)
    pd.testing.assert_frame_equal(pd.read_csv("forecast.csv"), expected, rtol=1e-6, check_dtype=False)
    without = forecaster.predict(frame, 5)
    assert not np.allclose(without.prediction, expected.prediction, rtol=1e-3)
    y, load, heat = ([part.to_numpy() for _, part in frame.groupby("unique_id")[x]] for x in ("y", "load", "heat"))
    tested = backtest(forecaster, y, 5, 1, heat, load)
    assert f"WQL {tested.metrics()['wql']:.3f}" in capsys.readouterr().out
    assert not np.allclose(tested.predictions, backtest(forecaster, y, 5).predictions, rtol=1e-2)


def test_one_series_of_a_time_zone_without_matplotlib(forecaster, monkeypatch, capsys):
    frame = waves()[lambda f: f.unique_id == "a"].drop(columns=["unique_id", "load"])
    frame.assign(ds=frame.ds.dt.tz_localize("UTC").dt.strftime("%Y-%m-%dT%H:%M:%S+02:00")).to_csv("s.csv", index=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command("forecast", "s.csv", "--model", "model", "--output", "s_next.csv", "--device", "cpu") == 0
    found = pd.read_csv("s_next.csv", parse_dates=["ds"])
    assert list(found)[:2] == ["ds", "prediction"] and found.ds[0] == pd.Timestamp("2026-01-04 16:00")
    assert "drawn" not in capsys.readouterr().out and not Path("s_next.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.csv"], "data: there is no file none.csv"),
        (["notes.txt"], r"data: expected a .csv or .parquet file, got notes.txt"),
        (["empty.csv"], "data: empty.csv cannot be read"),
        (["series.csv", "--time_column", "hour"], "data: expected a column 'hour', got unique_id, ds, y, load"),
        (["series.csv", "--value_column", "sales"], "data: expected a column 'sales', got unique_id, ds, y, load"),
        (["series.csv", "--time_column", "unique_id"], "data: unique_id: expected times or whole numbers"),
        (["series.csv", "--horizon", "9"], r"horizon: expected 1 to 8 steps.*got 9; forecast a coarser series"),
        (["series.csv", "--quantiles", "0.01"], "quantiles: expected what this model predicts, 0.1 to 0.9, got 0.01"),
        (["series.csv", "--quantiles", "a"], "quantiles: expected numbers separated by commas, got 'a'"),
        (["series.csv", "--backtest", "-1"], "backtest: expected a number of horizons, got -1"),
        (["series.csv", "--backtest", "8"], r"origins: expected values before the first of 8 forecasts"),
        (["series.csv", "--past_covariates", "rain"], "data: expected a column 'rain'"),
        (["series.csv", "--future_covariates", "series.csv"], "future_covariates: expected the 8 times from"),
        (["series.csv", "--output", "no/where.csv"], "output: expected a .csv in an existing folder"),
        (["series.csv", "--picture", "x.bmp"], "picture: expected a .png"),
        (["series.csv", "--model", "language"], "model: expected a forecaster of hf_rnn.*got GRUForCausalLM"),
        (["words.csv"], "data: y: expected numbers"),
        (["twice.csv"], "data: ds: expected times that rise within each series"),
    ],
)
def test_bad_input(forecaster, capsys, arguments, message):
    Path("notes.txt").touch()
    Path("empty.csv").touch()
    waves().assign(y="much").to_csv("words.csv", index=False)
    pd.concat([waves(), waves()]).to_csv("twice.csv", index=False)
    hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(hidden_size=8, num_hidden_layers=1)).save_pretrained("language")
    assert command("forecast", *arguments[:1], "--model", "model", "--device", "cpu", *arguments[1:]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("hf-rnn")]
    assert re.search(message, line), line


@pytest.mark.parametrize(
    "more, message",
    [
        (["--trainer", "smt"], "trainer: forecasting trains by backpropagation, zo or rate, got 'smt'"),
        (["--stream"], "stream: expected"),
        (["--model", "transformer"], "model: expected one of .*'tirex2'"),
        (["--model", "./model"], "config: the checkpoint ./model has its own settings"),
        (["--data", "tiny.csv"], "data: expected a series of 40 steps at least"),
    ],
)
def test_bad_training(forecaster, capsys, more, message):
    waves().iloc[:12].to_csv("tiny.csv", index=False)
    assert train("out", "--config", SMALL, *more) == 1
    assert re.search(message, capsys.readouterr().err)
