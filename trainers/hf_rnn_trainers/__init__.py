"""Training methods for recurrent networks, as subclasses of transformers' Trainer."""

from hf_rnn_trainers.base import RecurrentTrainer, RecurrentTrainingArguments
from hf_rnn_trainers.dmt import DMTConfig, DMTTrainer
from hf_rnn_trainers.memory import MemoryProtocol, SMTTeacher, SMTTeacherConfig
from hf_rnn_trainers.rate import RateCallback, RateConstrainedConfig, RateConstrainedTrainer
from hf_rnn_trainers.reliability import CheckpointError, NonFiniteLossError, accept_checkpoint
from hf_rnn_trainers.smt import SMTConfig, SMTTrainer
from hf_rnn_trainers.zo import ZOConfig, ZOTrainer

__all__ = [
    "CheckpointError",
    "DMTConfig",
    "DMTTrainer",
    "MemoryProtocol",
    "NonFiniteLossError",
    "RateCallback",
    "RateConstrainedConfig",
    "RateConstrainedTrainer",
    "RecurrentTrainer",
    "RecurrentTrainingArguments",
    "SMTConfig",
    "SMTTeacher",
    "SMTTeacherConfig",
    "SMTTrainer",
    "ZOConfig",
    "ZOTrainer",
    "accept_checkpoint",
]
