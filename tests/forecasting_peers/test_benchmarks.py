"""What benchmarks/forecasting.py measures on: the series, what is held out of them, its networks."""

import math
from pathlib import Path

import numpy
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_series_and_what_is_held_out():
    import forecasting
    from real_series import real_series

    series = real_series()
    assert len({x.name for x in series}) == len(series) > 50
    assert {x.kind for x in series if x.known} == {"yearly", "quarterly", "monthly"}
    assert sum(not x.known for x in series) > 10
    # What training, validation and test have in common: no value to be forecast
    known = [x for x in series if x.known]
    trained = [len(x) for x in forecasting.windows(0).series]
    for x, steps in zip(known, trained, strict=False):
        assert steps == len(x.values) - 2 * x.horizon
    for x, past, future in forecasting.places(validation=True):
        assert x.known and len(past) + 2 * x.horizon == len(x.values) and len(future) == x.horizon
    tested = forecasting.places(validation=False)
    assert {forecasting.group_of(x) for x, _, _ in tested} == set(forecasting.GROUPS)
    for x, past, future in tested:
        assert numpy.array_equal(numpy.concatenate([past, future]), x.values, equal_nan=True)
        assert len(future) == x.horizon
    # Every synthetic series that is tested is another than those that are trained on
    new = [x.values for x, _, _ in tested if x.kind == "synthetic"]
    old = forecasting.windows(0).series[len(known) :]
    assert not any(numpy.array_equal(x, y) for x in new for y in old[: 10 * len(new)])


def test_networks_are_of_equal_size():
    import forecasting

    with torch.device("meta"):
        sizes = {name: forecasting.make(name).num_parameters() for name in forecasting.NETWORKS}
    assert sizes == {name: pytest.approx(forecasting.PARAMETERS, rel=0.1) for name in sizes}


def test_naive_is_the_measure_of_all():
    import forecasting

    naive = forecasting.run_peer("seasonal naive")["scores"]
    for row in forecasting.summary(naive, naive).values():
        assert row["wql"] == pytest.approx(1.0) and math.isfinite(row["mase"])
