"""Training without backpropagation: Trainer, with the step's gradient estimated from losses at perturbed weights."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import cached_file, logging

from hf_rnn_kernels import Perturbed
from hf_rnn_trainers.base import RecurrentTrainer
from hf_rnn_trainers.base.sharding import refuse_sharding
from hf_rnn_trainers.zo import replay_log
from hf_rnn_trainers.zo.directions import Directions
from hf_rnn_trainers.zo.estimators import estimate
from hf_rnn_trainers.zo.evaluation import call_with
from hf_rnn_trainers.zo.learning_rate import best_rate
from hf_rnn_trainers.zo.optimizer import ZOSGD, written_out
from hf_rnn_trainers.zo.perturbed_losses import PerturbedLosses
from hf_rnn_trainers.zo.replay_log import ReplayLog
from hf_rnn_trainers.zo.zo_config import ZOConfig

logger = logging.get_logger(__name__)

SEARCH = 2**32 - 1  # the step whose directions the search for a learning rate uses
# The settings that a log's steps depend on, and the methods that make the optimizer of them
_REPLAYED = ["directions", "rank", "density", "seed", "optim", "optim_args", "weight_decay", "max_grad_norm"]
_REPLAYED += ["adam_beta1", "adam_beta2", "adam_epsilon"]
_MAKE_OPTIMIZER = ("create_optimizer", "get_optimizer_cls_and_kwargs", "get_decay_parameter_names")


class ZOTrainer(PerturbedLosses, RecurrentTrainer):
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
    model: Any
    optimizer: Any
    card_papers = ("chaubard2025zero",)
    config_class = ZOConfig
    no_pieces = "zero-order training has no backward pass whose memory grows; it goes over time in chunks by itself"

    def __init__(self, model=None, args: ZOConfig | None = None, **kwargs):
        super().__init__(model, args, **kwargs)
        self._given_optimizer = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        self._log: ReplayLog | None = None
        self.add_callback(_StepLog(self))
        self._begin()

    def _begin(self) -> None:
        """What belongs to a model and a run, bound to the model as it is now; `model_init` gives each run its own."""
        self._refuse()
        for p in self.model.parameters():
            if p.data_ptr() % 64:  # as read from a file: matrix products would round in another way
                p.data = p.data.clone()
        args = self.args
        self.directions = Directions(self.model, args.directions, args.seed, args.rank, args.density)
        self._share_out()
        self._pending: Tensor | None = None  # summed losses and their counts (2, N, signs) of this step so far
        self._coefficients = torch.zeros(0)  # of this step
        self._norm = 0.0
        self._seen = self._zeros = self._dropped = 0  # directions since the last log

    def card_method(self) -> str:
        args = self.args
        told = self._log is not None and not self._log.ended
        log = f"; {replay_log.NAME} rebuilds the weights from those before training" if told else ""
        return (
            f"zero-order estimates ({args.estimator}, {args.num_directions} {args.directions} directions, epsilon "
            f"{args.epsilon:g}{log})"
        )

    def check_sharding(self) -> None:
        refuse_sharding(self, "they shard what a perturbation needs whole")

    def _refuse(self) -> None:
        args, trained = self.args, [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError("model: expected parameters that require gradients, all are frozen")
        if args.search_learning_rate and self._given_optimizer:
            raise ValueError("search_learning_rate: the optimizer that was given has learning rates of its own")
        if args.n_gpu > 1:
            raise ValueError("DataParallel: its copies of the model know no perturbation; start a process for each GPU")
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
        search = self.args.search_learning_rate and self.is_in_train and not self.state.global_step
        if search:
            self.args.learning_rate = self.find_learning_rate()
            logger.info(f"learning rate {self.args.learning_rate:.3g}")
        optimizer = super().create_optimizer(model)
        if search:
            for group in optimizer.param_groups:  # which an earlier run may have made
                group["lr"] = group["initial_lr"] = self.args.learning_rate
        return optimizer

    def get_train_dataloader(self):
        """Trainer's, with the batch split over `data_shards` instead of all processes."""
        loader = super().get_train_dataloader()
        shards: tuple[Any, Any] = (loader.batch_sampler, loader.dataset)  # the one of maps, the other of iterables
        for shard in shards:
            if hasattr(shard, "num_processes"):
                shard.num_processes, shard.process_index = self.args.data_shards, self._shard
        return loader

    def _inner_training_loop(self, *args, resume_from_checkpoint=None, trial=None, **kwargs):
        self._begin()
        self._tell_if_slow()
        self._log = None
        if self.args.replay_log and self.is_world_process_zero():
            self._open_log(Path(self._get_output_dir(trial)), resume_from_checkpoint)
        return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, trial=trial, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Take losses; with the last batch of a step, estimate the gradient. Returns the step's loss then, else 0."""
        losses = self._losses(self._prepare_inputs(inputs), self.state.global_step)
        self._pending = losses if self._pending is None else self._pending + losses
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        sums, counts = self._total(self._pending)
        self._pending = None
        means = sums / counts
        finite = means.isfinite().all(1)
        if not finite.any():
            if counts.any():
                self.skip_or_stop(self._describe_non_finite_loss(means.flatten(), inputs))
            else:
                self.leave_out_without_targets()
            return torch.zeros((), device=self.args.device)
        self._coefficients = self._estimate(means)
        self._count(means[finite], self._coefficients)
        self._give(self.state.global_step, self._coefficients)
        return means[finite].mean().float().to(self.args.device)

    def leave_out(self) -> None:
        """Trainer's; in the log the step's coefficients are NaN."""
        super().leave_out()
        self._coefficients = torch.full((self.args.num_directions,), torch.nan)
        if isinstance(optimizer := getattr(self.optimizer, "optimizer", self.optimizer), ZOSGD):
            optimizer.coefficients = None

    def _total(self, losses: Tensor) -> Tensor:
        """Sums over all processes, and the number of tokens they are of, (2, N, S), the same bits everywhere."""
        return self.accelerator.gather(losses[None]).sum(0)

    def _means(self, losses: Tensor) -> Tensor:
        sums, counts = self._total(losses)
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
                    f"{zeros:.0%} of the differences are exactly zero: epsilon={self.args.epsilon} is too small for "
                    "the precision of the loss, or the objective too coarse; raise epsilon, or compute in float32"
                )
        super().log(logs, start_time)

    def _open_log(self, run: Path, checkpoint: str | None) -> None:
        """The log of the steps to come, after those of the checkpoint; where it cannot tell of all, it says so."""
        header = {name: getattr(self.args, name) for name in _REPLAYED} | {"size": self.directions.size}
        self._log = ReplayLog(run / replay_log.NAME, header, Path(checkpoint) if checkpoint else None)
        if self._given_optimizer or any(getattr(type(self), x) is not getattr(ZOTrainer, x) for x in _MAKE_OPTIMIZER):
            self._log.end("it has an optimizer of its own, which the log does not know")
        elif steps := self._since_start[0]:
            self._log.end(f"auto_find_batch_size began anew after {steps} steps, from the weights that they had made")
        elif checkpoint is None and self.optimizer is not None and self.optimizer.state:
            self._log.end("its optimizer went on with what it had kept from an earlier call of train()")
        self._warn_of_log()

    def _warn_of_log(self) -> None:
        if self._log and self._log.ended:
            logger.warning(f"{self._log.path}: cannot be replayed to the weights of this run: {self._log.ended}")

    def _save(self, output_dir=None, state_dict=None):
        """Trainer's, with the log that leads to these weights beside them."""
        super()._save(output_dir, state_dict)
        if self._log:
            self._log.copy_to(Path(str(output_dir or self.args.output_dir)))

    def _load_best_model(self):
        super()._load_best_model()
        if self._log:
            self._log.take(Path(str(self.state.best_model_checkpoint)))
            self._warn_of_log()

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
            ValueError: a log with steps missing or that does not tell of all (it says why), or of other weights.
        """
        path = log if Path(log).is_file() else cached_file(str(log), replay_log.NAME)
        header, steps = replay_log.read(str(path))
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
        for step, rates, groups, c in steps:
            for group, rate, options in zip(optimizer.param_groups, rates, groups, strict=True):
                group.update(options, lr=rate)
            if c.isnan().all():
                continue  # skipped
            trainer._give(step, c.to(args.device))
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return model

    def find_learning_rate(self, low: float = 1e-5, high: float = 10.0, points: int = 7, rounds: int = 3) -> float:
        """The step along -g that lowers the loss of a training batch most; the weights stay as they are.

        A line search: the first of `rounds` tries `points` rates from `low` to `high`, the others look between the
        neighbours of the best. g is an estimate by `num_directions` directions that training does not use.

        Raises:
            ValueError: no rate lowers the loss.
        """
        inputs = self._prepare_inputs(next(iter(self.get_train_dataloader())))
        c = self._estimate(self._means(self._losses(inputs, SEARCH)))
        return best_rate(functools.partial(self._loss_after, inputs, c), low, high, points, rounds)

    def _loss_after(self, inputs: dict[str, Any], c: Tensor, rate: float) -> float:
        """The loss after a step of SGD, which is not made."""
        names = {id(p): name for name, (_, p) in self.directions.parameters.items()}
        new: dict[str, Tensor] = {}
        for p, (first, *second) in self.directions.combine(SEARCH, c):
            step = -rate * first[None]
            if second:
                new[names[id(p)]] = Perturbed.of_low_rank(p, step, second[0].transpose(-1, -2)[None])
            else:
                new[names[id(p)]] = Perturbed.of_offset(p, lambda step=step: step)
        batch = {name: x[None] if isinstance(x, Tensor) else x for name, x in inputs.items()}
        with self.compute_loss_context_manager():
            losses = call_with(self.model, new, functools.partial(self._run, batch, 0, self._streamed(inputs)))
        return float(self._means(losses[..., None]))


class _StepLog(TrainerCallback):
    """Writes each step to the log when it is made, before its learning rates become those of the next."""

    def __init__(self, trainer: ZOTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.trainer._log:
            self.trainer._log.append(state.global_step, optimizer.param_groups, self.trainer._coefficients)
