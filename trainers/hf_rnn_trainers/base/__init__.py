"""The trainer that all methods' are, and its arguments: where reliability and the model card meet."""

from hf_rnn_trainers.base.arguments import RecurrentTrainingArguments
from hf_rnn_trainers.base.recurrent_trainer import RecurrentTrainer

__all__ = ["RecurrentTrainer", "RecurrentTrainingArguments"]
