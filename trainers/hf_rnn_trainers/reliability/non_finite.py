"""Stop at the first loss that is not finite, before it reaches a weight or a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from hf_rnn_trainers.reliability.manifest import newest_whole

logger = logging.get_logger(__name__)


class NonFiniteLossError(FloatingPointError):
    """The training loss or its gradient was NaN or infinite. The weights are those before the step."""


class NonFiniteGuard(Trainer):
    """Trainer that raises `NonFiniteLossError` instead of training on.

    The stock Trainer trains on with NaN weights, saves them, and logs a loss of 0.0 (`logging_nan_inf_filter`). Here
    training stops in the step that met the loss, on every process at once; no optimizer step is made with it, the last
    checkpoint stays the last, and the batch is kept beside it. The argument `max_skipped_steps`, where there is one,
    lets so many steps of a run pass first: they change no weight and no state of the optimizer, and the loss logged is
    the mean of the others, beside `skipped_steps`. Weights that are not finite are never saved.

    A step whose loss is NaN because its data have no targets, all labels being -100, is left out with a warning and
    counts for nothing.
    """

    model: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_GradientGuard(self))
        self._count_anew()

    def _count_anew(self) -> None:
        self._skipped = 0  # steps of this run, of those that `max_skipped_steps` limits
        self._skips = False  # this step is left out
        self._step_loss = torch.zeros(())  # what this step's batches added to the loss so far
        self._since_log = [0, 0]  # steps, and those without a finite loss
        self._since_start = [0, 0]

    def train(self, *args, **kwargs):
        self._since_start = [0, 0]
        return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args, **kwargs):
        """Trainer's, which begins again with a smaller batch where one was too large (`auto_find_batch_size`)."""
        if steps := self._since_start[0]:
            logger.warning(
                f"auto_find_batch_size: out of memory after {steps} steps; begins anew with a smaller batch, from the "
                "weights that these steps made"
            )
        self._count_anew()
        self.current_flos = 0
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        losses = self.accelerator.gather(loss.detach().reshape(1))
        if not torch.isfinite(losses).all():
            without = self.accelerator.gather(losses.new_full((1,), has_no_targets(inputs)))
            if (losses.isfinite() | without.bool()).all():
                self.leave_out_without_targets()
            else:
                self.skip_or_stop(self._describe_non_finite_loss(losses, inputs))
            loss = -self._step_loss.to(loss.device)  # as if the step's other batches had not been
        elif self._skips:
            loss = torch.zeros_like(loss)
        self._step_loss = self._step_loss.to(loss.device) + loss.detach()
        return loss

    def skip_or_stop(self, message: str) -> None:
        """Leave this step out, while there is room for that.

        Raises:
            NonFiniteLossError: there is none.
        """
        limit = getattr(self.args, "max_skipped_steps", 0)  # transformers' own have none
        if not self._skips:
            if self._skipped >= limit:
                raise NonFiniteLossError(f"{message} {self.advice()}")
            logger.warning(f"{message} Skipped, {self._skipped + 1} of at most {limit}.")
            self._skipped += 1
        self.leave_out()

    def leave_out_without_targets(self) -> None:
        """Leave this step out, since there is nothing to learn from its data."""
        if not self._skips:
            logger.warning(f"step {self.state.global_step}: all labels are -100, nothing to learn from; left out")
        self.leave_out()

    def leave_out(self) -> None:
        """Make this step change no weight and no state of the optimizer."""
        self._skips = True

    def _describe_non_finite_loss(self, losses: torch.Tensor, inputs: dict) -> str:
        step = self.state.global_step
        tensors = {name: x.detach().cpu().contiguous() for name, x in inputs.items() if torch.is_tensor(x)}
        path = (
            Path(self.args.output_dir or ".")
            / f"_non_finite_batch_step_{step}_process_{self.args.process_index}.safetensors"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: x.clone() for name, x in tensors.items()}, path)
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        return (
            f"loss {losses.tolist()} (one per process) at step {step}, batch {shapes}, kept in {path}; if that batch "
            "alone gives such a loss, look at its data."
        )

    def advice(self) -> str:
        """What to do next, in a sentence or two."""
        checkpoint, _ = newest_whole(Path(self.args.output_dir or "."))
        resume = f"resume from {checkpoint}" if checkpoint else "no checkpoint was saved yet: start again"
        return (
            f"The weights are those before this step; {resume} with a lower learning rate, max_grad_norm=1.0, or bf16 "
            "instead of fp16."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the loss of the steps that were not skipped; NaN where all were."""
        if "loss" in logs:
            (steps, without_loss), self._since_log = self._since_log, [0, 0]
            if without_loss:
                left = steps - without_loss
                logs = logs | {"loss": logs["loss"] * steps / left if left else float("nan")}
            if self._skipped:
                logs = logs | {"skipped_steps": self._skipped}
        super().log(logs, start_time)

    def _finalize_training(self, *args, **kwargs):
        """Trainer's, with a `train_loss` of the steps that had one; NaN where none had."""
        steps, without_loss = self._since_start
        factor = steps / (steps - without_loss) if steps > without_loss else float("nan")
        self._total_loss_scalar *= factor
        self._tr_loss *= factor
        return super()._finalize_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        bad = [name for name, p in self.model.named_parameters() if not _is_finite(p)]
        number = torch.tensor([len(bad)], device=self.args.device)
        if self.is_fsdp_enabled:  # where each process has other weights; elsewhere process 0 may be alone in here
            number = self.accelerator.gather(number)
        if number.any():
            raise NonFiniteLossError(
                f"{', '.join(bad[:3]) or 'weights of another process'}: not finite after step "
                f"{self.state.global_step}, and not saved. {self.advice()}"
            )
        super().save_model(output_dir, _internal_call)


class _GradientGuard(TrainerCallback):
    """Looks at the gradients before each optimizer step: a finite loss can have gradients that are not."""

    def __init__(self, trainer: NonFiniteGuard):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        trainer = self.trainer
        for counts in (trainer._since_log, trainer._since_start):
            counts[0] += 1
            counts[1] += trainer._skips
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Under fp16 the scaler skips such steps, by design
        if not trainer._skips and trainer.accelerator.scaler is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if not torch.isfinite(norm):
                trainer.skip_or_stop(f"gradient norm {norm.item()} at step {state.global_step} with a finite loss.")
        if trainer._skips:
            for p in parameters:
                p.grad = None  # which an optimizer passes by
        trainer._skips, trainer._step_loss = False, torch.zeros(())


def has_no_targets(inputs: dict[str, Any]) -> bool:
    """Whether all labels are -100, but for a row's first, which language models predict from nothing."""
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not torch.is_tensor(labels):
        return False
    predicted = labels[..., 1:] if labels.dim() > 1 and "shift_labels" not in inputs else labels
    return not bool((predicted != -100).any())


def _is_finite(p: torch.Tensor) -> bool:
    here = p.to_local() if isinstance(p, DTensor) else p
    return not here.is_floating_point() or bool(torch.isfinite(here.detach()).all())
