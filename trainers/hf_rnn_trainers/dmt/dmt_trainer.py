"""Training a recurrent network on the memories that it comes to by itself."""

from typing import Any

import torch
from torch import Tensor

from hf_rnn_trainers.dmt.dmt_config import DMTConfig
from hf_rnn_trainers.memory.losses import dynamics_loss, known, prediction_loss
from hf_rnn_trainers.memory.memory_trainer import Losses, MemoryTrainer
from hf_rnn_trainers.memory.rollouts import labels, rollout
from hf_rnn_trainers.memory.teacher import SMTTeacher


class DMTLosses(Losses):
    """L = a MSE(f(m^_{t-1}, x_t), m_t) + b CE(y_t, read(m^_t)), m^ the student's rollout, m the teacher's memory.

    The rollout is made without a graph; then the steps that have labels are made again, all at once, with one. The
    readout's error stops at the memory it reads.
    """

    def __init__(self, student: Any, teacher: SMTTeacher, args: DMTConfig):
        super().__init__(student, args)
        self.label = lambda x, rows, t: labels(student, teacher, x, rows, t, args.context_size)

    def forward(self, x: Tensor, y: Tensor, lengths: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        args, (rows, time) = self.args, x.shape
        position = torch.arange(time, device=x.device)
        real = position < lengths[:, None]
        first = torch.rand(rows, generator=generator).to(x.device) * lengths.clamp(min=1, max=args.label_every)
        row, t = (real & (position % args.label_every == first.long()[:, None])).nonzero().unbind(1)
        taught = self.label(x, row, t)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not args.detach_rollout):
            memories = rollout(self.student, x)
        if args.detach_rollout:
            before = torch.cat([self.student.initial_memory(rows)[:, None], memories[:, :-1]], 1)
            predicted = self.student.update_memory(before[row, t], x[row, t])
        else:
            predicted = memories[row, t]
        dynamics = dynamics_loss(predicted, taught)
        read = (y != -100) & real
        readout = prediction_loss(self.student.read_memory(memories.detach()[read], x[read]), y[read])
        return dict(
            loss=args.coef_dynamics * dynamics + args.coef_readout * readout,
            dynamics=dynamics,
            readout=known(readout, y[read]),
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

    def card_method(self) -> str:
        return "DAgger Memory Training (its own rollouts, pulled back to the memories of a transformer, in `teacher`)"

    def new_teacher(self) -> SMTTeacher:
        raise ValueError("teacher: expected the one that trained the student, or the folder that SMTTrainer saved")

    def make_losses(self) -> DMTLosses:
        self.teacher.requires_grad_(False).eval()
        return DMTLosses(self.model, self.teacher, self.args)
