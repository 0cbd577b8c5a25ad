"""Stop at the first loss that is not finite, before it reaches a weight or a checkpoint."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_rnn_trainers.sharding import check_fsdp


class NonFiniteLossError(FloatingPointError):
    """The training loss or its gradient was NaN or infinite. The weights are those before the step."""


class NonFiniteGuard(Trainer):
    """Base of the package's trainers: raises `NonFiniteLossError` instead of training on.

    The stock Trainer trains on with NaN weights, saves them, and logs a loss of 0.0 (`logging_nan_inf_filter`). Here
    training stops in the step that met the loss, on every process at once; no optimizer step is made with it, the last
    checkpoint stays the last, and the batch is kept beside it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_GradientGuard(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        losses = self.accelerator.gather(loss.detach().reshape(1))
        if not torch.isfinite(losses).all():
            raise NonFiniteLossError(self._describe_non_finite_loss(losses, inputs))
        return loss

    def _describe_non_finite_loss(self, losses: torch.Tensor, inputs: dict) -> str:
        step = self.state.global_step
        tensors = {name: x.detach().cpu().contiguous() for name, x in inputs.items() if torch.is_tensor(x)}
        path = (
            Path(self.args.output_dir or ".")
            / f"non_finite_batch_step_{step}_process_{self.args.process_index}.safetensors"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: x.clone() for name, x in tensors.items()}, path)
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        return (
            f"loss {losses.tolist()} (one per process) at step {step}, batch {shapes}, kept in {path}. {self.advice()} "
            "If that batch alone gives such a loss, look at its data."
        )

    def advice(self) -> str:
        """What to do next, in a sentence or two."""
        checkpoint = get_last_checkpoint(self.args.output_dir or ".")
        resume = f"resume from {checkpoint}" if checkpoint else "no checkpoint was saved yet: start again"
        return (
            f"The weights are those before this step; {resume} with a lower learning rate, max_grad_norm=1.0, or bf16 "
            "instead of fp16."
        )


class _GradientGuard(TrainerCallback):
    """Looks at the gradients before each optimizer step: a finite loss can have gradients that are not."""

    def __init__(self, trainer: NonFiniteGuard):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.trainer.accelerator.scaler is not None:
            return  # under fp16 the scaler skips such steps, by design
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            raise NonFiniteLossError(
                f"gradient norm {norm.item()} at step {state.global_step} with a finite loss. {self.trainer.advice()}"
            )


class RecurrentTrainer(NonFiniteGuard, Trainer):
    """transformers' Trainer that stops at a loss that is not finite."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_fsdp(self)
