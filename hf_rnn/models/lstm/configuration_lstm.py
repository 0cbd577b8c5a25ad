from huggingface_hub.dataclasses import strict

from hf_rnn.skeleton.configuration_block import MultiHeadConfig


@strict
class LSTMConfig(MultiHeadConfig):
    """Configuration of the LSTM ("Long Short-Term Memory" with forget gates).

    Args:
        forget_bias: initial bias of the forget gate: larger keeps the state longer. 1 as Jozefowicz et al. (2015).
        others: see `MultiHeadConfig`.
    """

    model_type = "hf_rnn_lstm"

    forget_bias: int | float = 1.0
