"""Training by memories, what SMT and DMT share: a student's protocol, its teacher, windows, losses and rollouts."""

from hf_rnn_trainers.memory.protocol import MemoryProtocol
from hf_rnn_trainers.memory.rollouts import drift, effective_rank, rollout, teacher_memories
from hf_rnn_trainers.memory.teacher import SMTTeacher, SMTTeacherConfig

__all__ = [
    "MemoryProtocol",
    "SMTTeacher",
    "SMTTeacherConfig",
    "drift",
    "effective_rank",
    "rollout",
    "teacher_memories",
]
