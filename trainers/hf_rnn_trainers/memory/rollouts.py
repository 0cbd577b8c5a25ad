"""The student's own memories, the teacher's, and how far they are apart."""

import torch
from torch import Tensor

from hf_rnn_trainers.memory.protocol import MemoryProtocol
from hf_rnn_trainers.memory.teacher import SMTTeacher
from hf_rnn_trainers.memory.windows import contexts

CONTEXT_TOKENS = 2**16  # of one pass of the encoder


def rollout(student: MemoryProtocol, x: Tensor) -> Tensor:
    """The student's memories after each token, from the empty one: (B, T) to (B, T, K, D)."""
    return run(student, student.initial_memory(len(x)), x)


def run(student: MemoryProtocol, memory: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The student's memories after each token, (N, K, D) and (N, T) to (N, T, K, D): in one pass, where the student has
    `update_memories`. After tokens that the mask (N, T) leaves out, which end a row, memories mean nothing."""
    if hasattr(student, "update_memories"):
        return student.update_memories(memory, x, mask)
    memories = []
    for token in x.unbind(1):
        memory = student.update_memory(memory, token)
        memories.append(memory)
    return torch.stack(memories, 1)


def run_chunks(
    student: MemoryProtocol, x: Tensor, before: Tensor, rows: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's memories within chunks (`windows.chunks`) of x (B, T), each from the memory before it, side by
    side.

    Args:
        before: (N, K, D).
        rows, start, end: (N,).

    Returns:
        Memories (M, K, D), one after each token of a chunk, and (M,) of which chunk and how many steps into it.
    """
    length = end - start
    step = torch.arange(max(length.tolist(), default=0), device=x.device)
    real = step < length[:, None]
    at = (start[:, None] + step).clamp(max=x.shape[1] - 1)
    memories = run(student, before, x[rows[:, None], at], None if bool(real.all()) else real)
    found, steps = real.nonzero().unbind(1)
    return memories[real], found, steps


@torch.no_grad()
def labels(student: MemoryProtocol, teacher: SMTTeacher, x: Tensor, rows: Tensor, t: Tensor, size: int) -> Tensor:
    """The teacher's memories of the last `size` tokens at (rows, t), (N,) each: (B, T) to (N, K, D)."""
    if len(rows) == 0:
        return student.initial_memory(0)
    if teacher.config.all_positions and x.shape[1] <= size:
        return student.to_memory(teacher.encode_all(x)[rows, t])
    step = max(1, CONTEXT_TOKENS // min(size, x.shape[1]))
    pairs = zip(rows.split(step), t.split(step), strict=True)
    return torch.cat([student.to_memory(teacher.encode(*contexts(x, r, at, size))) for r, at in pairs])


def teacher_memories(student: MemoryProtocol, teacher: SMTTeacher, x: Tensor, positions: Tensor, size: int) -> Tensor:
    """The same at positions (P,) of every row: (B, T) to (B, P, K, D)."""
    rows = torch.arange(len(x), device=x.device).repeat_interleave(len(positions))
    return labels(student, teacher, x, rows, positions.repeat(len(x)), size).unflatten(0, (len(x), -1))


@torch.no_grad()
def errors(student: MemoryProtocol, teacher: SMTTeacher, x: Tensor, positions: Tensor, size: int) -> Tensor:
    """Mean square over channels between the student's memories and the teacher's at positions (P,): (B, P)."""
    own = rollout(student, x)[:, positions]
    return (own.float() - teacher_memories(student, teacher, x, positions, size)).square().mean((2, 3))


def drift(student: MemoryProtocol, teacher: SMTTeacher, x: Tensor, positions: Tensor, size: int) -> Tensor:
    """`errors`, the mean over rows: (P,)."""
    return errors(student, teacher, x, positions, size).mean(0)


def effective_rank(memories: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred memories (N, ...) (Roy and Vetterli, 2007): the
    number of directions they spread over; 1 is a collapse to a line."""
    flat = memories.double().flatten(1)
    values = torch.linalg.svdvals(flat - flat.mean(0))
    share = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(share).sum().exp())
