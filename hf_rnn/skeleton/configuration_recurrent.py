"""What every architecture of the package can be told."""

import difflib
import math
from dataclasses import field, fields
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_rnn.forecasting.quantiles import check_quantiles, is_symmetric
from hf_rnn.skeleton.adapters import register_lora_targets
from hf_rnn.skeleton.versions import STATE_NAMES, AssignablePlan, refuse_bools

logger = logging.get_logger(__name__)

# What architectures are asked: the ends of the classes' names
HEADS = (
    "ForCausalLM",
    "ForCTC",
    "ForMaskedLM",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
)
# What transformers itself passes to or stores in a config beyond its fields
_TRANSFORMERS_NAMES = {
    "auto_map", "attn_implementation", "experts_implementation", "is_encoder_decoder", "model_type", "name_or_path",
    "num_labels", "output_attentions", "quantization_config", "tie_last_hidden_states", "torch_dtype",
    "transformers_weights",
}  # fmt: skip
# The special tokens of the byte tokenizer, whose vocabulary has 259 tokens
_BYTES = 259
_BYTE_TOKENS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
_UNTOLD = -1  # a token's id until then; None is an answer
# What no model has, so that a damaged config.json is an error and not hours of building layers
_MOST_LAYERS = 10_000
_WIDEST = 2**24


