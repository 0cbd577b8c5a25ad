from huggingface_hub.dataclasses import strict

from hf_rnn.skeleton.configuration_recurrent import RecurrentBlockConfig


@strict
class MinGRUConfig(RecurrentBlockConfig):
    """Configuration of minGRU ("Were RNNs All We Needed?", arXiv 2410.01201).

    Args:
        forget_bias: initial value of minus the update gate's bias: larger keeps the state longer. 0 is the paper's.
        use_g: candidate states pass through g, which keeps them positive (paper, appendix B.3).
        others: see `RecurrentBlockConfig`.
    """

    model_type = "hf_rnn_mingru"

    forget_bias: int | float = 0.0
    use_g: bool = True
