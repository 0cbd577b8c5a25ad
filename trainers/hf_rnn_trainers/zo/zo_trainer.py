"""Training without backpropagation: Trainer, with the step's gradient estimated from losses at perturbed weights."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.utils import cached_file, logging

from hf_rnn_kernels import Perturbed
from hf_rnn_trainers.reliability import NonFiniteGuard, NonFiniteLossError
from hf_rnn_trainers.zo import replay_log
from hf_rnn_trainers.zo.directions import Directions
from hf_rnn_trainers.zo.estimators import ESTIMATORS, estimate
from hf_rnn_trainers.zo.evaluation import Member, call_with, moved, perturbed, stream_losses
from hf_rnn_trainers.zo.optimizer import ZOSGD, written_out
from hf_rnn_trainers.zo.replay_log import ReplayLog
from hf_rnn_trainers.zo.zo_config import ZOConfig

logger = logging.get_logger(__name__)

TOKENS = {"cpu": 2**11, "cuda": 2**16}  # of a forward pass, by which directions_per_forward is chosen
_STREAMED = {"input_ids", "attention_mask", "labels"}
_SEARCH = 2**32 - 1  # the step whose directions the search for a learning rate uses
# The settings that a log's steps depend on
_REPLAYED = ["directions", "rank", "density", "seed", "optim", "optim_args", "weight_decay", "max_grad_norm"]
_REPLAYED += ["adam_beta1", "adam_beta2", "adam_epsilon"]


class ZOTrainer(NonFiniteGuard, Trainer):
    """Trainer whose gradient is g = (1/n) sum_j (L(w + eps delta_j) - L(w - eps delta_j)) / (2 eps) delta_j (CD-RGE,
    "Scaling Recurrent Neural Networks to a Billion Parameters with Zero-Order Optimization", arXiv 2505.17852).

    Optimizers, schedules, callbacks, collators, logging, evaluation and checkpoints are Trainer's. There is no backward
    pass: a subclass's `compute_loss` may return a float of anything, an accuracy or a reward on generated text, and
    memory does not grow with the length of sequences. g points where the gradient does only so far as its cosine
    sqrt(n / (n + d - 1)) goes, d being the number of trainable parameters.

    A causal language model of this package with the loss that Trainer would give it evaluates many low-rank directions
    in one forward pass, in chunks of time. With any other model or loss directions come one after another.

    The loss logged is the mean over perturbed weights, which is higher than that of the weights themselves;
    `eval_loss` is theirs. `grad_norm` is that of the gradient, estimated by the root mean square of the differences.
    Processes share directions (`data_shards`: and the batch), exchange losses alone, and end each step with the same
    weights. Without `data_shards` each process reads the same batch of `per_device_train_batch_size` rows.

    Args:
        args: a `ZOConfig`.
        others: Trainer's.

    Raises:
        TypeError, ValueError: arguments, weights or a set-up that cannot be trained so, with the reason.
    """

    args: ZOConfig

    def __init__(self, model=None, args: ZOConfig | None = None, **kwargs):
        if not isinstance(args, ZOConfig):
            raise TypeError(f"args: expected a ZOConfig, got {type(args).__name__}")
        super().__init__(model, args, **kwargs)
        self._refuse()
        self.directions = Directions(self.model, args.directions, args.seed, args.rank, args.density)
        self._group, self._shard = divmod(args.process_index, args.data_shards)  # of directions, of data
        self._groups = args.world_size // args.data_shards
        own_loss = type(self).compute_loss is not Trainer.compute_loss or self.compute_loss_func is not None
        self._streams = getattr(self.model, "supports_perturbed", False) and not own_loss and not self.label_smoother
        self._pending: Tensor | None = None  # summed losses and their counts (2, N, signs) of this step so far
        self._log: ReplayLog | None = None
        self._norm = 0.0
        self.forward_passes = 0  # of this process, counted in evaluations of a batch by one member
        self._seen = self._zeros = self._dropped = 0  # directions since the last log

    def _refuse(self) -> None:
        args, trained = self.args, [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError("model: expected parameters that require gradients, all are frozen")
        if args.n_gpu > 1:
            raise ValueError("DataParallel: its copies of the model know no perturbation; start a process for each GPU")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("DeepSpeed, FSDP: they shard what a perturbation needs whole; use plain processes")
        if args.world_size % args.data_shards:
            raise ValueError(f"data_shards: expected a divisor of {args.world_size} processes, got {args.data_shards}")
        for name, p in trained:
            if p.dtype == torch.float16:
                raise ValueError(f"{name}: float16 loses small updates; load the model in float32, and use bf16=True")
            if args.evaluation == "in_place" and p.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"evaluation: in_place drifts in {p.dtype} ({name}); choose functional or snapshot")

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        # Without the wrapper whose buckets hold gradients
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None) -> tuple[Any, dict[str, Any]]:
        """`ZOSGD` for plain SGD, which needs no gradients; else Trainer's, for which they are written out."""
        if args.optim == "sgd" and not args.max_grad_norm and not args.optim_args:
            return ZOSGD, {"lr": args.learning_rate}
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, model=None):
        if self.args.world_size > 1:
            for p in self.model.parameters():
                broadcast(p.data)
        return super().create_optimizer(model)

    def get_train_dataloader(self):
        """Trainer's, with the batch split over `data_shards` instead of all processes."""
        loader = super().get_train_dataloader()
        for shard in (loader.batch_sampler, loader.dataset):  # accelerate's, of a map or of an iterable dataset
            if hasattr(shard, "num_processes"):
                shard.num_processes, shard.process_index = self.args.data_shards, self._shard
        return loader

    def train(self, resume_from_checkpoint=None, **kwargs):
        self._log = None
        if self.args.search_learning_rate and not resume_from_checkpoint:
            self.args.learning_rate = self.find_learning_rate()
            logger.info(f"learning rate {self.args.learning_rate:.3g}")
        return super().train(resume_from_checkpoint, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Take losses; with the last batch of a step, estimate the gradient. Returns the step's loss then, else 0."""
        losses = self._losses(self._prepare_inputs(inputs), self.state.global_step)
        self._pending = losses if self._pending is None else self._pending + losses
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        means = self._means(self._pending)
        self._pending = None
        finite = means.isfinite().all(1)
        if not finite.any():
            raise NonFiniteLossError(self._describe_non_finite_loss(means.flatten(), inputs))
        c = self._estimate(means)
        self._count(means[finite], c)
        self._write_log(c)
        self._give(self.state.global_step, c)
        return means[finite].mean().float().to(self.args.device)

    def _losses(self, inputs: dict[str, Any], step: int) -> Tensor:
        """This process's share of the losses of every direction and sign, summed, and what they are sums of: (2, N, S)
        in float64."""
        self.model.eval()
        args, signs = self.args, ESTIMATORS[self.args.estimator].signs
        shared = 0 in signs and not args.data_per_direction  # one loss of the weights themselves for all directions
        own = [sign for sign in signs if sign or not shared]
        result = torch.zeros(2, args.num_directions, len(signs), dtype=torch.float64, device=args.device)
        size = self._directions_per_forward(inputs, len(own)) if self._together(inputs) else 1
        for at in range(self._group * size, args.num_directions, self._groups * size):
            group = range(at, min(at + size, args.num_directions))
            found = self._evaluate(inputs, step, [(j, sign) for j in group for sign in own])
            result[:, group.start : group.stop, : len(own)] = found.view(2, len(group), len(own))
        if shared and self._group == 0:
            result[:, :, signs.index(0)] = self._evaluate(inputs, step, [(0, 0)])
        return result

    def _directions_per_forward(self, inputs: dict[str, Any], signs: int) -> int:
        args = self.args
        if args.directions_per_forward is not None:
            return args.directions_per_forward
        rows, time = inputs["input_ids"].shape
        rows = rows // args.num_directions if args.data_per_direction else rows
        tokens = rows * min(time, args.chunk_size) * signs
        return max(1, TOKENS["cpu" if args.device.type == "cpu" else "cuda"] // tokens)

    def _together(self, inputs: dict[str, Any]) -> bool:
        """Whether several members fit in one forward pass."""
        functional = self.args.directions == "low_rank" and self.args.evaluation == "functional"
        return functional and self._streamed(inputs)

    def _streamed(self, inputs: dict[str, Any]) -> bool:
        return self._streams and {"input_ids", "labels"} <= set(inputs) <= _STREAMED

    def _evaluate(self, inputs: dict[str, Any], step: int, members: list[Member]) -> Tensor:
        """Summed losses of members, and what they are sums of: (2, M)."""
        if len(members) > 1 and not self._together(inputs):
            return torch.cat([self._evaluate(inputs, step, [member]) for member in members], 1)
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
            return torch.stack([x.double() for x in stream_losses(self.model, batch, self.args.chunk_size)])
        inputs = {name: x[0] if isinstance(x, Tensor) else x for name, x in batch.items()}
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + step)  # the same for all members; the caller's numbers stay his
            loss = float(self.compute_loss(self.model, inputs))
        return torch.tensor([[loss], [1.0]], dtype=torch.float64, device=self.args.device)

    def _means(self, losses: Tensor) -> Tensor:
        """Means over all processes and tokens, (N, S), the same bits everywhere."""
        sums, counts = self.accelerator.gather(losses[None]).sum(0)
        return sums / counts

    def _estimate(self, means: Tensor) -> Tensor:
        return estimate(self.args.estimator, means, self.args.epsilon, self.args.curvature_exponent)

    def _give(self, step: int, c: Tensor) -> None:
        """The estimate to the optimizer: its coefficients, or written out as gradients."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, ZOSGD):
            optimizer.directions, optimizer.at, optimizer.coefficients = self.directions, step, c
            return
        for p, parts in self.directions.combine(step, c):
            p.grad = written_out(parts).to(p.dtype)

    def _count(self, finite: Tensor, c: Tensor) -> None:
        self._norm = float((c * len(finite)).double().square().sum().div(len(finite)).sqrt())
        self._seen += len(c)
        self._dropped += len(c) - len(finite)
        self._zeros += int((finite[:, 0] == finite[:, 1]).sum())

    def _get_grad_norm(self, model, grad_norm=None):
        return self._norm if grad_norm is None else grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with `zero_differences` and `dropped_directions`, shares since the last log, and the number of
        `forward_passes` so far."""
        if "loss" in logs and self._seen:
            zeros, dropped = self._zeros / self._seen, self._dropped / self._seen
            logs = logs | dict(
                zero_differences=zeros, dropped_directions=dropped, forward_passes=self.forward_passes * self._groups
            )
            self._seen = self._zeros = self._dropped = 0
            if zeros > 0.05:
                logger.warning(
                    f"{zeros:.0%} of the differences are exactly zero: epsilon={self.args.epsilon} is too small for the "
                    "precision of the loss, or the objective too coarse; raise epsilon, or compute in float32"
                )
        super().log(logs, start_time)

    def _write_log(self, c: Tensor) -> None:
        if not self.args.replay_log or not self.is_world_process_zero():
            return
        if self._log is None:
            header = {name: getattr(self.args, name) for name in _REPLAYED} | {"size": self.directions.size}
            path = Path(self.args.output_dir or ".") / replay_log.NAME
            self._log = ReplayLog(path, header, self.state.global_step)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._log.append(self.state.global_step, rates, c)

    @classmethod
    def replay(cls, base: str | Path | PreTrainedModel | nn.Module, log: str | Path) -> Any:
        """The weights at the end of a run, from those at its start and the log of it: the same steps, without data.

        Args:
            base: the model as it was before training (changed in place), or where `from_pretrained` finds it, in
                float32 as the trainer had it.
            log: the run's `zo_replay.jsonl`, the folder it is in, or a repository on the Hub.

        Returns:
            The model. Equal to the trained one bit for bit on the same kind of machine with as many threads.

        Raises:
            ValueError: a log of a run with an optimizer of its own, of other weights, or with steps missing.
        """
        path = log if Path(log).is_file() else cached_file(str(log), replay_log.NAME)
        header, steps = replay_log.read(path)
        model = base if isinstance(base, nn.Module) else AutoModelForCausalLM.from_pretrained(base)
        size = header.pop("size")
        with tempfile.TemporaryDirectory() as folder:
            on_cpu = next(model.parameters()).device.type == "cpu"
            args = ZOConfig(output_dir=folder, report_to="none", use_cpu=on_cpu, **header)
            trainer = ZOTrainer(model, args)
        if trainer.directions.size != size:
            raise ValueError(
                f"base: expected {size} trainable parameters, as in the log, got {trainer.directions.size}"
            )
        optimizer = trainer.create_optimizer()
        for step, rates, c in steps:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            trainer._give(step, c.to(args.device))
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return model

    @torch.no_grad()
    def find_learning_rate(self, low: float = 1e-5, high: float = 10.0, points: int = 7, rounds: int = 3) -> float:
        """The step along -g that lowers the loss of a training batch most; the weights stay as they are.

        A line search: the first of `rounds` tries `points` rates from `low` to `high`, the others look between the
        neighbours of the best. g is an estimate by `num_directions` directions that training does not use.

        Raises:
            ValueError: no rate lowers the loss.
        """
        inputs = self._prepare_inputs(next(iter(self.get_train_dataloader())))
        c = self._estimate(self._means(self._losses(inputs, _SEARCH)))
        parts = {id(p): parts for p, parts in self.directions.combine(_SEARCH, c)}

        def loss(rate: float) -> float:
            new = {}
            for name, (_, p) in self.directions.parameters.items():
                first, *second = parts[id(p)]
                if second:
                    new[name] = Perturbed.of_low_rank(p, -rate * first[None], second[0].transpose(-1, -2)[None])
                else:
                    new[name] = Perturbed.of_offset(p, lambda first=first: -rate * first[None])
            batch = {name: x[None] if isinstance(x, Tensor) else x for name, x in inputs.items()}
            run = functools.partial(self._run, batch, 0, self._streamed(inputs))
            with self.compute_loss_context_manager():
                return float(self._means(call_with(self.model, new, run)[..., None]))

        before, tried = loss(0.0), {}
        for _ in range(rounds):
            for rate in torch.logspace(*torch.tensor([low, high]).log10().tolist(), points).tolist():
                tried[rate] = loss(rate)
            rates = sorted(tried)
            best = min(rates, key=lambda rate: tried[rate] if tried[rate] == tried[rate] else float("inf"))
            at = rates.index(best)
            low, high = rates[max(at - 1, 0)], rates[min(at + 1, len(rates) - 1)]
        if not tried[best] < before:
            raise ValueError(
                f"learning_rate: none between {rates[0]:.0e} and {rates[-1]:.0e} lowers the loss of {before:.4g} along "
                f"an estimate with num_directions={self.args.num_directions}; raise that, or check epsilon"
            )
        return best
