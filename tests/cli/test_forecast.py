"""`hf-rnn train --task forecasting` and `hf-rnn forecast`, on files."""

import numpy as np
import pandas as pd
import pytest

import hf_rnn
from hf_rnn.cli.main import main

CONFIG = "hidden_size=16,num_hidden_layers=1,patch_size=4,context_length=32,prediction_length=8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table of two series and a forecaster trained on it for two steps."""
    folder = tmp_path_factory.mktemp("forecast")
    frames = [
        pd.DataFrame(
            {
                "unique_id": name,
                "ds": pd.date_range("2026-01-01", periods=60, freq="D"),
                "y": shift + np.sin(np.arange(60) / 3),
            }
        )
        for name, shift in (("north", 5.0), ("south", 9.0))
    ]
    pd.concat(frames).to_csv(folder / "series.csv", index=False)
    told = [
        "--data",
        str(folder / "series.csv"),
        "--output_dir",
        str(folder / "model"),
        "--use_cpu",
        "--max_steps",
        "2",
    ]
    assert main(["train", "--task", "forecasting", "--model", "mingru", "--config", CONFIG, *told]) == 0
    return folder


def test_trains(folder):
    assert {"config.json", "model.safetensors", "forecast.png", "loss.png"} <= {
        x.name for x in (folder / "model").iterdir()
    }
    model = hf_rnn.MinGRUForPrediction.from_pretrained(folder / "model")
    assert model.config.prediction_length == 8
    assert "mase" in (folder / "model" / "README.md").read_text()


def test_forecasts(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    told = [
        "--model",
        "model",
        "--horizon",
        "5",
        "--quantiles",
        "0.1,0.5,0.9",
        "--backtest",
        "2",
        "--output",
        "out.csv",
    ]
    assert main(["forecast", "series.csv", *told]) == 0
    found = pd.read_csv("out.csv")
    assert list(found.columns) == ["unique_id", "ds", "prediction", "0.1", "0.5", "0.9"] and len(found) == 10
    assert found["ds"].iloc[0] == "2026-03-02" and (found["0.1"] <= found["0.9"]).all()
    assert {"out.png", "out-backtest.png", "out-calibration.png"} <= {x.name for x in folder.iterdir()}
    assert "MASE" in capsys.readouterr().out
    model = hf_rnn.MinGRUForPrediction.from_pretrained("model").eval()
    values = 5.0 + np.sin(np.arange(60) / 3)
    expected = model.predict(values, 5).mean_predictions
    np.testing.assert_allclose(found["prediction"][:5], expected, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.csv"], "data: there is no file nowhere.csv"),
        (["series.txt"], "data: expected a .csv or .parquet file"),
        (["series.csv", "--value_column", "sales"], "data: expected a column 'sales'"),
        (["series.csv", "--horizon", "9"], "horizon: expected 1 to 8 steps"),
        (["series.csv", "--quantiles", "a"], "quantiles: expected numbers"),
        (["series.csv", "--picture", "x.gif"], "picture: expected a .png"),
        (["series.csv", "--backtest", "20"], "backtest: expected 102 rows"),
        (["series.csv", "--time_column", "unique_id"], "unique_id: expected times"),
    ],
)
def test_refuses(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["forecast", "--model", "model", "--horizon", "5", "--output", "x.csv", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_short_series_cannot_be_held_out(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame({"ds": range(20), "y": np.arange(20.0)})
    frame.to_csv("short.csv", index=False)
    told = ["train", "--task", "forecasting", "--data", "short.csv", "--config", CONFIG, "--use_cpu"]
    assert main(told) == 1
    assert "data: expected a series of 40 steps at least" in capsys.readouterr().err
