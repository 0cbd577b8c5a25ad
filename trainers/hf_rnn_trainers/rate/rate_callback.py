"""The rate term as a callback, for any Trainer."""

import math
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_rnn_kernels.coding import GeneralizedGaussian, dequantize, entropy, quantize
from hf_rnn_trainers.rate.pictures import draw_rate
from hf_rnn_trainers.rate.rate_config import RateSettings, check_arguments
from hf_rnn_trainers.rate.rate_step import fit, local, moments, published_step, shrink, whole

logger = logging.get_logger(__name__)
_GAIN_BITS, _GAIN_LOSS = 0.2, 0.5  # of the logarithm of the multiplier, an estimate and an evaluation
_ROUNDING = 0.1, 3.0  # squared steps of error that a bit is worth where weights are rounded: to begin with, at most
_AHEAD = 6  # estimates: bits follow the multiplier slowly, so it is steered by where they are going
_PUBLISHED_LAMBDA = 2e3


class RateCallback(TrainerCallback, ExportableState):
    """Pulls weights towards what costs few bits after each optimizer step: `Trainer(..., callbacks=[RateCallback()])`.

    Matrices that train are constrained, adapters of PEFT included; parameters of one dimension and those that
    `rate_exclude` matches are not. Shapes are estimated over all shards of a tensor (FSDP 2), so that processes agree.
    Interrupted while `quantization_aware` stands in quantised weights, a stock Trainer leaves them: `restore()`.
    In the last share of the steps (`rate_finetune`) the term rests, and what is zero stays zero; with `target_bits` it
    goes on, since bits would leave the target. With `quantization_aware` the weights are on the grid when training
    ends: coded with this step and `rate=0` the model is the same bit for bit.

    Logged: `rate_shape` (nu, mean over weights), `estimated_bits` (of the fitted density) and `coded_bits` (order-0
    entropy of the quantised weights), both per constrained weight at `rate_step`, `zeros` (their share),
    `rate_multiplier` (what the controller makes of 1), and `paper_lambda`: the published multiplier that would move
    the average weight as far, the mean shrinkage a step times N / nu.

    Args:
        settings: fields of `RateSettings`.
    """

    def __init__(self, **settings: Any):
        self.settings = RateSettings(**settings)
        self._parameters: dict[str, Tensor] = {}
        self._bases: list[Tensor | None] = []  # of each, what only the difference to costs bits
        self._kept: list[Tensor] = []
        self._begin()

    def _begin(self) -> None:
        self.multiplier = 1.0
        self.rounding = _ROUNDING[0]
        self.fits: list[list[float]] = []  # (nu, root mean square) of each constrained tensor
        self.last_bits: float | None = None
        self.steered_at = -1  # step of the last evaluation that counted
        self.step_exponent: int | None = None
        self.reference_loss = self.settings.reference_loss
        self._rests = False
        self._zeros: list[Tensor] = []
        self._sizes: list[float] = []  # learning rate times multiplier of each tensor in the last step

    def state(self) -> dict:
        """What a checkpoint keeps."""
        names = ("multiplier", "rounding", "fits", "last_bits", "steered_at", "step_exponent", "reference_loss")
        return {"args": asdict(self.settings), "attributes": {name: getattr(self, name) for name in names}}

    @property
    def step(self) -> float:
        """The quantisation step that bits are reported at."""
        if self.step_exponent is None:
            raise ValueError("rate_step: known when training begins")
        return 2.0**self.step_exponent

    def constrain(self, model: torch.nn.Module) -> None:
        """Choose the parameters.

        Raises:
            ValueError: there are none.
        """
        exclude = re.compile(self.settings.rate_exclude)
        self._parameters = {
            name: p
            for name, p in model.named_parameters()
            if p.requires_grad and p.dim() > 1 and not (self.settings.rate_exclude and exclude.search(name))
        }
        if not self._parameters:
            raise ValueError(f"rate_exclude: {self.settings.rate_exclude!r} leaves no matrix that trains to constrain")
        bases = {} if self.settings.rate_base is None else read_base(model, self.settings.rate_base)
        self._bases = [None if name not in bases else bases[name].to(p) for name, p in self._parameters.items()]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.restore()  # of a run that was interrupted
        check_arguments(self.settings, args)
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        self._begin()
        if state.global_step > 0 and isinstance(saved, dict):
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
            self.steered_at = state.global_step  # eval_on_start evaluates again where no evaluation was
        self.constrain(model)
        if self.settings.rate_step is not None:
            self.step_exponent = round(math.log2(self.settings.rate_step))
        elif self.step_exponent is None:
            total = moments(self._weights()).sum(0)
            # A difference is nothing yet; an optimizer moves weights by about its learning rate
            size = float((total[1] / total[2]).sqrt()) / 8 if self.settings.rate_base is None else args.learning_rate
            self.step_exponent = round(math.log2(max(size, 2.0**-100)))

    def on_step_begin(self, args, state, control, **kwargs):
        if self.settings.quantization_aware and self._finetunes(state) and not self._kept:
            self._kept = [local(p).detach().clone() for p in self._parameters.values()]
            self._round()

    @torch.no_grad()
    def _round(self) -> None:
        """Weights, or their differences to the base, to the grid, with what a bit is worth there."""
        assert self.step_exponent is not None
        grid = [(quantize(local(w), self.step_exponent, self.rounding), w.dtype) for w in self._weights()]
        self._put([dequantize(q, self.step_exponent, dtype) for q, dtype in grid])

    def restore(self) -> None:
        """Put back the weights that quantised ones stood in for."""
        with torch.no_grad():
            for p, kept in zip(self._parameters.values(), self._kept, strict=False):  # none, or all
                local(p).copy_(kept)
        self._kept = []

    def rest(self) -> None:
        """Leave out the next optimizer step."""
        self._rests = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.restore()
        # Zeros that the rate made, not those that a fresh adapter or a model without a rate begins with
        if self._finetunes(state) and self.fits and self.settings.rate_shrink > 0:
            self._zeros = [local(w) == 0 for w in self._weights()]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self._rests or getattr(optimizer, "step_was_skipped", False):
            self._rests = False
            return
        weights = self._weights()
        last = self._finetunes(state)
        if last:
            with torch.no_grad():
                for w, zero in zip(weights, self._zeros, strict=False):  # none, or all
                    local(w).masked_fill_(zero, 0)
            self._put(weights)
            self._zeros, self._sizes = [], []
            if self.settings.target_bits is None:
                return
        every = 1 if self.settings.paper_preset else self.settings.rate_every
        if not self.fits or state.global_step % every == 0:
            scope = "global" if self.settings.paper_preset else self.settings.rate_scope
            self.fits = [list(pair) for pair in fit(moments(weights), scope)]
            if self.settings.target_bits is not None:
                bits = self.coded_bits()
                ahead = bits + _AHEAD * (bits - (bits if self.last_bits is None else self.last_bits))
                self._steer(_GAIN_BITS * max(-1.0, min(1.0, ahead - self.settings.target_bits)))
                self.last_bits = bits
                if last and self.settings.quantization_aware:
                    off = (bits - self.settings.target_bits) / self.settings.target_bits
                    self.rounding = min(_ROUNDING[1], self.rounding * math.exp(5 * max(-0.2, min(0.2, off))))
        if self.settings.paper_preset:
            total = sum(p.numel() for p in self._parameters.values())
            published_step([local(w) for w in weights], self.fits[0][0], _PUBLISHED_LAMBDA, total)
        elif self.settings.rate_shrink > 0:
            self._sizes = self._step_sizes(state, optimizer)
            keep_norm = [base is None for base in self._bases]
            # Adam's first steps leave a flat difference, of a shape whose slope at zero is none
            fits = [(nu if keep else min(nu, 1.0), r) for (nu, r), keep in zip(self.fits, keep_norm, strict=True)]
            shrink(weights, fits, self._sizes, self.settings.rate_epsilon, keep_norm)
            self._put(weights)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.settings.max_loss_increase is None or not metrics or state.global_step == self.steered_at:
            return
        if "eval_loss" not in metrics:
            several = [name for name in metrics if re.fullmatch("eval_.+_loss", name)]
            if several:
                raise ValueError(f"max_loss_increase: expected one eval_dataset, with an eval_loss, got {several}")
            return
        self.steered_at = state.global_step
        if self.reference_loss is None:
            self.reference_loss = metrics["eval_loss"]
            return
        room = self.settings.max_loss_increase - (metrics["eval_loss"] / self.reference_loss - 1)
        self._steer(_GAIN_LOSS * max(-1.0, min(1.0, room / self.settings.max_loss_increase)))

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is not None and "loss" in logs and "coded_bits" not in logs and self._parameters:
            found = self.metrics()
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)

    def on_train_end(self, args, state, control, **kwargs):
        if self.settings.quantization_aware:
            self.restore()
            self._reach()
            self._round()
            self.rounding = 0.0  # they are rounded
        found = zip(self._parameters, self._weights(), strict=True)
        weights = {name: whole(w).float().cpu() for name, w in found}
        if state.is_world_process_zero:
            draw_rate(state.log_history, weights, Path(args.output_dir) / "rate.png")

    def _reach(self) -> None:
        """The rounding that comes nearest to the target: the last of what training left."""
        if self.settings.target_bits is None:
            return
        low, high = 0.0, _ROUNDING[1]
        for _ in range(8):
            self.rounding = (low + high) / 2
            low, high = (self.rounding, high) if self.coded_bits() > self.settings.target_bits else (low, self.rounding)

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        sums = moments(self._weights())
        share = sums[:, 2] / sums[:, 2].sum()
        means = (sums[:, :2] / sums[:, 2:].clamp(min=1)).tolist()
        densities = [GeneralizedGaussian.from_moments(*mean) for mean in means]
        gone = [name for name, total in zip(self._parameters, sums[:, 0].tolist(), strict=True) if total == 0]
        if gone:
            logger.warning_once(f"rate_shrink: nothing is left of {', '.join(gone)}; a smaller one leaves more")
        nonzero = sum(int(whole((w != 0).sum())) for w in self._weights())
        shape = float(sum(d.shape * s for d, s in zip(densities, share.tolist(), strict=True)))
        bits = sum(d.bits(self.step) * s for d, s in zip(densities, share.tolist(), strict=True))
        found = dict(
            rate_shape=shape,
            estimated_bits=float(bits),
            coded_bits=self.coded_bits(),
            zeros=1 - nonzero / float(sums[:, 2].sum()),
            rate_multiplier=self.multiplier,
        )
        return found | {"paper_lambda": self._paper_lambda(sums)}

    def coded_bits(self) -> float:
        """Order-0 entropy of the quantised weights, bits each: what `save_compressed` at this step comes near to; with
        `quantization_aware` of those on the grid that training is in."""
        assert self.step_exponent is not None
        rounding = self.rounding if self.settings.quantization_aware else 0.0
        total = bits = 0.0
        for w in self._weights():
            q = quantize(whole(w), self.step_exponent, rounding)
            total += q.numel()
            bits += q.numel() * entropy(q)
        return bits / total

    def _weights(self) -> list[Tensor]:
        """What costs bits: the parameters themselves, or their differences to a base."""
        pairs = zip(self._parameters.values(), self._bases, strict=True)
        return [p.detach() if base is None else p.detach() - base for p, base in pairs]

    @torch.no_grad()
    def _put(self, weights: list[Tensor]) -> None:
        """Make the parameters what `_weights` would give these for."""
        for p, w, base in zip(self._parameters.values(), weights, self._bases, strict=True):
            if base is not None:
                p.copy_(base + w)
            elif local(w).data_ptr() != local(p).data_ptr():
                local(p).copy_(local(w))

    def _finetunes(self, state) -> bool:
        return state.global_step >= round(state.max_steps * (1 - self.settings.rate_finetune))

    def _steer(self, change: float) -> None:
        """More of the rate term, or less; within a factor of a thousand."""
        self.multiplier = min(1e3, max(1e-3, self.multiplier * math.exp(change)))

    def _step_sizes(self, state, optimizer) -> list[float]:
        """Learning rate times multiplier for each tensor."""
        warmup = self.settings.rate_warmup * state.max_steps
        scale = self.settings.rate_shrink * self.multiplier * min(1.0, (state.global_step + 1) / max(warmup, 1))
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        return [float(rates.get(id(p), 0.0)) * scale for p in self._parameters.values()]

    def _paper_lambda(self, sums: Tensor) -> float:
        """N times the mean shrinkage of the last step over nu, at a root mean square weight."""
        if self.settings.paper_preset:
            return _PUBLISHED_LAMBDA
        if not self._sizes:
            return 0.0
        nu = torch.tensor([nu for nu, _ in self.fits], dtype=torch.float64)
        slope = (1 + self.settings.rate_epsilon) ** (nu - 1)
        return float((sums[:, 2] * torch.tensor(self._sizes, dtype=torch.float64) * slope).sum())


def read_base(model: torch.nn.Module, base: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint that the model has too, by its names, in the dtype they are stored in.

    Raises:
        ValueError: adapters, or a sharded model.
    """
    if not isinstance(model, PreTrainedModel) or any(hasattr(p, "to_local") for p in model.parameters()):
        raise ValueError("rate_base: expected a PreTrainedModel without adapters, not sharded; leave it out")
    how: dict[str, Any] = dict(dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True)
    found: Any
    info: dict[str, Any]
    found, info = type(model).from_pretrained(base, **how)
    new = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
    return {name: p.detach() for name, p in found.named_parameters() if name not in new}


def settings_of(args: Any) -> dict[str, Any]:
    """The `RateSettings` among larger arguments."""
    return {f.name: getattr(args, f.name) for f in fields(RateSettings)}
