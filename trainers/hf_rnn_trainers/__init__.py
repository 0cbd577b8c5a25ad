"""Training methods for recurrent networks, as subclasses of transformers' Trainer."""

from hf_rnn_trainers.reliability import NonFiniteLossError, RecurrentTrainer

__all__ = ["NonFiniteLossError", "RecurrentTrainer"]
