"""Frames in, frames out: the same forecasts as of arrays, at the times that follow."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

import hf_rnn

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_heads=2, patch_size=4, context_length=24, prediction_length=12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return hf_rnn.TiRex2ForPrediction(hf_rnn.TiRex2Config(**SIZES, patch_intermediate_size=16)).eval()


def frame(step="D", start="2024-01-31", lengths=(20, 27)):
    """Series "b" and "a", with `temp` and `holiday` beside them."""
    rng, parts = np.random.default_rng(0), []
    for name, length in zip("ba", lengths, strict=True):
        values = {"y": rng.normal(size=length).cumsum(), "temp": rng.normal(size=length)}
        times = pd.date_range(start, periods=length, freq=step)
        parts.append(pd.DataFrame({"unique_id": name, "ds": times, **values, "holiday": times.day_of_week > 4}))
    return pd.concat(parts, ignore_index=True)


def coming(data, horizon):
    ends = data.groupby("unique_id", sort=False).ds.max()
    parts = [
        pd.DataFrame(
            {"unique_id": name, "ds": pd.date_range(end, periods=horizon + 1)[1:], "holiday": [True] * horizon}
        )
        for name, end in ends.items()
    ]
    return pd.concat(parts[::-1])


def test_the_same_as_of_arrays(model):
    data, future = frame(), coming(frame(), 5)
    series = [part for _, part in data.groupby("unique_id", sort=False)]
    expected = model.predict(
        [part.y.to_numpy() for part in series],
        5,
        [part.temp.to_numpy() for part in series],
        [np.append(part.holiday, np.ones(5)) for part in series],
        quantiles=[0.1, 0.75],
    )
    found = model.predict(data, 5, ["temp"], future, quantiles=[0.1, 0.75])
    assert list(found) == ["unique_id", "ds", "prediction", "0.1", "0.75"]
    np.testing.assert_allclose(found["prediction"], np.concatenate(expected.mean_predictions))
    np.testing.assert_allclose(found[["0.1", "0.75"]], np.concatenate(expected.full_predictions))
    assert found.unique_id.tolist() == ["b"] * 5 + ["a"] * 5
    assert found.ds[5] == data.ds.iloc[-1] + pd.Timedelta("1D")


def test_in_kind(model):
    data = frame()
    expected = model.predict(data, 3)
    one = model.predict(data[data.unique_id == "b"].drop(columns="unique_id"), 3)
    assert list(one)[:2] == ["ds", "prediction"]
    np.testing.assert_allclose(one.prediction, expected.prediction[:3], rtol=1e-5)
    table = model.predict(pa.Table.from_pandas(data), 3)
    rows = model.predict(Dataset.from_pandas(data), 3)
    assert isinstance(table, pa.Table) and isinstance(rows, Dataset)
    for other in (table.to_pandas(), rows.to_pandas()):
        pd.testing.assert_frame_equal(other, expected, check_dtype=False, rtol=1e-5)


@pytest.mark.parametrize("step", ["min", "3h", "W", "ME", "MS", "QS", "YE", "B"])
def test_steps(model, step):
    data = frame(step, lengths=(20, 4))
    found = model.predict(data, 3)
    for name, part in found.groupby("unique_id"):
        times = data.ds[data.unique_id == name]
        assert part.ds.tolist() == pd.date_range(times.min(), periods=len(times) + 3, freq=step)[-3:].tolist()


def test_counted_steps_and_missing_values(model):
    data = frame()[:20].assign(ds=range(10, 50, 2))
    data.loc[4, "y"] = None
    found = model.predict(data, 2)
    assert found.ds.tolist() == [50, 52] and found.prediction.notna().all()


def swap(data):
    return data.iloc[[1, 0, *range(2, len(data))]]


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        (swap, {}, "series: ds: expected times that rise within each series, got 2024-02-01.* and then .* in 'b'"),
        (lambda d: pd.concat([d[:1], d]), {}, "series: ds: .* 2024-01-31.* twice, in 'b'"),
        (lambda d: d.drop(index=[3, 7]), {}, "series: ds: expected one step between times, got several in 'b'"),
        (lambda d: d[:1], {}, "series: ds: expected at least two times"),
        (lambda d: d[:0], {}, "series: expected rows, got none"),
        (lambda d: d.assign(ds=d.ds.where(d.index != 3)), {}, "series: ds: expected a time in each row"),
        (
            lambda d: d.assign(ds=d.ds.dt.tz_localize("Asia/Tokyo")),
            {},
            "series: ds: expected times without a time zone",
        ),
        (lambda d: d.assign(ds="soon"), {}, "series: ds: expected times or whole numbers"),
        (lambda d: d.drop(columns="y"), {}, "series: expected a column 'y', got unique_id, ds, temp, holiday"),
        (lambda d: d.assign(y="high"), {}, "series: y: expected numbers, got String"),
        (lambda d: d.assign(y=np.inf), {}, r"series\[0\]: expected finite values"),
        (lambda d: d, dict(past_covariates=["rain"]), "series: expected a column 'rain'"),
        (lambda d: d, dict(future_covariates=np.ones(3)), "future_covariates: expected a frame beside a frame"),
        (
            lambda d: d,
            dict(future_covariates=coming(frame(), 4)),
            "future_covariates: expected the 3 times from 2024-02",
        ),
        (lambda d: d, dict(future_covariates=coming(frame(), 3)[:3]), "future_covariates: .* of 'b', got none"),
        (lambda d: d[d.unique_id == "a"], dict(future_covariates=coming(frame(), 3)), "'b' is none of the series"),
    ],
)
def test_wrong_frames(model, change, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model.predict(change(frame()), 3, **arguments)
