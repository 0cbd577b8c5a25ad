"""Training methods for recurrent networks, as subclasses of transformers' Trainer."""

from hf_rnn_trainers.reliability import NonFiniteLossError, RecurrentTrainer
from hf_rnn_trainers.zo import ZOConfig, ZOTrainer

__all__ = ["NonFiniteLossError", "RecurrentTrainer", "ZOConfig", "ZOTrainer"]
