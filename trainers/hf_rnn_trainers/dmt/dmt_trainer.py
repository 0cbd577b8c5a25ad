"""Training a recurrent network on the memories that it comes to by itself."""

from typing import Any

import torch
from torch import Tensor

from hf_rnn_trainers.dmt.dmt_config import DMTConfig
from hf_rnn_trainers.smt.losses import dynamics_loss, prediction_loss
from hf_rnn_trainers.smt.memory_trainer import Losses, MemoryTrainer
from hf_rnn_trainers.smt.rollouts import rollout, teacher_memories
from hf_rnn_trainers.smt.teacher import SMTTeacher


class DMTLosses(Losses):
    """L = a MSE(f(m^_{t-1}, x_t), m_t) + b CE(y_t, read(m^_t)), m^ the student's rollout, m the teacher's memory.

    The rollout is made without a graph; then the steps that have labels are made again, all at once, with one. The
    readout's error stops at the memory it reads.
    """

    def __init__(self, student: Any, teacher: SMTTeacher, args: DMTConfig):
        super().__init__(student, args)
        self.label = lambda x, positions: teacher_memories(student, teacher, x, positions, args.context_size)

    def forward(self, x: Tensor, y: Tensor, lengths: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        args, (rows, time) = self.args, x.shape
        latest = min(args.label_every, max(1, int(lengths.min())))  # so that every row has a label
        start = int(torch.randint(latest, (), generator=generator))
        positions = torch.arange(start, time, args.label_every, device=x.device)
        real = positions < lengths[:, None]
        labels = self.label(x, positions)[real]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not args.detach_rollout):
            memories = rollout(self.student, x)
        if args.detach_rollout:
            before = torch.cat([self.student.initial_memory(rows)[:, None], memories[:, :-1]], 1)[:, positions]
            predicted = self.student.update_memory(before[real], x[:, positions][real])
        else:
            predicted = memories[:, positions][real]
        dynamics = dynamics_loss(predicted, labels)
        read = (y != -100) & (torch.arange(time, device=x.device) < lengths[:, None])
        readout = prediction_loss(self.student.read_memory(memories.detach()[read], x[read]), y[read])
        return dict(
            loss=args.coef_dynamics * dynamics + args.coef_readout * readout, dynamics=dynamics, readout=readout
        )


class DMTTrainer(MemoryTrainer):
    """DAgger Memory Training: the student runs from the empty memory, the teacher says at every `label_every`-th step
    what it should have remembered. The teacher is frozen; the readout goes on learning.

    After `SMTTrainer`, with the teacher from there. `dynamics`, `readout` and the `eval_` metrics as there.

    Args:
        model: the student.
        args: a `DMTConfig`.
        teacher: the `SMTTeacher` that trained it, or the folder it, or the student, was saved in.
        others: Trainer's.
    """

    config_class = DMTConfig

    def new_teacher(self) -> SMTTeacher:
        raise ValueError("teacher: expected the one that trained the student, or the folder that SMTTrainer saved")

    def make_losses(self) -> DMTLosses:
        self.teacher.requires_grad_(False).eval()
        return DMTLosses(self.model, self.teacher, self.args)
