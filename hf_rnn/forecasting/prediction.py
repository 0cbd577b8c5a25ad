"""`predict`: from what users have to forecasts of it, by a model that takes rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_rnn.forecasting.frames import forecast_frame, is_frame
from hf_rnn.forecasting.output import ForecastOutput, check_horizon
from hf_rnn.forecasting.quantiles import at_quantiles, check_quantiles, is_symmetric
from hf_rnn.forecasting.series import Rows, like, read_series, side_by_side
from hf_rnn.forecasting.streaming import ForecastState, StreamMixin
from hf_rnn.forecasting.trend import differences, has_trend, last_values, levels


class PredictionMixin(StreamMixin):
    """For a model whose `forward` takes `past_values` and `horizon` and whose config has `quantiles`, `context_length`,
    `prediction_length`, `differencing`, `sign_flip`.

    Attributes:
        reads_variates: `forward` takes `future_covariates`, `group_ids`, `target_mask` and `pad_context`, too. Others
            read each variate of a series by itself, and no covariates.
    """

    reads_variates = False

    @torch.no_grad()
    def predict(
        self,
        series: Any,
        horizon: int,
        past_covariates: Any = None,
        future_covariates: Any = None,
        quantiles: Sequence[float] | None = None,
        *,
        differencing: bool | None = None,
        sign_flip: bool | None = None,
        pad_context: bool = True,
        batch_size: int = 256,
        progress: bool = False,
    ) -> Any:
        """Forecast series, each by what is known of it alone.

        Args:
            series: tensor or numpy array: (T,) one series; (B, T) series of one variate each; (B, V, T) of V variates,
                which are forecast together; or a list of (T,) and (V, T), of any lengths. NaN where a value is missing.
                A series of no values at all is forecast, too: around 0. Or a frame: see
                `hf_rnn.forecasting.frames.forecast_frame`, also for covariates. Or a state that `observe` gave, which
                is forecast as it is: without covariates, differences and flips.
            horizon: steps to forecast, up to `config.prediction_length`.
            past_covariates: in the same way, (T,) or (C, T) for each series; what is known until now. None, also for
                one of a list, where there are none. TiRex-2 alone reads covariates.
            future_covariates: (T + horizon,) or (K, T + horizon) for each, what is known beforehand.
            quantiles: which to give, within those of the config, between which they are linear; None: these.
            differencing: series with a trend (a line explains 0.87 of their variance) are forecast by their
                differences; None: as the config says.
            sign_flip: the mean with the negated forecast of the negated series, twice the work; None: as the config
                says.
            pad_context: see TiRex-2's `forward`, others need no padding; where False, a series' forecast depends on the
                longest one of its batch.
            batch_size: so many series at once.
            progress: a bar, where there is more than one batch.

        Returns:
            `mean_predictions`, the medians, (B, horizon) for series (B, T), and `full_predictions` (B, horizon, Q): as
            the series came, tensors on their device, numpy arrays or lists, in float64 for float64 and else float32;
            with V, or without B, as these have it. Of a frame, a frame.

        Raises:
            TypeError, ValueError: an argument of another type, shape or value, named in the message: infinity,
                covariates of other lengths, a horizon or quantiles that the model was not made for.
        """
        config = self.config
        if not self.reads_variates and not (past_covariates is None and future_covariates is None):
            raise ValueError(
                "past_covariates, future_covariates: this model reads each series by itself, TiRex-2 alone reads "
                "covariates; expected None"
            )
        if isinstance(series, ForecastState):
            told = dict(differencing=differencing, sign_flip=sign_flip, future_covariates=future_covariates)
            told["past_covariates"] = past_covariates
            if wrong := [name for name, x in told.items() if not (x is None or x is False)]:
                raise ValueError(f"{wrong[0]}: a state is forecast without; expected None, got {told[wrong[0]]!r}")
            return self._predict_from(series, horizon, quantiles)
        if is_frame(series):
            wanted = list(config.quantiles if quantiles is None else quantiles)
            options: dict[str, Any] = dict(differencing=differencing, sign_flip=sign_flip, pad_context=pad_context)
            options |= dict(batch_size=batch_size, progress=progress)

            def of_arrays(x, past, future):
                return self.predict(x, horizon, past, future, quantiles, **options)

            return forecast_frame(of_arrays, series, horizon, past_covariates, future_covariates, wanted)
        horizon = check_horizon(horizon, config.prediction_length)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if quantiles is not None:
            check_quantiles(quantiles)
        flip = config.sign_flip if sign_flip is None else sign_flip
        if flip and not is_symmetric(config.quantiles):
            raise ValueError(f"sign_flip: expected with each quantile q also 1 - q, got {config.quantiles}")
        difference = config.differencing if differencing is None else differencing
        found = read_series(series, past_covariates, future_covariates, horizon)
        parts = []
        hidden = not progress or len(found) <= batch_size
        for first in tqdm(range(0, len(found), batch_size), "forecasting", disable=hidden):
            rows = side_by_side(found[first : first + batch_size], horizon)
            parts.append(self._forecast(Rows(*(x.to(self.device) for x in rows)), difference, flip, pad_context))
        predictions = torch.cat(parts)
        medians = predictions[..., predictions.shape[2] // 2]
        if quantiles is not None:
            predictions = at_quantiles(predictions, config.quantiles, quantiles)
        return ForecastOutput(
            mean_predictions=like(series, found, medians), full_predictions=like(series, found, predictions)
        )

    def accumulate(self, steps: Tensor, last: Tensor) -> Tensor:
        """Quantiles of differences (R, T, Q) behind the value `last` (R,) to quantiles of values."""
        return levels(self.calibrate(steps), last)

    def _forecast(self, rows: Rows, difference: bool, flip: bool, pad_context: bool) -> Tensor:
        """(R, horizon, Q) of the targets among the rows."""
        values, futures, series, targets, starts = rows
        horizon = futures.shape[1]
        trend = targets & has_trend(values) & difference
        last = last_values(values)
        values = torch.where(trend[:, None], differences(values, starts), values)[:, -self.config.context_length :]
        if flip:
            values, futures = torch.cat([values, -values]), torch.cat([futures, -futures])
            series, targets = torch.cat([series, series + series.max() + 1]), targets.repeat(2)
            trend, last = trend.repeat(2), torch.cat([last, -last])
        options: dict[str, Any] = {}
        if self.reads_variates:
            options = dict(group_ids=series, target_mask=targets, pad_context=pad_context)
            options["future_covariates"] = None if bool(futures.isnan().all()) else futures
        forecast = self(past_values=values, horizon=horizon, **options)  # type: ignore[operator]
        steps, trend, last = forecast.full_predictions[targets], trend[targets], last[targets]
        y = torch.where(trend[:, None, None], self.accumulate(steps, last), self.calibrate(steps))
        if not flip:
            return y
        y, negated = y.chunk(2)
        return (y - negated.flip(2)) / 2
