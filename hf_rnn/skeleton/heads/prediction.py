"""Forecasts of series by any recurrence, in the manner of TiRex (arXiv 2505.23719)."""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import can_return_tuple

from hf_rnn.forecasting.forecaster import ForecasterMixin
from hf_rnn.forecasting.output import ForecastOutput, find_horizon, forecast_output
from hf_rnn.forecasting.scaling import standardize
from hf_rnn.forecasting.series import check_values
from hf_rnn.layers import ResidualMLP
from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig
from hf_rnn.skeleton.inputs import check_known
from hf_rnn.skeleton.modeling_recurrent import RecurrentModel
from hf_rnn.skeleton.pretrained import RecurrentPreTrainedModel


class RecurrentForPrediction(ForecasterMixin, RecurrentPreTrainedModel):
    """Quantiles of the values to come, each series by itself.

    A series is brought to mean 0 and deviation 1, cut into patches, and each patch's output gives the quantiles of the
    next patch; beyond that the model reads patches whose values are missing. What is missing in front of a series'
    first value is padding: it changes nothing.

    Attributes:
        model_class: the architecture's backbone.
    """

    model_class: type[RecurrentModel]

    def __init__(self, config: RecurrentConfig):
        if config.num_input_features != 1:
            raise ValueError(
                f"num_input_features: expected 1, for each series is read by itself, got {config.num_input_features}"
            )
        if config.bidirectional:
            raise ValueError(
                "bidirectional: a forecast has nothing behind it to be read; expected False (TiRex2ForPrediction reads "
                "known covariates from both ends)"
            )
        super().__init__(config)
        self.main_input_name = "past_values"
        self.model = self.model_class(config)
        outputs = len(config.quantiles) * config.patch_size
        self.quantile_head = ResidualMLP(
            config.hidden_size, config.quantile_head_size, outputs, dropout=float(config.hidden_dropout)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        past_values: Tensor,
        future_values: Tensor | None = None,
        horizon: int | None = None,
        **kwargs,
    ) -> ForecastOutput:
        """The model's own forecast of each series; `predict` takes more kinds of them.

        Args:
            past_values: (R, T) floating values up to now, NaN where one is missing. The last `config.context_length`
                are read.
            future_values: (R, horizon), the values that come, NaN where missing or of no interest: there is a loss
                then, the pinball loss in the scale in which the model reads them.
            horizon: steps to predict; None: as many as future_values, or `config.prediction_length`.
            kwargs: `output_hidden_states`, `return_dict`.

        Returns:
            `mean_predictions` (R, horizon), `full_predictions` (R, horizon, Q), `loss`, `hidden_states` if asked for.

        Raises:
            TypeError, ValueError: an argument of another type, shape or value, named in the message.
        """
        check_known(kwargs)
        config = self.config
        rows = check_values("past_values", past_values)
        horizon = find_horizon(horizon, config.prediction_length, rows, future_values=future_values)
        past = past_values[:, -config.context_length :]
        scaling = standardize(past, config.use_arcsinh, config.binary_aware, float(config.scale_eps))
        size = config.patch_size
        more = -(-horizon // size) - 1  # patches to come that are read, all missing
        z = F.pad(scaling.apply(past), (-past.shape[1] % size, more * size), value=torch.nan)
        outputs = self._read(z, None, more, **kwargs)
        z = self.quantiles_of(outputs.last_hidden_state[:, -more - 1 :])[:, :horizon].to(past.dtype)
        forecast = forecast_output(z, scaling, config.quantiles, future_values, None)
        forecast.hidden_states = outputs.hidden_states
        return forecast

    def new_cells(self) -> RecurrentCache:
        return RecurrentCache(len(self.model.layers))

    def encode(self, z: Tensor, cells: RecurrentCache, series: Tensor, ahead: int = 0) -> Tensor:
        now, outputs = z.shape[1] - ahead * self.config.patch_size, []
        if now:
            outputs.append(self._read(z[:, :now], cells, 0).last_hidden_state)
        if ahead:
            outputs.append(self._read(z[:, now:], copy.deepcopy(cells), 0).last_hidden_state)
        return torch.cat(outputs, 1)

    def _read(self, z: Tensor, cells: RecurrentCache | None, more: int, **kwargs):
        """Scaled values (R, L * patch_size), of which the last `more` patches are to come. Without a state to go on
        from, whole patches without a value in front are padding."""
        there, size = ~z.isnan(), self.config.patch_size
        mask = None
        if cells is None or not cells.is_initialized:
            begun = there.unflatten(1, (-1, size)).any(2).cumsum(1) > 0
            begun[:, begun.shape[1] - more - 1 :] = True  # from the output that says what comes first
            mask = begun.repeat_interleave(size, 1)
        return self.model(
            input_features=z.nan_to_num(0.0)[..., None],
            observed_mask=there[..., None],
            attention_mask=mask,
            use_cache=cells is not None,
            cache=cells,
            **kwargs | {"return_dict": True},
        )
