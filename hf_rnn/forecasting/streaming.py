"""Series that go on: a state that new values cost their patches and nothing else."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from hf_rnn.forecasting.output import ForecastOutput, check_horizon
from hf_rnn.forecasting.quantiles import at_quantiles, check_quantiles
from hf_rnn.forecasting.scaling import Scaling, standardize
from hf_rnn.forecasting.series import read_series, side_by_side


@dataclass
class ForecastState:
    """All that a model keeps of series that go on, R rows of them, whatever their length.

    `observe` and `score` write to it; to go on from one state in several ways, `copy.deepcopy` it.

    Attributes:
        scaling: by which values are read, frozen.
        cells: the recurrences' states behind the last whole patch, a `RecurrentCache`.
        outputs: (R, 1 + A, D), what the model says there of the next patch, and of A more that it has looked ahead.
        pending: (R, r), the values since, r < patch_size.
        series: (R,), which series a row is of.
        seen_steps: steps so far.
        shape: of the series without their time, (), (B,) or (B, V).
        as_numpy: answers are numpy arrays.
    """

    scaling: Scaling
    cells: Any
    outputs: Tensor
    pending: Tensor
    series: Tensor
    seen_steps: int
    shape: tuple[int, ...]
    as_numpy: bool

    def kind(self, x: Tensor) -> Any:
        """(R, ...) as the series came."""
        x = x.view(*self.shape, *x.shape[1:])
        return x.cpu().numpy() if self.as_numpy else x


class StreamMixin:
    """For a model with `encode`, which reads patches and moves states on, and a `quantile_head`."""

    config: Any
    device: Any
    quantile_head: Any

    @abstractmethod
    def new_cells(self) -> Any:
        """The state before the first patch, a `RecurrentCache`."""

    @abstractmethod
    def encode(self, z: Tensor, cells: Any, series: Tensor, ahead: int = 0) -> Tensor:
        """Scaled values (R, L * patch_size), NaN where missing, to (R, L, D); `cells` move on, which the last `ahead`
        patches leave as they are."""

    def quantiles_of(self, x: Tensor) -> Tensor:
        """Each patch's output (R, L, D) to the quantiles of the next patch's scaled values, (R, L * patch_size, Q)."""
        z = self.quantile_head(x).unflatten(-1, (len(self.config.quantiles), -1))
        return z.transpose(2, 3).flatten(1, 2)

    def calibrate(self, quantiles: Tensor) -> Tensor:
        """Quantiles (R, T, Q) as they are told: in their order, which never makes their loss larger (Chernozhukov et
        al., 2010)."""
        return quantiles.sort(-1).values

    @torch.no_grad()
    def observe(
        self,
        values: Any,
        state: ForecastState | None = None,
        scaling: Scaling | None = None,
        horizon: int | None = None,
    ) -> ForecastState:
        """Read the next values of series. Only whole patches are read; what is left waits for the next call.

        Args:
            values: tensor or numpy array: (T,) of one series, (B, T) of B, (B, V, T) of V variates each; NaN where one
                is missing.
            state: what was seen before, updated and returned; None: nothing.
            scaling: by which to read values, without a state; None: that of these values. It stays: where a series
                leaves the range of its first values for good, begin a new state with its latest ones.
            horizon: steps that `predict` will be asked for next: they are looked at in the same pass, and the weights
                read once for both. None: `predict` does it.

        Returns:
            The state, from which `predict(state, horizon)` forecasts as from all values since the first one.

        Raises:
            TypeError, ValueError: values of another type or shape, or of other series than the state's.
        """
        rows = self._rows_of(values, state)
        if horizon is not None:
            check_horizon(horizon, self.config.prediction_length)
        if state is None:
            return self._begin(values, rows, scaling, horizon)[0]
        if scaling is not None:
            raise ValueError("scaling: a state has its own, which stays; expected None")
        self._go_on(rows, state, horizon)
        return state

    @torch.no_grad()
    def score(self, values: Any, state: ForecastState | None = None) -> tuple[Any, ForecastState]:
        """How strange the next values of series are: how far each lies outside the band between the lowest and the
        highest quantile that were forecast for it, in widths of that band; 0 inside.

        Args:
            values, state: as `observe`'s. Values are forecast from the whole patches before them, by up to
                `config.patch_size` steps.

        Returns:
            Scores, in the shape and kind of the values: NaN where one is missing, and for the first patch of a series,
            which nothing is known about; and the state.
        """
        rows = self._rows_of(values, state)
        if state is None:
            state, outputs = self._begin(values, rows, None)
            outputs = outputs[:, :-1]
            ahead = rows.shape[1] - outputs.shape[1] * self.config.patch_size  # of the first patch
            forecast = state.scaling.undo(self.quantiles_of(outputs).to(rows.dtype))
            scores = F.pad(_outside(forecast, rows[:, ahead:]), (ahead, 0), value=torch.nan)
        else:
            first = state.pending.shape[1]
            forecast = state.scaling.undo(self.quantiles_of(self._go_on(rows, state)).to(rows.dtype))
            scores = _outside(forecast[:, first : first + rows.shape[1]], rows)
        return state.kind(scores), state

    def _predict_from(self, state: ForecastState, horizon: int, wanted: Any) -> ForecastOutput:
        """As `predict`."""
        config, known = self.config, state.pending.shape[1]
        check_horizon(horizon, config.prediction_length)
        if wanted is not None:
            check_quantiles(wanted)
        outputs, ahead = state.outputs, self._ahead(known, horizon)
        if ahead >= outputs.shape[1]:
            z = state.scaling.apply(self._filled(state.pending, ahead))
            outputs = torch.cat([outputs[:, :1], self.encode(z, state.cells, state.series, ahead)], 1)
        outputs = outputs[:, : 1 + ahead]
        z = self.quantiles_of(outputs)[:, known : known + horizon].to(state.pending.dtype)
        predictions = self.calibrate(state.scaling.undo(z))
        medians = predictions[..., predictions.shape[2] // 2]
        if wanted is not None:
            predictions = at_quantiles(predictions, config.quantiles, wanted)
        return ForecastOutput(mean_predictions=state.kind(medians), full_predictions=state.kind(predictions))

    def _rows_of(self, values: Any, state: ForecastState | None) -> Tensor:
        if not isinstance(values, Tensor | ndarray):
            raise TypeError(f"values: expected a tensor or a numpy array, got a {type(values).__name__}")
        rows = side_by_side(read_series(values, None, None, 0), 0).values.to(self.device)
        if state is None:
            return rows
        if values.shape[:-1] != state.shape:
            raise ValueError(
                f"values: expected those of the state's series, {(*state.shape, 'T')}, got {tuple(values.shape)}"
            )
        return rows.to(state.pending.dtype)

    def _begin(
        self, values: Any, rows: Tensor, scaling: Scaling | None, horizon: int | None = None
    ) -> tuple[ForecastState, Tensor]:
        """The state behind the first values and each patch's output (R, L, D); patches are counted from the end, the
        first is filled up by missing values."""
        config, shape = self.config, tuple(values.shape[:-1])
        if scaling is None:
            scaling = standardize(rows, config.use_arcsinh, config.binary_aware, float(config.scale_eps))
        elif scaling.loc.shape != (len(rows), 1):
            raise ValueError(f"scaling: expected that of {len(rows)} rows, got {tuple(scaling.loc.shape)}")
        variates = shape[1] if len(shape) == 2 else 1
        series = torch.arange(len(rows), device=rows.device) // variates
        size, cells, ahead = config.patch_size, self.new_cells(), self._ahead(0, horizon)
        z = F.pad(scaling.apply(rows), (-rows.shape[1] % size, ahead * size), value=torch.nan)
        outputs = self.encode(z, cells, series, ahead)
        now = outputs.shape[1] - ahead
        state = ForecastState(
            scaling,
            cells,
            outputs[:, now - 1 :],
            rows[:, :0],
            series,
            rows.shape[1],
            shape,
            isinstance(values, ndarray),
        )
        return state, outputs[:, :now]

    def _go_on(self, rows: Tensor, state: ForecastState, horizon: int | None = None) -> Tensor:
        """Move the state on; the outputs (R, 1 + L, D) of the last patch before and of the L that became whole."""
        values = torch.cat([state.pending, rows], 1)
        left = values.shape[1] % self.config.patch_size
        whole, ahead = values.shape[1] - left, self._ahead(left, horizon)
        outputs = state.outputs[:, :1]
        if whole or ahead:
            z = torch.cat([values[:, :whole], self._filled(values[:, whole:], ahead)], 1)
            x = self.encode(state.scaling.apply(z), state.cells, state.series, ahead)
            outputs = torch.cat([outputs, x], 1)
        now = outputs.shape[1] - ahead
        state.outputs, state.pending = outputs[:, now - 1 :].clone(), values[:, whole:].clone()
        state.seen_steps += rows.shape[1]
        return outputs[:, :now]

    def _ahead(self, pending: int, horizon: int | None) -> int:
        """Patches behind the last whole one that are read for a forecast: the first has what is pending."""
        return 0 if horizon is None else -(-(pending + horizon) // self.config.patch_size) - 1

    def _filled(self, pending: Tensor, patches: int) -> Tensor:
        """(R, r) as so many patches, what is to come missing; as none, nothing."""
        length = patches * self.config.patch_size
        return F.pad(pending, (0, max(length - pending.shape[1], 0)), value=torch.nan)[:, :length]


def _outside(quantiles: Tensor, values: Tensor) -> Tensor:
    """How far values (R, T) lie outside the band of their quantiles (R, T, Q), in widths of it; of a band without
    width, infinitely far. Quantiles of a model that has learnt little may cross: the band holds all of them."""
    low, high = quantiles.aminmax(dim=-1)
    distance = torch.maximum(low - values, values - high).clamp_min(0.0)
    return torch.where(distance > 0, distance / (high - low), distance)
