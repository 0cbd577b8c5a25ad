"""Stacks in which some layers are attention over the last tokens."""

from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig

RECURRENT = "linear_attention"
ATTENTION = "sliding_attention"
# What no model has, so that a damaged config.json is an error
_WIDEST_WINDOW = 2**20
_LARGEST_THETA = 1e12


class HybridConfig(RecurrentConfig):
    """Configuration of architectures whose layers may be replaced, one by one, by attention over the last tokens.

    Args:
        layer_types: what mixes tokens in each layer, in transformers' words: "linear_attention" is a recurrent layer,
            whatever its recurrence, "sliding_attention" attention. None: recurrent layers alone.
        sliding_window: a token sees so many tokens, itself included; their keys and values are the layer's state. Wider
            than the texts it costs, and gives nothing.
        num_attention_heads: heads of queries.
        num_key_value_heads: heads of keys and values, each for a group of queries' heads; None: as many as those.
        rope_theta: the base of the rotary positions' wavelengths (arXiv 2104.09864).
        others: see `RecurrentConfig`.
    """

    layer_types: list[str] | None = None  # type: ignore[assignment]
    sliding_window: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    rope_theta: int | float = 10_000.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    @property
    def has_attention(self) -> bool:
        return ATTENTION in (self.layer_types or [])

    def is_attention(self, layer_idx: int) -> bool:
        return self.layer_types is not None and self.layer_types[layer_idx] == ATTENTION

    def attention_plan(self) -> dict[str, str]:
        """The attention's matrices over processes; see `tensor_parallel_plan`."""
        if not self.has_attention:
            return {}
        plan = {f"layers.*.mixer.{name}_proj": "colwise_gather_output" for name in "qkv"}
        return plan | {"layers.*.mixer.o_proj": "rowwise_split_input"}

    def validate_architecture(self):
        super().validate_architecture()
        kinds = [RECURRENT] * self.num_hidden_layers if self.layer_types is None else self.layer_types
        if unknown := [kind for kind in kinds if kind not in (RECURRENT, ATTENTION)]:
            raise ValueError(f"layer_types: expected {RECURRENT!r} or {ATTENTION!r}, got {unknown[0]!r}")
        if len(kinds) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types: expected one for each of the {self.num_hidden_layers} layers (num_hidden_layers), got "
                f"{len(kinds)}"
            )
        if not self.has_attention:
            return
        if self.bidirectional:
            raise ValueError(
                "bidirectional: attention over the last tokens has one direction; expected layer_types None"
            )
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads < 1 or self.hidden_size % heads or self.hidden_size // heads % 2:
            raise ValueError(
                f"num_attention_heads: expected heads of an even number of channels, which divide hidden_size "
                f"{self.hidden_size}, got {heads}"
            )
        if not groups or groups < 1 or heads % groups:
            raise ValueError(f"num_key_value_heads: expected a divisor of the {heads} heads, got {groups}")
        if not 1 <= self.sliding_window <= _WIDEST_WINDOW:
            raise ValueError(
                f"sliding_window: expected at least 1 token, at most {_WIDEST_WINDOW:,}, got {self.sliding_window}"
            )
        if not 1 < self.rope_theta <= _LARGEST_THETA:
            raise ValueError(f"rope_theta: expected more than 1, at most {_LARGEST_THETA:g}, got {self.rope_theta}")
