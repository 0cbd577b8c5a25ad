from huggingface_hub.dataclasses import strict

from hf_rnn.skeleton.configuration_block import RecurrentBlockConfig


@strict
class GRUConfig(RecurrentBlockConfig):
    """Configuration of the GRU (Cho et al., arXiv 1406.1078).

    Args:
        num_heads: the recurrent matrix is block-diagonal over so many heads; 1 is the classical dense one.
        forget_bias: initial bias of the update gate z, which keeps the state: larger keeps it longer.
        others: see `RecurrentBlockConfig`.
    """

    model_type = "hf_rnn_gru"

    num_heads: int = 1
    forget_bias: int | float = 0.0
