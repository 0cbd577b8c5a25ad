"""The student's own memories, the teacher's, and how far they are apart."""

from typing import Any

import torch
from torch import Tensor

from hf_rnn_trainers.smt.teacher import SMTTeacher
from hf_rnn_trainers.smt.windows import contexts

CONTEXT_TOKENS = 2**16  # of one pass of the encoder


def rollout(student: Any, x: Tensor) -> Tensor:
    """The student's memories after each token, from the empty one: (B, T) to (B, T, K, D)."""
    memory, memories = student.initial_memory(len(x)), []
    for token in x.unbind(1):
        memory = student.update_memory(memory, token)
        memories.append(memory)
    return torch.stack(memories, 1)


@torch.no_grad()
def teacher_memories(student: Any, teacher: SMTTeacher, x: Tensor, positions: Tensor, size: int) -> Tensor:
    """The teacher's memories of the last `size` tokens at positions (P,): (B, T) to (B, P, K, D)."""
    if teacher.config.all_positions and x.shape[1] <= size:
        memories = teacher.encode_all(x)[:, positions]
        return student.to_memory(memories.flatten(0, 1)).view_as(memories)
    rows = torch.arange(len(x), device=x.device).repeat_interleave(len(positions))
    at = positions.repeat(len(x))
    step = max(1, CONTEXT_TOKENS // min(size, x.shape[1]))
    pieces = [
        student.to_memory(teacher.encode(*contexts(x, r, t, size)))
        for r, t in zip(rows.split(step), at.split(step), strict=True)
    ]
    return torch.cat(pieces).unflatten(0, (len(x), -1))


@torch.no_grad()
def drift(student: Any, teacher: SMTTeacher, x: Tensor, positions: Tensor, size: int) -> Tensor:
    """MSE between the student's memories and the teacher's at positions (P,), over rows and channels: (P,)."""
    own = rollout(student, x)[:, positions]
    return (own.float() - teacher_memories(student, teacher, x, positions, size)).square().mean((0, 2, 3))


def effective_rank(memories: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred memories (N, ...) (Roy and Vetterli, 2007): the
    number of directions they spread over; 1 is a collapse to a line."""
    flat = memories.double().flatten(1)
    values = torch.linalg.svdvals(flat - flat.mean(0))
    share = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(share).sum().exp())
