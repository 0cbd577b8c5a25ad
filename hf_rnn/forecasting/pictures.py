"""Pictures of forecasts: behind the end of their series or over what came, and how well quantiles are calibrated."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Okabe and Ito's colours, told apart by everyone
BLACK, BLUE, GREY = "#000000", "#0072B2", "#999999"
MOST = 9  # series of one picture
BEFORE = 3  # horizons of a series that are drawn before its first forecast


class Forecast(NamedTuple):
    """What was said of some times.

    Attributes:
        times: (H,), datetime64 or numbers.
        median: (H,).
        quantiles: (H, Q), from the lowest to the highest.
    """

    times: numpy.ndarray
    median: numpy.ndarray
    quantiles: numpy.ndarray


class Panel(NamedTuple):
    """A series, and forecasts of it: one behind its end, or several from earlier origins.

    Attributes:
        name: "" for none.
        times: (T,), datetime64 or numbers.
        values: (T,), NaN where missing.
    """

    name: str
    times: numpy.ndarray
    values: numpy.ndarray
    forecasts: Sequence[Forecast]


def draw_forecasts(
    panels: Sequence[Panel],
    quantiles: Sequence[float],
    path: str | Path,
    value: str = "value",
    time: str = "time",
) -> Path | None:
    """Draw the ends of series with their forecasts, a band between each quantile and its counterpart.

    Args:
        panels: the first 9 are drawn.
        quantiles: Q numbers, those of the forecasts.
        path: a .png, .svg or .pdf.
        value, time: what the axes are called.

    Returns:
        The path; None where matplotlib is missing.
    """
    drawn = panels[:MOST]
    columns = math.ceil(math.sqrt(len(drawn) / 1.5))
    rows = math.ceil(len(drawn) / columns)
    figure = _figure(*((9, 4) if len(drawn) == 1 else (5 * columns, 2.6 * rows + 0.6)))
    if figure is None:
        return None
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, drawn, strict=False):
        _draw_panel(axes, panel, quantiles)
    for axes in grid[len(drawn) :]:
        axes.remove()
    figure.supylabel(value)
    figure.supxlabel(time if len(drawn) == len(panels) else f"{time} ({len(drawn)} of {len(panels)} series)")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)
    return Path(path)


def _draw_panel(axes: Any, panel: Panel, quantiles: Sequence[float]) -> None:
    first = panel.forecasts[0].times[0]
    shown = max(0, int(numpy.searchsorted(panel.times, first)) - BEFORE * len(panel.forecasts[0].times))
    axes.plot(panel.times[shown:], panel.values[shown:], color=BLACK, linewidth=1.1, zorder=3, label="values")
    for number, one in enumerate(panel.forecasts):
        named = number == 0
        for low in range(len(quantiles) // 2):  # the outer ones below
            told = f"quantiles {quantiles[0]:g} to {quantiles[-1]:g}" if named and low == 0 else None
            band = one.quantiles[:, low], one.quantiles[:, -1 - low]
            axes.fill_between(one.times, *band, color=BLUE, alpha=0.18, linewidth=0, label=told)
        axes.plot(one.times, one.median, color=BLUE, linewidth=1.4, label="median" if named else None)
        if len(panel.forecasts) > 1:
            told = "a forecast begins" if named else None
            axes.axvline(one.times[0], color=GREY, linewidth=0.8, linestyle=":", label=told)
    axes.set_title(panel.name, fontsize=10)
    axes.grid(alpha=0.25)
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.times.dtype.kind == "M":
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator = AutoDateLocator(minticks=3, maxticks=7)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def draw_calibration(
    values: numpy.ndarray, predictions: numpy.ndarray, quantiles: Sequence[float], path: str | Path
) -> Path | None:
    """Draw the share of true values below each predicted quantile: the quantile itself, where it is calibrated.

    Args:
        values: (...), NaN where missing.
        predictions: (..., Q).
        quantiles: Q numbers.
        path: a .png, .svg or .pdf.

    Returns:
        The path; None where matplotlib is missing.
    """
    figure = _figure(4.6, 4.6)
    if figure is None:
        return None
    there = ~numpy.isnan(values)
    shares = (values[there][:, None] <= predictions[there]).mean(0)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    axes.plot(quantiles, shares, color=BLUE, marker="o", label=f"{int(there.sum()):,} forecast values")
    axes.set(xlabel="predicted quantile", ylabel="share of true values below it", xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return Path(path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture of the forecast: pip install matplotlib")
        return None
    return Figure(figsize=(width, height), layout="constrained")