class RecurrentConfig(AssignablePlan, PreTrainedConfig):
    """What all architectures can be told.

    Args:
        vocab_size: number of tokens; 259 is the byte tokenizer's (256 bytes and three special tokens).
        hidden_size: width D of the residual stream.
        num_hidden_layers: number of blocks.
        use_bias: biases in the projections of the recurrence.
        hidden_dropout: dropout on every residual branch and on the embeddings; without residuals between the layers
            alone, as `torch.nn.LSTM` has it.
        norm_eps: epsilon of the norms.
        initializer_range: standard deviation of the initial embeddings and linear weights.
        tie_word_embeddings: the head shares the embedding's weights.
        bidirectional: each layer has a second recurrence, over each sequence's real tokens from the last one to the
            first, with weights of its own; see `hf_rnn.layers.Bidirectional`. Such a model reads whole sequences: no
            state, no `generate()`.
        share_directions: one set of weights for both directions.
        use_cache: return the state from forward outside training; False where bidirectional.
        pad_token_id, bos_token_id, eos_token_id: where not told, the byte tokenizer's 256, 257 and 258 with its
            vocabulary of 259, None with any other.
        num_input_features: values of a step of `input_features`, which such a model reads instead of tokens; None: it
            reads tokens.
        patch_size: so many steps of input_features, or of a series to be forecast, make one token.
        patch_intermediate_size: hidden channels of the layer that makes tokens of patches; None: it is linear.
        classifier_pooling: the vector that sequences are classified by: "last", of the last real token; "mean", over
            all of them; "ends", of the first and the last side by side. None: "last", or "ends" where bidirectional.
        ctc_loss_reduction, ctc_zero_infinity: of `torch.nn.functional.ctc_loss`, as Wav2Vec2's: "sum" or "mean" of
            sequences; zeros where a sequence is too short for its labels, whose loss is infinite.
        context_length: steps of a series that a forecast is made from, at most.
        prediction_length: the longest horizon of a forecast, in steps.
        quantiles: what is forecast, numbers in (0, 1) that rise.
        head_intermediate_size: hidden channels of the layer that makes quantiles of tokens; None: 4 times hidden_size.
        use_arcsinh, binary_aware, scale_eps: see `hf_rnn.forecasting.scaling.standardize`.
        differencing: `predict` forecasts the differences of series with a trend.
        sign_flip: `predict` averages with the forecast of the negated series. Twice the work.
        max_position_embeddings: what other tools take for the longest context. A recurrent model has none: the largest
            number they can hold; lm-evaluation-harness would cut texts at 2,048 tokens without it.
    """

    keys_to_ignore_at_inference = list(STATE_NAMES)

    vocab_size: int = _BYTES
    hidden_size: int = 384
    num_hidden_layers: int = 3
    use_bias: bool = True
    hidden_dropout: int | float = 0.0
    norm_eps: int | float = 1e-6
    initializer_range: int | float = 0.02
    tie_word_embeddings: bool = False
    bidirectional: bool = False
    share_directions: bool = False
    use_cache: bool = True
    num_input_features: int | None = None
    patch_size: int = 1
    patch_intermediate_size: int | None = None
    classifier_pooling: str | None = None
    ctc_loss_reduction: str = "sum"
    ctc_zero_infinity: bool = False
    context_length: int = 512
    prediction_length: int = 64
    quantiles: list[float] = field(default_factory=lambda: [n / 10 for n in range(1, 10)])
    head_intermediate_size: int | None = None
    use_arcsinh: bool = True
    binary_aware: bool = True
    scale_eps: int | float = 1e-8
    differencing: bool = False
    sign_flip: bool = False
    max_position_embeddings: int = 2**31 - 1
    pad_token_id: int | None = _UNTOLD
    bos_token_id: int | None = _UNTOLD
    eos_token_id: int | list[int] | None = _UNTOLD

    def __post_init__(self, **kwargs):
        for name, token in _BYTE_TOKENS.items():
            if getattr(self, name) == _UNTOLD:
                setattr(self, name, token if self.vocab_size == _BYTES else None)
        if self.bidirectional:
            self.use_cache = False
        self._check_foreign(kwargs)
        known = [setting.name for setting in fields(self)]
        for name in kwargs:
            if similar := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
                raise ValueError(f"{type(self).__name__}: unknown argument {name!r}; did you mean {similar[0]!r}?")
        if unknown := [name for name in kwargs if not name.startswith("_") and name not in _TRANSFORMERS_NAMES]:
            logger.warning(f"{type(self).__name__}: unknown arguments {unknown} are kept but do nothing")
        super().__post_init__(**kwargs)
        # Where AutoModel finds the classes when hf_rnn has not been imported; see hf_rnn/remote_code/loader.py.
        self.auto_map = {
            "AutoConfig": f"modeling_hf_rnn.{type(self).__name__}",
            **{auto: f"modeling_hf_rnn.{name}" for auto, name in self.auto_classes().items()},
        }

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Nothing to register: every config carries its auto_map."""

    @classmethod
    def auto_classes(cls) -> dict[str, str]:
        """Auto class to model class, by name."""
        stem = cls.__name__.removesuffix("Config")
        heads = {f"AutoModel{head}": f"{stem}{head}" for head in HEADS}
        return {"AutoModel": f"{stem}Model", **heads, "AutoModelForTimeSeriesPrediction": f"{stem}ForPrediction"}

    def _check_foreign(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for what transformers itself would stumble over without naming the field, or count to."""
        layers = self.num_hidden_layers
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers: expected at most {_MOST_LAYERS:,}, got {layers}")
        dtype = self.dtype
        if dtype is not None and not isinstance(
            getattr(torch, dtype, None) if isinstance(dtype, str) else dtype, torch.dtype
        ):
            raise ValueError(f"dtype: expected the name of a torch.dtype, got {dtype!r}")
        for name in ("id2label", "label2id"):
            if (value := getattr(self, name, None)) is not None and not isinstance(value, dict):
                raise ValueError(f"{name}: expected an object, got {value!r}")
        if not all(str(key).isdecimal() for key in self.id2label or {}):
            raise ValueError(f"id2label: expected whole numbers as names, got {list(self.id2label or {})}")
        refuse_bools(self)
        labels = kwargs.get("num_labels")
        if labels is not None and (not isinstance(labels, int) or labels < 0):
            raise ValueError(f"num_labels: expected a whole number of at least 0, got {labels!r}")
        coded = kwargs.get("quantization_config")
        if coded is not None and not isinstance(coded, dict) and not hasattr(coded, "to_dict"):
            raise ValueError(f"quantization_config: expected an object, got {coded!r}")
        for name in kwargs:
            found = getattr(type(self), name, None)
            if isinstance(found, property) and (found.fset is None or name == "base_model_tp_plan"):
                raise ValueError(f"{name}: follows from other settings and cannot be set")

    def to_dict(self) -> dict[str, Any]:
        register_lora_targets(self.model_type)
        return super().to_dict()

    @staticmethod
    def _check_width(name: str, channels: float, least: int = 1) -> None:
        if not least <= channels <= _WIDEST:
            raise ValueError(f"{name}: expected {least} to {_WIDEST:,} channels, got {channels:g}")

    def validate_architecture(self):
        """Part of the validation that `@strict` runs; raises ValueError."""
        for name in ("norm_eps", "initializer_range"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")
        if (self.initializer_range or 0.0) < 0:
            raise ValueError(f"initializer_range: expected at least 0, got {self.initializer_range}")
        if self.norm_eps is not None and self.norm_eps <= 0:
            raise ValueError(f"norm_eps: expected more than 0, got {self.norm_eps}")
        lengths = ("max_position_embeddings", "patch_size", "context_length", "prediction_length")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", *lengths):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.num_input_features is not None:
            self._check_width("num_input_features", self.num_input_features)
            self._check_width("patch_size", self.num_input_features * self.patch_size)
        elif self.patch_size > 1:
            raise ValueError(
                f"patch_size: tokens make no patches; expected 1 without num_input_features, got {self.patch_size}"
            )
        for name in ("patch_intermediate_size", "head_intermediate_size"):
            if getattr(self, name) is not None:
                self._check_width(name, getattr(self, name))
        check_quantiles(self.quantiles)
        if self.sign_flip and not is_symmetric(self.quantiles):
            raise ValueError(f"sign_flip: expected with each quantile q also 1 - q, got {self.quantiles}")
        if self.classifier_pooling not in (None, "last", "mean", "ends"):
            raise ValueError(f"classifier_pooling: expected 'last', 'mean' or 'ends', got {self.classifier_pooling!r}")
        problems = (None, "regression", "single_label_classification", "multi_label_classification")
        if self.problem_type not in problems:
            raise ValueError(f"problem_type: expected one of {problems[1:]}, or None, got {self.problem_type!r}")
        if self.ctc_loss_reduction not in ("sum", "mean"):
            raise ValueError(f"ctc_loss_reduction: expected 'sum' or 'mean', got {self.ctc_loss_reduction!r}")
        for name in ("vocab_size", "hidden_size"):
            if getattr(self, name) > _WIDEST:
                raise ValueError(f"{name}: expected at most {_WIDEST:,}, got {getattr(self, name)}")
        if self.share_directions and not self.bidirectional:
            raise ValueError("share_directions: expected False where bidirectional is, got True")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"hidden_dropout: expected in [0, 1), got {self.hidden_dropout}")

    @property
    def input_size(self) -> int:
        """Channels of the embeddings."""
        return self.hidden_size

    @property
    def quantile_head_size(self) -> int:
        """Hidden channels of the layer that makes quantiles of tokens."""
        return self.head_intermediate_size or 4 * self.hidden_size

    @property
    def directions_side_by_side(self) -> bool:
        """Whether the outputs of a bidirectional layer's two directions are concatenated, not added."""
        return False

    @property
    def layer_types(self) -> list[str]:
        """What mixes tokens in each layer, in transformers' words: "linear_attention" is a recurrent layer."""
        return ["linear_attention"] * self.num_hidden_layers
