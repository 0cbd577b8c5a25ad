from huggingface_hub.dataclasses import strict

from hf_rnn.skeleton.configuration_block import RecurrentBlockConfig


@strict
class LSTMConfig(RecurrentBlockConfig):
    """Configuration of the LSTM ("Long Short-Term Memory" with forget gates).

    Args:
        num_heads: the recurrent matrix is block-diagonal over so many heads; 1 is the classical dense one.
        forget_bias: initial bias of the forget gate: larger keeps the state longer. 1 as Jozefowicz et al. (2015).
        others: see `RecurrentBlockConfig`.
    """

    model_type = "hf_rnn_lstm"

    num_heads: int = 1
    forget_bias: int | float = 1.0
