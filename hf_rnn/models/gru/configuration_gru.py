from huggingface_hub.dataclasses import strict

from hf_rnn.skeleton.configuration_block import MultiHeadConfig


@strict
class GRUConfig(MultiHeadConfig):
    """Configuration of the GRU (Cho et al., arXiv 1406.1078).

    Args:
        forget_bias: initial bias of the update gate z, which keeps the state: larger keeps it longer.
        others: see `MultiHeadConfig`.
    """

    model_type = "hf_rnn_gru"

    forget_bias: int | float = 0.0
