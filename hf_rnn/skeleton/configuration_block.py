"""What architectures can be told whose recurrence is a vector between two projections."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict

from hf_rnn.skeleton.configuration_hybrid import HybridConfig

_LAYOUTS = ("gated", "paper")


@strict
class RecurrentBlockConfig(HybridConfig):
    """Configuration of architectures in one of three blocks, u = norm(x):

    "gated": x += W_out(h * SiLU(W_gate u)), h the recurrence over conv(u): as in Mamba (arXiv 2312.00752) and Griffin
    (arXiv 2402.19427), around any of these recurrences.
    "paper": x += conv(x), x += W_out(h), h the recurrence over norm(x), x += feed-forward(norm(x)); the minGRU paper's
    (arXiv 2410.01201).
    "paper" without residuals: the bare recurrence.

    Sizes that are None follow from the layout. To `from_pretrained` and `from_dict` a config without `block_layout` is
    of a version that had "paper" alone.

    Args:
        block_layout: "gated" or "paper"; None: "gated", which learns more at equal parameters, steps and time
            (docs/layouts.md), or "paper" where there are no residuals.
        expansion_factor: the recurrence, each of the two if bidirectional, has int(hidden_size * expansion_factor)
            channels; None: 2 ("gated"), 1, or 0.5 where two stand side by side.
        conv_kernel: width of the causal convolution before each recurrence, 0 for none.
        feed_forward_factor: the feed-forward has int(hidden_size * feed_forward_factor) channels, 0 for none; None: 4
            ("paper" with residuals) or 0.
        output_projection: a linear layer from the recurrence back to the residual stream; may be False only where the
            recurrence, or two of them side by side, are as wide.
        residual: blocks add to a residual stream, each branch behind a norm. False stacks the bare recurrences, as
            `torch.nn.LSTM` does: no residuals, norms, convolutions or feed-forwards.
        embedding_size: channels of the embeddings, and of the first recurrence's input; None: hidden_size. Others only
            without residuals.
        learned_initial_state: the state before the first token is a parameter (zeros at first), else zeros.
        initializer_range: standard deviation of the initial embeddings and linear weights; None: 0.02 of the embeddings
            and 1 / sqrt(inputs) of linear weights, by which every width learns at about the same rate.
        others: see `HybridConfig`.
    """

    block_layout: str | None = None
    expansion_factor: int | float | None = None
    conv_kernel: int = 4
    feed_forward_factor: int | float | None = None
    output_projection: bool = True
    residual: bool = True
    embedding_size: int | None = None
    learned_initial_state: bool = True
    initializer_range: int | float | None = None  # type: ignore[assignment]

    def __post_init__(self, **kwargs):
        if self.block_layout is None:
            self.block_layout = "gated" if self.residual else "paper"
        if self.expansion_factor is None:
            one = 0.5 if self.directions_side_by_side else 1.0
            self.expansion_factor = 2.0 if self.is_gated else one
        if self.feed_forward_factor is None:
            self.feed_forward_factor = 4.0 if self.residual and not self.is_gated else 0.0
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers'. Where nothing says which, the layout is the one that there was before there were two."""
        return super().from_dict({"block_layout": "paper", **config_dict}, **kwargs)

    @property
    def is_gated(self) -> bool:
        return self.block_layout == "gated"

    @property
    def inner_size(self) -> int:
        """Channels of the recurrence."""
        return int(self.hidden_size * self.expansion_factor)  # type: ignore[operator]

    @property
    def output_size(self) -> int:
        """Channels of what the recurrence gives, one direction."""
        return self.inner_size

    @property
    def input_size(self) -> int:
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def directions_side_by_side(self) -> bool:
        return self.bidirectional and not self.output_projection

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Matrices over processes. The recurrence between them has all its channels on each: its projection holds gates
        side by side, and its state is one tensor, so outputs are gathered."""
        plan = {"layers.*.mixer.in_proj": "colwise_gather_output"}
        if self.is_gated:
            plan["layers.*.mixer.gate_proj"] = "colwise_gather_output"
        if self.output_projection:
            plan["layers.*.mixer.out_proj"] = "rowwise_split_input"
        if self.feed_forward_factor:
            plan |= {"layers.*.ff.up_proj": "colwise", "layers.*.ff.down_proj": "rowwise"}
        return plan | self.attention_plan()

    def validate_architecture(self):
        if self.block_layout not in _LAYOUTS:
            raise ValueError(f"block_layout: expected 'gated' or 'paper', got {self.block_layout!r}")
        super().validate_architecture()
        for name in ("expansion_factor", "feed_forward_factor", "forget_bias"):
            if not math.isfinite(getattr(self, name, 0.0)):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")
        if self.conv_kernel < 0 or self.conv_kernel == 1:
            raise ValueError(f"conv_kernel: expected 0 (none) or a width of at least 2, got {self.conv_kernel}")
        if self.feed_forward_factor < 0:  # type: ignore[operator]
            raise ValueError(f"feed_forward_factor: expected 0 (none) or more, got {self.feed_forward_factor}")
        if self.inner_size < 1:
            raise ValueError(f"expansion_factor: {self.expansion_factor} leaves the recurrence without channels")
        if not self.residual:
            self._check_bare()
        self._check_width("expansion_factor", self.hidden_size * self.expansion_factor)  # type: ignore[operator]
        inner = self.hidden_size * self.feed_forward_factor  # type: ignore[operator]
        self._check_width("feed_forward_factor", inner, least=0)
        self._check_width("conv_kernel", self.conv_kernel, least=0)
        outputs = self.output_size * (2 if self.directions_side_by_side else 1)
        if not self.output_projection and outputs != self.hidden_size:
            raise ValueError(
                f"output_projection: needed at expansion_factor {self.expansion_factor}, where the recurrence gives "
                f"{outputs} channels for the {self.hidden_size} of hidden_size"
            )
        if self.input_size != self.hidden_size and (self.residual or self.input_size < 1):
            raise ValueError(
                f"embedding_size: expected hidden_size, {self.hidden_size}, got {self.embedding_size}; only without "
                "residuals can the first recurrence's input have another width"
            )
        if self.input_size != self.hidden_size and self.tie_word_embeddings:
            raise ValueError(
                f"tie_word_embeddings: expected False where embeddings are {self.input_size} wide (embedding_size) and "
                f"the head {self.hidden_size} (hidden_size)"
            )
        self._check_width("embedding_size", self.input_size)

    def _check_bare(self) -> None:
        if self.conv_kernel or self.feed_forward_factor:
            raise ValueError("residual: without residuals set conv_kernel=0 and feed_forward_factor=0, got others")
        if self.is_gated:
            raise ValueError("block_layout: 'gated' adds to a residual stream; without residuals expected 'paper'")
        if self.has_attention:
            raise ValueError("layer_types: attention adds to a residual stream; without residuals expected none")


@strict
class MultiHeadConfig(RecurrentBlockConfig):
    """Configuration of recurrences whose gates see the state, each head its own part of it.

    Args:
        num_heads: the recurrent matrix is block-diagonal over so many heads; 1 is the classical dense one. None: up to
            8 that divide the channels ("gated", whose recurrence is wide) or 1.
        others: see `RecurrentBlockConfig`.
    """

    num_heads: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_heads is None:
            gated = self.is_gated and math.isfinite(self.expansion_factor)  # type: ignore[arg-type]
            self.num_heads = math.gcd(8, self.inner_size) if gated else 1

    def validate_architecture(self):
        super().validate_architecture()
        if self.num_heads < 1 or self.inner_size % self.num_heads:  # type: ignore[operator]
            raise ValueError(f"num_heads: expected a divisor of the {self.inner_size} channels, got {self.num_heads}")
