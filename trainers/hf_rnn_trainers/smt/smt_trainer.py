"""Training a recurrent network in parallel over time, one step at a time from memories that a teacher makes."""

from typing import Any

import torch
from torch import Tensor

from hf_rnn_trainers.memory.losses import dynamics_loss, known, prediction_loss, uniformity_loss
from hf_rnn_trainers.memory.memory_trainer import Losses, MemoryTrainer
from hf_rnn_trainers.memory.teacher import SMTTeacher
from hf_rnn_trainers.memory.windows import Sequences, contexts, futures, sample_positions
from hf_rnn_trainers.smt.smt_config import SMTConfig


class SMTLosses(Losses):
    """L = a L_decoder + b L_dynamics + c L_uniformity, and the readout's own.

    With m_t = E(x_..t), the empty memory before the first token:
    L_decoder = CE(y_t.., D(m_t, x_t+1..)), L_dynamics = MSE(f(m_{t-1}, x_t), m_t). The network is evaluated once,
    whatever T is.
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
            decoded = memories[rows, t]
            rows_all, t_all = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).nonzero().unbind(1)
            before, after = memories[rows_all, t_all - 1], memories[rows_all, t_all]
        else:
            rows_all, t_all = rows, t
            ids, mask = contexts(x, rows.repeat(2), torch.cat([t - 1, t]), args.context_size)
            before, after = self.student.to_memory(self.teacher.encode(ids, mask)).chunk(2)
            decoded = after
        before = torch.where((t_all == 0)[:, None, None], self.student.initial_memory(len(t_all)), before)
        labels = (before.detach(), after.detach()) if args.detach_labels else (before, after)
        token, target = x[rows_all, t_all], y[rows_all, t_all]
        future, targets = futures(batch, rows, t, args.future_size)

        dynamics = dynamics_loss(self.student.update_memory(labels[0], token), labels[1])
        logits = self.teacher.decode(decoded, future)
        uniformity = uniformity_loss(after, generator=generator)
        readout = prediction_loss(self.student.read_memory(after.detach(), token), target)
        decoder = prediction_loss(logits, targets)
        first = prediction_loss(logits[:, 0], targets[:, 0])
        loss = args.coef_decoder * decoder + args.coef_dynamics * dynamics + args.coef_uniformity * uniformity
        return dict(
            loss=loss + args.coef_readout * readout,
            decoder=known(decoder, targets),
            decoder_first=known(first, targets[:, 0]),
            dynamics=dynamics,
            uniformity=uniformity,
            readout=known(readout, target),
        )


class SMTTrainer(MemoryTrainer):
    """Supervised Memory Training ("Pretraining Recurrent Networks without Recurrence", 2026): a transformer teacher
    learns memories that predict the future, the student to make each from the one before. No step waits for another.

    Logged: `decoder` (cross-entropy of the future), `decoder_first` (of the next target from the memory alone: what
    the student can reach), `dynamics` (its one-step error), `uniformity`, `readout`. `eval_loss` is that of the
    student's own rollout from the empty memory, without the teacher; with it come the same terms and `eval_drift`,
    `eval_drift_last`: the mean square between its memories and the teacher's, over the rollout and at its end.

    Args:
        model: a causal language model with memories (`hf_rnn.MemoryProtocol`).
        args: an `SMTConfig`.
        teacher: an `SMTTeacher` or where one was saved; default: a new one, as `args` has it.
        others: Trainer's. Data as for causal language models, input_ids and labels (B, T + 1).
    """

    config_class = SMTConfig

    def card_method(self) -> str:
        return "Supervised Memory Training (one step at a time, from the memories of a transformer, in `teacher`)"

    def new_teacher(self) -> SMTTeacher:
        args, settings = self.args, {}
        if args.teacher_hidden_size is not None:
            settings["hidden_size"] = args.teacher_hidden_size
        return SMTTeacher.for_student(
            self.model,
            encoder_layers=args.teacher_encoder_layers,
            decoder_layers=args.teacher_decoder_layers,
            num_heads=args.teacher_heads,
            all_positions=args.all_positions,
            **settings,
        )

    def make_losses(self) -> SMTLosses:
        self.teacher.requires_grad_(True)  # DMT may have frozen it
        return SMTLosses(self.model, self.teacher, self.args)
