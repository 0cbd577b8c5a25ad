"""Supervised Memory Training: a teacher says what to remember, the network learns to remember it."""

from hf_rnn_trainers.smt.rollouts import drift, effective_rank, rollout, teacher_memories
from hf_rnn_trainers.smt.smt_config import SMTConfig
from hf_rnn_trainers.smt.smt_trainer import SMTTrainer
from hf_rnn_trainers.smt.teacher import SMTTeacher, SMTTeacherConfig

__all__ = [
    "SMTConfig",
    "SMTTeacher",
    "SMTTeacherConfig",
    "SMTTrainer",
    "drift",
    "effective_rank",
    "rollout",
    "teacher_memories",
]
