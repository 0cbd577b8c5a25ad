from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from hf_rnn.forecasting.quantiles import pinball_loss
from hf_rnn.forecasting.scaling import Scaling


@dataclass
class ForecastOutput(ModelOutput):
    """A forecast, under the names of transformers' models of time series.

    Attributes:
        loss: where the values to come were given.
        mean_predictions: (R, horizon), the median, or the quantile in the middle.
        full_predictions: (R, horizon, Q), all quantiles.
        hidden_states: as asked for.
    """

    loss: Tensor | None = None
    mean_predictions: Any = None
    full_predictions: Any = None
    hidden_states: tuple[Tensor, ...] | None = None


def forecast_output(
    z: Tensor, scaling: Scaling, quantiles: Sequence[float], future_values: Tensor | None, targets: Tensor | None
) -> ForecastOutput:
    """Quantiles z (R, T, Q) of scaled values as a forecast, and its loss: in the scale in which values are read, the
    mean over the `targets` (R,) among the rows, None: all, whose values are there."""
    loss = None
    if future_values is not None:
        there = ~future_values.isnan()
        there = there if targets is None else there & targets[:, None]
        loss = pinball_loss(z, scaling.apply(future_values), quantiles, there)
    predictions = scaling.undo(z)
    medians = predictions[..., predictions.shape[2] // 2]
    return ForecastOutput(loss=loss, mean_predictions=medians, full_predictions=predictions)


def find_horizon(horizon: int | None, longest: int, rows: int, **futures: Tensor | None) -> int:
    """The horizon that forward was told, or that its arguments about the future (R, horizon) have, or the longest.

    Raises:
        TypeError, ValueError: one that the model was not made for; arguments of another shape.
    """
    given = {name: x for name, x in futures.items() if x is not None}
    if horizon is None:
        horizon = next((x.shape[-1] for x in given.values()), longest)
    check_horizon(horizon, longest)
    for name, x in given.items():
        if x.shape != (rows, horizon) or not x.is_floating_point():
            raise ValueError(
                f"{name}: expected floating (R, horizon) = {(rows, horizon)}, got {tuple(x.shape)}, {x.dtype}"
            )
    return horizon


def check_horizon(horizon: int, longest: int) -> int:
    """The horizon.

    Raises:
        TypeError, ValueError: none that the model was made for.
    """
    if not isinstance(horizon, int) or isinstance(horizon, bool):
        raise TypeError(f"horizon: expected a whole number of steps, got {horizon!r}")
    if not 1 <= horizon <= longest:
        raise ValueError(
            f"horizon: expected 1 to {longest} steps, which this model was made for (config.prediction_length), got "
            f"{horizon}; forecast a coarser series, or train a model with a longer prediction_length"
        )
    return horizon
