from huggingface_hub.dataclasses import strict

from hf_rnn.skeleton.configuration_block import RecurrentBlockConfig


@strict
class MinLSTMConfig(RecurrentBlockConfig):
    """Configuration of minLSTM ("Were RNNs All We Needed?", arXiv 2410.01201).

    Args:
        forget_bias: initial bias of the forget gate: larger keeps the state longer. 3 is the authors' code's.
        normalize_gates: divide f and i by their sum, as the paper does; its code has this off by default.
        use_g: candidate states pass through g, which keeps them positive (paper, appendix B.3); None: in the paper's
            layout alone, since without it the gated one learns more.
        others: see `RecurrentBlockConfig`.
    """

    model_type = "hf_rnn_minlstm"

    forget_bias: int | float = 3.0
    normalize_gates: bool = True
    use_g: bool | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.use_g is None:
            self.use_g = not self.is_gated
