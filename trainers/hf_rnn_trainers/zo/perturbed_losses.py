"""The losses of a training step, at every perturbation that this process has to evaluate."""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from hf_rnn_trainers.reliability.non_finite import has_no_targets
from hf_rnn_trainers.zo.directions import Directions
from hf_rnn_trainers.zo.estimators import ESTIMATORS
from hf_rnn_trainers.zo.evaluation import Member, call_with, moved, perturbed, stream_losses
from hf_rnn_trainers.zo.zo_config import ZOConfig

logger = logging.get_logger(__name__)

# Tokens of a forward pass, by which it is chosen how many members and how much of a row it takes, on a CPU what stays
# in its caches (docs/log.md, 2026-11-22); the longest and the shortest piece of a row.
TOKENS, LONGEST, SHORTEST = {"cpu": 2**12, "cuda": 2**16}, 512, 32
_STREAMED = {"input_ids", "attention_mask", "labels"}


class PerturbedLosses(Trainer):
    """What `ZOTrainer` does instead of a forward and a backward pass.

    Attributes:
        directions: those that the weights are perturbed in.
        forward_passes: of this process so far, counted in evaluations of a batch by one member.
    """

    args: ZOConfig
    model: Any
    directions: Directions
    forward_passes: int

    def _share_out(self) -> None:
        """This process's part of directions (`_group` of `_groups`) and data (`_shard`), and how it takes losses."""
        self._group, self._shard = divmod(self.args.process_index, self.args.data_shards)
        self._groups = self.args.world_size // self.args.data_shards
        supported = getattr(type(self.model), "supports_perturbed", False)  # the class's: an adapter's wrapper is none
        self._streams = supported and not self._own_loss()
        self.forward_passes = 0

    def _own_loss(self) -> str | None:
        """What makes the loss another than the one that Trainer would give a language model."""
        if type(self).compute_loss is not Trainer.compute_loss:
            return f"{type(self).__name__}.compute_loss"
        if self.compute_loss_func is not None:
            return "compute_loss_func"
        return "label_smoothing_factor" if self.label_smoother else None

    def _tell_if_slow(self) -> None:
        reason, args = self._own_loss(), self.args
        fast = getattr(type(self.model), "supports_perturbed", False) and args.evaluation == "functional"
        if reason and fast and args.directions == "low_rank":
            logger.warning(
                f"{reason}: directions are evaluated one after another, since the loss may be anything; where it is "
                "Trainer's own, leave it out, and many are evaluated in one forward pass, several times as fast"
            )

    def _losses(self, inputs: dict[str, Any], step: int) -> Tensor:
        """This process's share of the losses of every direction and sign, summed, and what they are sums of: (2, N, S)
        in float64."""
        self.model.eval()
        args, signs = self.args, ESTIMATORS[self.args.estimator].signs
        shared = 0 in signs and not args.data_per_direction  # one loss of the weights themselves for all directions
        own = [sign for sign in signs if sign or not shared]
        result = torch.zeros(2, args.num_directions, len(signs), dtype=torch.float64, device=args.device)
        size = max(1, self._members_per_forward(inputs) // len(own))
        for at in range(self._group * size, args.num_directions, self._groups * size):
            group = range(at, min(at + size, args.num_directions))
            found = self._losses_of(inputs, step, [(j, sign) for j in group for sign in own])
            result[:, group.start : group.stop, : len(own)] = found.view(2, len(group), len(own))
        if shared and self._group == 0:
            result[:, :, signs.index(0)] = self._losses_of(inputs, step, [(0, 0)])
        return result

    def _members_per_forward(self, inputs: dict[str, Any]) -> int:
        """The same on every process and in every run, since the rows of matrix products decide how they round."""
        args = self.args
        if not self._together(inputs):
            return 1
        if args.directions_per_forward is not None:
            return args.directions_per_forward * len(ESTIMATORS[args.estimator].signs)
        rows, time = inputs["input_ids"].shape
        rows = rows // args.num_directions if args.data_per_direction else rows
        return max(1, self._tokens() // (rows * min(time, self._chunk_size(rows))))

    def _tokens(self) -> int:
        return TOKENS["cpu" if self.args.device.type == "cpu" else "cuda"]

    def _chunk_size(self, rows: int) -> int:
        """Tokens of each of a member's rows at a time."""
        return self.args.chunk_size or min(LONGEST, max(SHORTEST, self._tokens() // rows))

    def _together(self, inputs: dict[str, Any]) -> bool:
        """Whether several members fit in one forward pass."""
        functional = self.args.directions == "low_rank" and self.args.evaluation == "functional"
        return functional and self._streamed(inputs)

    def _streamed(self, inputs: dict[str, Any]) -> bool:
        return self._streams and {"input_ids", "labels"} <= set(inputs) <= _STREAMED

    def _losses_of(self, inputs: dict[str, Any], step: int, members: list[Member]) -> Tensor:
        """Summed losses of members, and what they are sums of: (2, M)."""
        most = self._members_per_forward(inputs)
        if len(members) > most:
            parts = [members[at : at + most] for at in range(0, len(members), most)]
            return torch.cat([self._losses_of(inputs, step, part) for part in parts], 1)
        self.forward_passes += len(members)
        args, batch = self.args, {name: self._rows(x, members) for name, x in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            run = functools.partial(self._run, batch, step, self._streamed(inputs))
            if args.evaluation == "functional":
                rows = batch["labels"].shape[1] if len(members) > 1 else 1
                return call_with(self.model, perturbed(self.directions, step, members, args.epsilon, rows), run)
            (member,) = members
            with moved(self.directions, step, member, args.epsilon, args.evaluation == "in_place"):
                return run()

    def _rows(self, x: Any, members: list[Member]) -> Any:
        """What members see of (B, ...): all of it, or each its direction's share; (M, rows, ...)."""
        if not isinstance(x, Tensor):
            return x
        if not self.args.data_per_direction:
            return x[None].expand(len(members), *x.shape)
        return x.unflatten(0, (self.args.num_directions, -1))[[j for j, _ in members]]

    def _run(self, batch: dict[str, Any], step: int, streamed: bool) -> Tensor:
        if streamed:
            chunk_size = self._chunk_size(batch["labels"].shape[1])
            return torch.stack([x.double() for x in stream_losses(self.model, batch, chunk_size)])
        inputs = {name: x[0] if isinstance(x, Tensor) else x for name, x in batch.items()}
        on_gpu, seed = self.args.device.type == "cuda", self.args.seed + step
        with torch.random.fork_rng([self.args.device] if on_gpu else []):  # the caller's random numbers stay his
            torch.default_generator.manual_seed(seed)  # the same for all members
            if on_gpu:
                torch.cuda.manual_seed(seed)
            loss = float(self.compute_loss(self.model, dict(inputs)))  # type: ignore[arg-type]
        if math.isnan(loss) and has_no_targets(inputs):
            return torch.zeros(2, 1, dtype=torch.float64, device=self.args.device)
        return torch.tensor([[loss], [1.0]], dtype=torch.float64, device=self.args.device)
