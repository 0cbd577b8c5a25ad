"""Training a recurrent network on the memories that it comes to by itself."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME

from hf_rnn_trainers.dmt.dmt_config import DMTConfig
from hf_rnn_trainers.memory.losses import dynamics_loss, known, prediction_loss
from hf_rnn_trainers.memory.memory_trainer import Losses, MemoryTrainer
from hf_rnn_trainers.memory.rollouts import labels, rollout, run_chunks
from hf_rnn_trainers.memory.teacher import SMTTeacher
from hf_rnn_trainers.memory.windows import chunks


def take_over(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """The state that the optimizer of an SMT run had of the student's parameters; rates and schedule stay.

    Raises:
        ValueError: no such file, or of another network or another optimizer.
    """
    path = checkpoint / OPTIMIZER_NAME
    if not path.is_file():
        raise ValueError(f"optimizer_from: expected a checkpoint folder with {OPTIMIZER_NAME}, got {checkpoint}")
    theirs, mine = torch.load(path, map_location="cpu", weights_only=True), optimizer.state_dict()
    state = {}
    groups = zip(theirs["param_groups"], mine["param_groups"], optimizer.param_groups, strict=False)
    for before, now, group in groups:  # the student's parameters come first in each, then the teacher's
        for old, new, p in zip(before["params"], now["params"], group["params"], strict=False):
            values = theirs["state"].get(old, {})
            if any(torch.is_tensor(v) and v.dim() and v.shape != p.shape for v in values.values()):
                raise ValueError(f"optimizer_from: {path} is of another network than this student")
            state[new] = values
    optimizer.load_state_dict({"state": state, "param_groups": mine["param_groups"]})


class DMTLosses(Losses):
    """L = a MSE(f(m^_{t-1}, x_t), m_t) + b CE(y_t, read(m^_t)), m^ the student's rollout, m the teacher's memory.

    The rollout is made without a graph; then the steps that have labels are made again, all at once, with one. The
    readout's error stops at the memory it reads, or with `readout_steps` = k > 0 at the beginning of a chunk of k steps
    that are made again with a graph, all chunks side by side: truncated backpropagation. That is all without a
    teacher, and with a = 0, where no labels are made.
    """

    def __init__(self, student: Any, teacher: SMTTeacher | None, args: DMTConfig):
        super().__init__(student, args)
        if teacher is None and not args.readout_steps:
            raise ValueError("readout_steps: expected at least 1 without a teacher, where nothing else trains, got 0")
        self.taught = teacher is not None
        if teacher is not None:
            self.label = lambda x, rows, t: labels(student, teacher, x, rows, t, args.context_size)

    def forward(self, x: Tensor, y: Tensor, lengths: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        args, (rows, time) = self.args, x.shape
        position = torch.arange(time, device=x.device)
        real = position < lengths[:, None]
        first = torch.rand(rows, generator=generator).to(x.device) * lengths.clamp(min=1, max=args.label_every)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.taught and not args.detach_rollout):
            memories = rollout(self.student, x)
        before = torch.cat([self.student.initial_memory(rows)[:, None], memories[:, :-1]], 1)
        terms = {}
        if self.taught and (args.coef_dynamics or not args.readout_steps or not self.training):
            row, t = (real & (position % args.label_every == first.long()[:, None])).nonzero().unbind(1)
            taught = self.label(x, row, t)
            if args.detach_rollout:
                predicted = self.student.update_memory(before[row, t], x[row, t])
            else:
                predicted = memories[row, t]
            terms["dynamics"] = dynamics_loss(predicted, taught)
        row, t, memory = self._to_be_read(x, lengths, memories.detach(), before.detach(), generator)
        read = y[row, t] != -100
        token, target = x[row, t][read], y[row, t][read]
        readout = prediction_loss(self.student.read_memory(memory[read], token), target)
        loss = args.coef_dynamics * terms.get("dynamics", 0.0) + args.coef_readout * readout
        return dict(loss=loss) | terms | dict(readout=known(readout, target))

    def _to_be_read(
        self, x: Tensor, lengths: Tensor, memories: Tensor, before: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and positions of all real tokens, (M,) each, and the memories there, (M, K, D)."""
        if not self.args.readout_steps:
            row, t = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).nonzero().unbind(1)
            return row, t, memories[row, t]
        rows, start, end = chunks(lengths, self.args.readout_steps, generator)
        memory, chunk, step = run_chunks(self.student, x, before[rows, start], rows, start, end)
        return rows[chunk], start[chunk] + step, memory


class DMTTrainer(MemoryTrainer):
    """DAgger Memory Training: the student runs from the empty memory, the teacher says at every `label_every`-th step
    what it should have remembered. The teacher is frozen; the readout goes on learning.

    After `SMTTrainer`, with the teacher from there. `dynamics`, `readout` and the `eval_` metrics as there.

    With `readout_steps` = k the readout's error goes back through up to k steps as well. With `teacher=False` it is all
    there is: truncated backpropagation, the gradient of `RecurrentTrainer(backprop="truncated", chunk_size=k)` but for
    where chunks begin, which is by chance here, and for all chunks going back side by side instead of in turn.

    Args:
        model: the student.
        args: a `DMTConfig`.
        teacher: the `SMTTeacher` that trained it, or the folder it, or the student, was saved in; False: none.
        others: Trainer's.
    """

    config_class = DMTConfig

    def create_optimizer(self, model=None):
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.args.optimizer_from is not None:
            take_over(optimizer, Path(self.args.optimizer_from))
        return optimizer

    def card_method(self) -> str:
        if self.teacher is None:
            return f"backpropagation truncated to {self.args.readout_steps} steps (`DMTTrainer`, no teacher)"
        return "DAgger Memory Training (its own rollouts, pulled back to the memories of a transformer, in `teacher`)"

    def new_teacher(self) -> SMTTeacher:
        raise ValueError(
            "teacher: expected the one that trained the student, the folder that SMTTrainer saved, or False for none"
        )

    def make_losses(self) -> DMTLosses:
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()
        return DMTLosses(self.model, self.teacher, self.args)
