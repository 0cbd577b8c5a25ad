"""Measured series out of packages that bring them along: data sets of statsmodels and aeon, nothing downloaded.

What stands in one package's set is in no other's here: AirPassengers once, CO2 by months alone.
"""

import importlib
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np


class NamedSeries(NamedTuple):
    """A series.

    Attributes:
        name: of the set, and of the series in it.
        kind: "yearly", "quarterly", "monthly", "half-hourly" or "synthetic".
        values: (T,), NaN where missing.
        known: whether it is trained on but for its end; others are never seen in training.
    """

    name: str
    kind: str
    values: np.ndarray
    known: bool

    @property
    def season(self) -> int:
        """Steps of one; where none is known, 1."""
        return {"quarterly": 4, "monthly": 12, "half-hourly": 48}.get(self.kind, 1)

    @property
    def horizon(self) -> int:
        """Steps to forecast, those of the M4 competition."""
        return {"yearly": 6, "quarterly": 8, "monthly": 18}.get(self.kind, 48)


SHORTEST = 36  # steps of a series, of which a third is held out where it is yearly
UNKNOWN = ("airline", "lynx", "danish_data", "elec_equip", "solar", "m1_yearly 15", "m1_yearly 16")  # begin so


def _statsmodels(name: str):
    return importlib.import_module(f"statsmodels.datasets.{name}").load_pandas().data


@cache
def real_series() -> list[NamedSeries]:
    """All of them.

    Raises:
        ImportError: statsmodels or aeon is missing.
    """
    import aeon.datasets as aeon

    found: list[tuple[str, str, np.ndarray]] = []

    def add(kind: str, name: str, values) -> None:
        found.append((name, kind, np.asarray(values, np.float64)))

    add("yearly", "sunspots", _statsmodels("sunspots").SUNACTIVITY)
    add("yearly", "nile", _statsmodels("nile").volume)
    add("yearly", "lynx", aeon.load_lynx())
    path = Path(aeon.__file__).parent / "data" / "m1_yearly_dataset" / "m1_yearly_dataset.tsf"
    for number, values in enumerate(aeon.load_from_tsf_file(str(path))[0]["series_value"]):
        add("yearly", f"m1_yearly {number}", values)
    quarters = {"macrodata": ["year", "quarter"], "interest_inflation": ["year", "quarter"], "danish_data": []}
    for name, dates in quarters.items():
        for column, values in _statsmodels(name).drop(columns=dates).items():
            add("quarterly", f"{name} {column}", values)
    for number, values in enumerate(aeon.load_uschange()):
        add("quarterly", f"uschange {number}", values)
    add("monthly", "airline", aeon.load_airline())
    add("monthly", "pbs", aeon.load_PBS_dataset())
    add("monthly", "elec_equip", _statsmodels("elec_equip").iloc[:, 0])
    add("monthly", "elnino", _statsmodels("elnino").drop(columns="YEAR").to_numpy().flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add("monthly", "co2", _statsmodels("co2").co2.resample("MS").mean())
    add("half-hourly", "solar", aeon.load_solar())
    return [
        NamedSeries(name, kind, values, not name.startswith(UNKNOWN))
        for name, kind, values in found
        if len(values) >= SHORTEST
    ]
