from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


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
