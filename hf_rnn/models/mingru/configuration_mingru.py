from huggingface_hub.dataclasses import strict

from hf_rnn.skeleton.configuration_block import RecurrentBlockConfig


@strict
class MinGRUConfig(RecurrentBlockConfig):
    """Configuration of minGRU ("Were RNNs All We Needed?", arXiv 2410.01201).

    Args:
        forget_bias: initial value of minus the update gate's bias: larger keeps the state longer. 0 is the paper's.
        use_g: candidate states pass through g, which keeps them positive (paper, appendix B.3); None: in the paper's
            layout alone, since without it the gated one learns more.
        others: see `RecurrentBlockConfig`.
    """

    model_type = "hf_rnn_mingru"

    forget_bias: int | float = 0.0
    use_g: bool | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.use_g is None:
            self.use_g = not self.is_gated
