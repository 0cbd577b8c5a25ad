"""What every architecture of the package can be told."""

import difflib
import math
from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What transformers itself passes to or stores in a config beyond its fields
_TRANSFORMERS_NAMES = {
    "auto_map", "attn_implementation", "experts_implementation", "is_encoder_decoder", "model_type", "name_or_path",
    "num_labels", "output_attentions", "quantization_config", "tie_last_hidden_states", "torch_dtype",
    "transformers_weights",
}  # fmt: skip


class RecurrentConfig(PreTrainedConfig):
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
        use_cache: return the state from forward outside training.
    """

    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 259
    hidden_size: int = 384
    num_hidden_layers: int = 3
    use_bias: bool = True
    hidden_dropout: int | float = 0.0
    norm_eps: int | float = 1e-6
    initializer_range: int | float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 256
    bos_token_id: int | None = 257
    eos_token_id: int | list[int] | None = 258

    def __post_init__(self, **kwargs):
        known = [field.name for field in fields(self)]
        for name in kwargs:
            if similar := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
                raise ValueError(f"{type(self).__name__}: unknown argument {name!r}; did you mean {similar[0]!r}?")
        if unknown := [name for name in kwargs if not name.startswith("_") and name not in _TRANSFORMERS_NAMES]:
            logger.warning(f"{type(self).__name__}: unknown arguments {unknown} are kept but do nothing")
        super().__post_init__(**kwargs)
        # Where AutoModel finds the classes when hf_rnn has not been imported; see hf_rnn/hub/remote_code.py.
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
        return {
            "AutoModel": f"{stem}Model",
            "AutoModelForCausalLM": f"{stem}ForCausalLM",
            "AutoModelForSequenceClassification": f"{stem}ForSequenceClassification",
        }

    def validate_architecture(self):
        """Part of the validation that `@strict` runs; raises ValueError."""
        for name in ("norm_eps", "initializer_range"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")
        if (self.initializer_range or 0.0) < 0:
            raise ValueError(f"initializer_range: expected at least 0, got {self.initializer_range}")
        if self.norm_eps is not None and self.norm_eps <= 0:
            raise ValueError(f"norm_eps: expected more than 0, got {self.norm_eps}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"hidden_dropout: expected in [0, 1), got {self.hidden_dropout}")

    @property
    def layer_types(self) -> list[str]:
        return ["linear_attention"] * self.num_hidden_layers


@strict
class MinBlockConfig(RecurrentConfig):
    """Configuration of architectures in the blocks of the minGRU paper (arXiv 2410.01201), or bare.

    Args:
        expansion_factor: the recurrence has int(hidden_size * expansion_factor) channels.
        conv_kernel: width of the causal convolution before each recurrence, 0 for none.
        feed_forward_factor: the feed-forward has int(hidden_size * feed_forward_factor) channels, 0 for none.
        output_projection: a linear layer from the recurrence back to the residual stream; may be False only at
            expansion 1.
        residual: blocks add to a residual stream, each branch behind a norm. False stacks the bare recurrences, as
            `torch.nn.LSTM` does: no residuals, norms, convolutions or feed-forwards.
        learned_initial_state: the state before the first token is a parameter (zeros at first), else zeros.
        others: see `RecurrentConfig`.
    """

    expansion_factor: int | float = 1.0
    conv_kernel: int = 4
    feed_forward_factor: int | float = 4.0
    output_projection: bool = True
    residual: bool = True
    learned_initial_state: bool = True

    @property
    def inner_size(self) -> int:
        """Channels of the recurrence."""
        return int(self.hidden_size * self.expansion_factor)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Matrices over processes. The recurrence between them has all its channels on each: its projection holds gates
        side by side, and its state is one tensor, so outputs are gathered."""
        plan = {"layers.*.mixer.in_proj": "colwise_gather_output"}
        if self.output_projection:
            plan["layers.*.mixer.out_proj"] = "rowwise_split_input"
        if self.feed_forward_factor:
            plan |= {"layers.*.ff.up_proj": "colwise", "layers.*.ff.down_proj": "rowwise"}
        return plan

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("expansion_factor", "feed_forward_factor", "forget_bias"):
            if not math.isfinite(getattr(self, name, 0.0)):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")
        if self.conv_kernel < 0 or self.conv_kernel == 1:
            raise ValueError(f"conv_kernel: expected 0 (none) or a width of at least 2, got {self.conv_kernel}")
        if self.feed_forward_factor < 0:
            raise ValueError(f"feed_forward_factor: expected 0 (none) or more, got {self.feed_forward_factor}")
        if self.inner_size < 1:
            raise ValueError(f"expansion_factor: {self.expansion_factor} leaves the recurrence without channels")
        if not self.residual and (self.conv_kernel or self.feed_forward_factor):
            raise ValueError("residual: without residuals set conv_kernel=0 and feed_forward_factor=0, got others")
        heads = getattr(self, "num_heads", 1)
        if heads < 1 or self.inner_size % heads:
            raise ValueError(f"num_heads: expected a divisor of the {self.inner_size} channels, got {heads}")
        if not self.output_projection and self.inner_size != self.hidden_size:
            raise ValueError(
                f"output_projection: needed at expansion_factor {self.expansion_factor}, only 1 can do without"
            )
