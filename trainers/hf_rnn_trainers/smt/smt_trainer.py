"""Training a recurrent network in parallel over time, one step at a time from memories that a teacher makes."""

from typing import Any

import torch
from torch import Tensor

from hf_rnn_trainers.memory.losses import dynamics_loss, known, prediction_loss, uniformity_loss
from hf_rnn_trainers.memory.memory_trainer import Losses, MemoryTrainer
from hf_rnn_trainers.memory.rollouts import run_chunks
from hf_rnn_trainers.memory.teacher import SMTTeacher
from hf_rnn_trainers.memory.windows import Sequences, chunks, contexts, futures, sample_positions
from hf_rnn_trainers.smt.smt_config import SMTConfig


class SMTLosses(Losses):
    """L = a L_decoder + b L_dynamics + c L_uniformity, and the readout's own.

    With m_t = E(x_..t), the empty memory before the first token:
    L_decoder = CE(y_t.., D(m_t, x_t+1..)), L_dynamics = MSE(f(m_{t-1}, x_t), m_t). The network is evaluated once,
    whatever T is.

    With `student_steps` = k it makes k steps in a row from m_{t-1}, each held against the teacher's memory there, and
    with `coef_student` is told what it should have read from them: k evaluations, whatever T is. With all positions a
    row is cut into chunks of k from an offset by chance, the first from the empty memory; else each position sampled
    begins one.
    """

    def __init__(self, student: Any, teacher: SMTTeacher, args: SMTConfig):
        super().__init__(student, args)
        self.teacher = teacher

    def forward(self, x: Tensor, y: Tensor, lengths: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        args, batch = self.args, Sequences(x, y, lengths)
        t = sample_positions(batch, args.positions_per_sequence, args.first_share, args.labelled_share, generator)
        rows, t = torch.arange(len(x), device=x.device).repeat_interleave(t.shape[1]), t.flatten()
        if self.teacher.config.all_positions:
            if self.training and x.shape[1] > args.context_size:
                raise ValueError(
                    f"context_size: with all_positions the teacher remembers a whole row; expected at least its "
                    f"{x.shape[1]} tokens, got {args.context_size}"
                )
            memories = self.student.to_memory(self.teacher.encode_all(x).flatten(0, 1)).unflatten(0, x.shape)
            row, start, end = chunks(lengths, args.student_steps, generator)
            decoded, before = memories[rows, t], memories[row, start - 1]  # one that predicts for each (rows, t)
        else:
            row, start, end = rows, t, (t + args.student_steps).minimum(lengths[rows]).maximum(t + 1)
            at = (t + torch.arange(-1, args.student_steps, device=x.device)[:, None]).clamp(max=x.shape[1] - 1)
            ids, mask = contexts(x, rows.repeat(len(at)), at.flatten(), args.context_size)
            memories = self.student.to_memory(self.teacher.encode(ids, mask)).unflatten(0, at.shape)
            before = memories[0]
        before = torch.where((start == 0)[:, None, None], self.student.initial_memory(len(start)), before)
        if args.detach_labels:
            before = before.detach()
        own, chunk, step = run_chunks(self.student, x, before, row, start, end)
        row, at = row[chunk], start[chunk] + step
        after = memories[row, at] if self.teacher.config.all_positions else memories[step + 1, chunk]
        token, target = x[row, at], y[row, at]

        dynamics = dynamics_loss(own, after.detach() if args.detach_labels else after)
        if not self.teacher.config.all_positions:
            decoded = after[step == 0]
        future, targets = futures(batch, rows, t, args.future_size)
        logits = self.teacher.decode(decoded, future) if self.teacher.config.decoder_layers else None
        uniformity = uniformity_loss(after, generator=generator)
        seen = torch.lerp(after.detach(), after, args.coef_first) if args.coef_first else after.detach()
        readout = prediction_loss(self.student.read_memory(seen, token), target)
        terms = dict(dynamics=dynamics, uniformity=uniformity, readout=known(readout, target))
        decoder: Tensor | float = 0.0
        if logits is not None:
            decoder = prediction_loss(logits, targets)
            first = prediction_loss(logits[:, 0], targets[:, 0])
            terms = dict(decoder=known(decoder, targets), decoder_first=known(first, targets[:, 0])) | terms
        loss = args.coef_decoder * decoder + args.coef_dynamics * dynamics + args.coef_uniformity * uniformity
        loss = loss + args.coef_readout * readout
        if args.coef_student:
            student = prediction_loss(self.student.read_memory(own, token), target)
            loss = loss + args.coef_student * student
            terms["student"] = known(student, target)
        return dict(loss=loss) | terms


class SMTTrainer(MemoryTrainer):
    """Supervised Memory Training ("Pretraining Recurrent Networks without Recurrence", 2026): a transformer teacher
    learns memories that predict the future, the student to make each from the one before. No step waits for another.

    Logged: `decoder` (cross-entropy of the future), `decoder_first` (of the next target from the memory alone: what
    the student can reach), `dynamics` (the error of its steps), `uniformity`, `readout` (the next target from the
    teacher's memories), with `coef_student` also `student` (from its own). `eval_loss` is that of the student's own
    rollout from the empty memory, without the teacher; with it come the same terms and `eval_drift`,
    `eval_drift_last`: the mean square between its memories and the teacher's, over the rollout and at its end.

    Args:
        model: a causal language model with memories (`hf_rnn.MemoryProtocol`).
        args: an `SMTConfig`.
        teacher: an `SMTTeacher` or where one was saved; default: a new one, as `args` has it.
        others: Trainer's. Data as for causal language models, input_ids and labels (B, T + 1).
    """

    config_class = SMTConfig

    def card_method(self) -> str:
        steps = "one step at a time" if self.args.student_steps == 1 else f"{self.args.student_steps} steps in a row"
        return f"Supervised Memory Training ({steps}, from the memories of a transformer, in `teacher`)"

    def new_teacher(self) -> SMTTeacher:
        args = self.args
        chosen = dict(hidden_size=args.teacher_hidden_size, queries=args.teacher_queries)
        return SMTTeacher.for_student(
            self.model,
            encoder_layers=args.teacher_encoder_layers,
            decoder_layers=args.teacher_decoder_layers,
            num_heads=args.teacher_heads,
            all_positions=args.all_positions,
            conv_kernel=args.teacher_conv_kernel,
            timestamps=args.context_size if args.teacher_timestamps else 0,
            **{name: value for name, value in chosen.items() if value is not None},
        )

    def make_losses(self) -> SMTLosses:
        if self.teacher is None:
            raise ValueError("teacher: memories are what this trainer teaches; expected one, got False")
        if self.args.coef_decoder and not self.teacher.config.decoder_layers:
            raise ValueError(
                f"coef_decoder: expected 0, since the teacher has no decoder, got {self.args.coef_decoder}"
            )
        self.teacher.requires_grad_(True)  # DMT may have frozen it
        return SMTLosses(self.model, self.teacher, self.args)
