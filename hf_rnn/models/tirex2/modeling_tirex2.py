"""TiRex-2: forecasts of series, alone or with covariates, by xLSTMs over patches (arXiv 2607.01204)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from hf_rnn.forecasting.embedding import mean_of_patches
from hf_rnn.forecasting.forecaster import ForecasterMixin
from hf_rnn.forecasting.output import ForecastOutput, find_horizon, forecast_output
from hf_rnn.forecasting.scaling import Scaling, standardize
from hf_rnn.forecasting.series import check_values
from hf_rnn.forecasting.trend import DIFFERENCE_BAND, calibrated, levels
from hf_rnn.layers import GatedFeedForward, ResidualMLP, RMSNorm
from hf_rnn.models.tirex2.cells import PatchMLSTM, PatchSLSTM
from hf_rnn.models.tirex2.configuration_tirex2 import TiRex2Config
from hf_rnn.models.tirex2.conversion_tirex2 import other_names, tirex_weights
from hf_rnn.models.tirex2.variates import Groups, VariateMixer
from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.heads.labels import check_sequence_labels, count_labels
from hf_rnn.skeleton.inputs import check_known
from hf_rnn.skeleton.pretrained import RecurrentPreTrainedModel
from hf_rnn_kernels.layout import ROWS

register_checkpoint_conversion_mapping(TiRex2Config.model_type, [*other_names(), *tirex_weights()])


_ALL = slice(None)  # patches


@dataclass
class TiRex2Output(BaseModelOutput):
    """What `TiRex2Model` gives.

    Attributes:
        last_hidden_state: (R, L, hidden_size), of each patch.
        scaling: of each row, the `Scaling` under which its values were read.
    """

    scaling: Scaling | None = None


class TiRex2Block(GradientCheckpointingLayer):
    """x += recurrence(norm(x)), x += SwiGLU(norm(x)), each row for itself; then attention over a series' variates.

    Covariates known over the horizon are read from both ends by one recurrence, whose two outputs one matrix makes one.
    """

    def __init__(self, config: TiRex2Config, layer_idx: int):
        super().__init__()
        width, self.layer_idx = config.hidden_size, layer_idx
        is_slstm = layer_idx in config.slstm_blocks
        self.mixer_norm = RMSNorm(width, eps=config.norm_eps)
        self.mlstm = None if is_slstm else PatchMLSTM(config)  # type: ignore[arg-type]
        self.slstm = PatchSLSTM(config, layer_idx) if is_slstm else None
        self.directions_proj = nn.Linear(2 * width, width, bias=False)
        self.ff_norm = RMSNorm(width, eps=config.norm_eps)
        self.ff = GatedFeedForward(width, config.sizes["intermediate_size"], F.silu, bias=False)
        self.variates = VariateMixer(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        known: Tensor | None = None,
        groups: Groups | None = None,
        cache: RecurrentCache | None = None,
        ahead: int = 0,
        wanted: slice = _ALL,
    ) -> Tensor:
        """x (R, L, D), the rows `known` over the horizon (K,) and the series of several rows to (R, L, D), or to the
        `wanted` of its L patches; reads and writes its layer's state in `cache` where there is one, which the last
        `ahead` patches leave as it is."""
        x = (x + self._recurrence(self.mixer_norm(x), known, cache, ahead))[:, wanted]
        x = x + self.ff(self.ff_norm(x))
        return x if groups is None else self.variates(x, groups)

    def _recurrence(self, x: Tensor, known: Tensor | None, cache: RecurrentCache | None, ahead: int) -> Tensor:
        cell = self.mlstm or self.slstm
        assert cell is not None
        y, state = cell(x, None if cache is None else cache[self.layer_idx], ROWS, ahead)
        if cache is not None:
            cache.update(state, self.layer_idx)
        if known is None:
            return y
        backwards, _ = cell(x[known], None, ROWS._replace(reverse=True))
        both = torch.cat([y[known], backwards], -1)
        return y.index_copy(0, known, self.dropout(self.directions_proj(both)))


def _residual_mlp(config: TiRex2Config, inputs: int, hidden: Any, outputs: int) -> ResidualMLP:
    return ResidualMLP(inputs, hidden, outputs, config.hidden_act, float(config.hidden_dropout))


class TiRex2PreTrainedModel(RecurrentPreTrainedModel):
    """Loading, saving and initialisation; `tirex-2`'s own checkpoints are read as they are."""

    config_class = TiRex2Config
    main_input_name = "past_values"
    _no_split_modules = ["TiRex2Block"]
    _skip_keys_device_placement: list[str] = []
    _can_compile_fullgraph = False
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": TiRex2Block}

    def __init__(self, config: TiRex2Config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.main_input_name = "past_values"


class TiRex2Model(TiRex2PreTrainedModel):
    """Scaling, patches and blocks, without a head."""

    def __init__(self, config: TiRex2Config):
        config.validate()  # loading sets what it is told beside the file's
        super().__init__(config)
        width = config.hidden_size
        self.patch_embedding = _residual_mlp(config, 2 * config.patch_size, config.patch_intermediate_size, width)
        self.layers = nn.ModuleList(TiRex2Block(config, index) for index in range(config.num_hidden_layers))
        self.norm: nn.Module = nn.Identity()
        if config.output_norm_eps is not None:
            self.norm = RMSNorm(width, eps=config.output_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        past_values: Tensor,
        group_ids: Tensor | None = None,
        target_mask: Tensor | None = None,
        known_mask: Tensor | None = None,
        wanted: slice = _ALL,
        **kwargs,
    ) -> TiRex2Output:
        """Run the model over rows of values: R of them, each a series or a variate of one.

        Args:
            past_values: (R, T) floating values, NaN where one is missing. L = ceil(T / patch_size) patches are counted
                from the end.
            group_ids: (R,) whole numbers, the same for rows of one series; None: each row is one.
            target_mask: (R,) bool, False for covariates, which do not see the series' targets; None: all are targets.
            known_mask: (R,) bool, True for covariates that are read from both ends; None: none is.
            wanted: of which of the L patches the output is asked for: the last block computes no others.
            kwargs: `output_hidden_states`, `return_dict`.

        Returns:
            `last_hidden_state` (R, L, hidden_size), of the `wanted` patches alone; `scaling`; `hidden_states` if asked
            for.

        Raises:
            TypeError, ValueError: an argument of another type, shape or value, named in the message.
        """
        check_known(kwargs)
        rows = check_values("past_values", past_values)
        group_ids, target_mask = of_rows(rows, past_values, group_ids=group_ids, target_mask=target_mask)
        scaling = standardize(
            past_values, self.config.use_arcsinh, self.config.binary_aware, float(self.config.scale_eps)
        )
        known = None if known_mask is None else known_mask.nonzero()[:, 0]
        groups = None if group_ids is None else Groups.of(group_ids, target_mask)
        x = self.encode(scaling.apply(past_values), known, groups, wanted=wanted)
        return TiRex2Output(last_hidden_state=x, scaling=scaling)  # type: ignore[arg-type]

    def encode(
        self,
        z: Tensor,
        known: Tensor | None,
        groups: Groups | None,
        cache: RecurrentCache | None = None,
        ahead: int = 0,
        wanted: slice = _ALL,
    ) -> Tensor:
        """Scaled values (R, T), the rows known over the horizon (K,) and the series of several rows to (R, L, D), or to
        the `wanted` of its L patches; the state `cache` moves on, which the last `ahead` patches leave as it is."""
        x = self.patch_embedding(self._patches(z))
        *others, last = self.layers
        for layer in others:
            x = layer(x, known, groups, cache=cache, ahead=ahead)
        x = last(x, known, groups, cache=cache, ahead=ahead, wanted=wanted)
        return self.norm(x)

    def _patches(self, z: Tensor) -> Tensor:
        """(R, T) to (R, L, 2 P): P values, zeros where they are missing, and ones where they are not."""
        size, dtype = self.config.patch_size, self.patch_embedding.skip_proj.weight.dtype
        z = F.pad(z, (-z.shape[1] % size, 0), value=torch.nan).unflatten(1, (-1, size))
        missing = z.isnan()
        return torch.cat([z.masked_fill(missing, 0.0).to(dtype), (~missing).to(dtype)], -1)


class TiRex2ForPrediction(ForecasterMixin, TiRex2PreTrainedModel):
    """Quantiles of the values to come."""

    reads_variates = True

    def __init__(self, config: TiRex2Config):
        super().__init__(config)
        self.model = TiRex2Model(config)
        outputs = len(config.quantiles) * config.patch_size
        self.quantile_head = _residual_mlp(config, config.hidden_size, config.quantile_head_size, outputs)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        past_values: Tensor,
        future_values: Tensor | None = None,
        future_covariates: Tensor | None = None,
        group_ids: Tensor | None = None,
        target_mask: Tensor | None = None,
        horizon: int | None = None,
        pad_context: bool = True,
        **kwargs,
    ) -> ForecastOutput:
        """The model's own forecast of each row, a series or a variate of one; `predict` makes it better.

        Args:
            past_values: (R, T) floating values up to now, NaN where one is missing. The last `config.context_length`
                are read.
            future_values: (R, horizon), the values that come, NaN where missing or of no interest: there is a loss
                then, the pinball loss of the targets in the scale in which the model reads them.
            future_covariates: (R, horizon), values of covariates known beforehand; NaN for others and for targets.
            group_ids: (R,) whole numbers, the same for rows of one series; None: each row is one.
            target_mask: (R,) bool, False for covariates; None: all rows are targets.
            horizon: steps to predict; None: as many as future_values or future_covariates, or
                `config.prediction_length`.
            pad_context: shorter rows are read as the last values of `config.context_length`, as in training. False is
                less work and a little less accurate (`tirex-2`).
            kwargs: `output_hidden_states`, `return_dict`.

        Returns:
            `mean_predictions` (R, horizon), `full_predictions` (R, horizon, Q), `loss`, `hidden_states` if asked for.

        Raises:
            TypeError, ValueError: an argument of another type, shape or value, named in the message.
        """
        rows = check_values("past_values", past_values)
        futures = dict(future_values=future_values, future_covariates=future_covariates)
        horizon = find_horizon(horizon, self.config.prediction_length, rows, **futures)
        _, target_mask = of_rows(rows, past_values, group_ids=group_ids, target_mask=target_mask)
        window, known, first = self._window(past_values, future_covariates, target_mask, horizon, pad_context)
        wanted = slice(first, first - (-horizon // self.config.patch_size))
        whole = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        read = _ALL if whole else wanted
        outputs = self.model(window, group_ids, target_mask, known, read, **kwargs | {"return_dict": True})
        x = self.dropout(outputs.last_hidden_state[:, wanted] if whole else outputs.last_hidden_state)
        z = self.quantiles_of(x)[:, :horizon].to(window.dtype)
        forecast = forecast_output(z, outputs.scaling, self.config.quantiles, future_values, target_mask)
        forecast.hidden_states = outputs.hidden_states
        return forecast

    def new_cells(self) -> RecurrentCache:
        return RecurrentCache(self.config.num_hidden_layers)

    def encode(self, z: Tensor, cells: RecurrentCache, series: Tensor, ahead: int = 0) -> Tensor:
        groups = Groups.of(series, torch.ones_like(series, dtype=torch.bool))
        return self.model.encode(z, None, groups, cells, ahead)

    def calibrate(self, quantiles: Tensor) -> Tensor:
        return calibrated(quantiles)

    def accumulate(self, steps: Tensor, last: Tensor) -> Tensor:
        return levels(steps, last, DIFFERENCE_BAND)

    def _window(
        self, past: Tensor, future: Tensor | None, targets: Tensor, horizon: int, pad_context: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """What the model reads (R, T), which rows are known over the horizon (R,), or None where none is, and the patch
        whose output is the horizon's first."""
        length, size = self.config.context_length, self.config.patch_size
        past = past[:, -length:]
        if pad_context:
            past = F.pad(past, (length - past.shape[1], 0), value=torch.nan)
        first = -(-past.shape[1] // size) - 1
        if future is not None:
            future = future.to(past.dtype).masked_fill(targets[:, None], torch.nan)
            known = ~future.isnan().all(1)
            if bool(known.any()):  # backwards all of the horizon is read that the model was made for
                future = F.pad(future, (0, self.config.prediction_length - horizon), value=torch.nan)
                return torch.cat([past, future], 1), known, first
        # Forwards nothing depends on what follows, and a patch's output is of the next one
        return F.pad(past, (0, -(-horizon // size) * size - size), value=torch.nan), None, first


class TiRex2ForSequenceClassification(TiRex2PreTrainedModel):
    """A class, several, or numbers for each series: a linear layer on the mean over its patches and variates.

    Begins with a forecaster's weights: `from_pretrained(forecaster, num_labels=...)`.
    """

    accepts_loss_kwargs = False  # its loss is a mean, which Trainer divides by the accumulated batches

    def __init__(self, config: TiRex2Config):
        super().__init__(config)
        self.num_labels = count_labels(config)
        self.model = TiRex2Model(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, past_values: Tensor, labels: Tensor | None = None, group_ids: Tensor | None = None, **kwargs
    ) -> SequenceClassifierOutput:
        """Logits of each series.

        Args:
            past_values: (R, T) floating values, NaN where one is missing. The last `config.context_length` are read,
                fewer with missing ones in front. A series' own level and deviation are not seen.
            labels: (G,) classes, (G, num_labels) of several or of numbers: as `config.problem_type` says.
            group_ids: (R,) whole numbers, the same for the variates of one series, which are G in the order of their
                ids; None: each row is one.
            kwargs: `output_hidden_states`, `return_dict`.

        Returns:
            `logits` (G, num_labels), `loss`, `hidden_states` if asked for.

        Raises:
            TypeError, ValueError: an argument of another type, shape or value, named in the message.
        """
        check_values("past_values", past_values)
        length = self.config.context_length
        values = F.pad(past_values, (max(length - past_values.shape[1], 0), 0), value=torch.nan)[:, -length:]
        outputs = self.model(values, group_ids, **kwargs | {"return_dict": True})
        x = mean_of_patches(outputs.last_hidden_state, values, self.config.patch_size)
        if group_ids is not None:
            ids, series = group_ids.unique(return_inverse=True)
            x = x.new_zeros(len(ids), x.shape[1]).index_add(0, series, x) / series.bincount()[:, None]
        logits = self.score(self.dropout(x))
        loss = None
        if labels is not None:
            check_sequence_labels(labels, logits, self.config)
            loss = self.loss_function(labels=labels, pooled_logits=logits, logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def of_rows(
    rows: int, like: Tensor, group_ids: Tensor | None, target_mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """The series that rows are of, and whether they are targets.

    Raises:
        TypeError, ValueError: other shapes or types.
    """
    if target_mask is None:
        target_mask = torch.ones(rows, dtype=torch.bool, device=like.device)
    for name, x in (("group_ids", group_ids), ("target_mask", target_mask)):
        if x is not None and x.shape != (rows,):
            raise ValueError(f"{name}: expected shape (R,) = {(rows,)}, got {tuple(x.shape)}")
    if target_mask.dtype != torch.bool:
        raise TypeError(f"target_mask: expected bool, got {target_mask.dtype}")
    if group_ids is not None and group_ids.is_floating_point():
        raise TypeError(f"group_ids: expected whole numbers, got {group_ids.dtype}")
    return group_ids, target_mask
