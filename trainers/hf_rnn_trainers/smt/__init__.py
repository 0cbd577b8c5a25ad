"""Supervised Memory Training: a teacher says what to remember, the network learns to remember it."""

from hf_rnn_trainers.smt.smt_config import SMTConfig
from hf_rnn_trainers.smt.smt_trainer import SMTTrainer

__all__ = ["SMTConfig", "SMTTrainer"]
