from dataclasses import dataclass, field

from hf_rnn_trainers.base import RecurrentTrainingArguments
from hf_rnn_trainers.zo.directions import KINDS
from hf_rnn_trainers.zo.estimators import ESTIMATORS

EVALUATIONS = ("functional", "snapshot", "in_place")
# lr = epsilon by number of parameters, up to which it holds, for n = 96 and n = 512 (the official code's LSTM runs)
_PAPER = [
    (3e5, 0.1, 0.5),
    (3e6, 0.1, 0.1),
    (3e7, 0.01, 0.1),
    (3e8, 0.01, 0.1),
    (2e9, 0.005, 0.01),
    (float("inf"), 1e-4, 1e-3),
]


@dataclass
class ZOConfig(RecurrentTrainingArguments):
    """TrainingArguments of `ZOTrainer`.

    What differs from their defaults: plain SGD at a constant learning rate, and no gradient clipping, since the norm of
    an estimate is sqrt(d / n) times the gradient's: it would only hide a wrong rate.
    """

    estimator: str = field(
        default="cd",
        metadata={
            "help": "cd: central difference (CD-RGE); fd: forward difference; spsa15: 1.5-SPSA, central, damped by the "
            "curvature; es_sign, es_rank: evolution strategies, by the sign of a difference or the ranks of all losses"
        },
    )
    directions: str = field(
        default="low_rank",
        metadata={
            "help": "low_rank: A B^T with signs for matrices, which package models evaluate many at a time; "
            "rademacher, gaussian, sparse: dense, one after another"
        },
    )
    rank: int = field(default=1, metadata={"help": "rank of low_rank directions; 1 has the variance of dense signs"})
    density: float = field(default=0.1, metadata={"help": "share of elements that sparse directions change"})
    num_directions: int = field(default=96, metadata={"help": "directions a step, over all processes"})
    epsilon: float = field(
        default=1e-2, metadata={"help": "how far weights are perturbed: 1e-2 from scratch, 1e-3 to fine-tune"}
    )
    curvature_exponent: float = field(default=0.1, metadata={"help": "of spsa15's damping"})
    data_per_direction: bool = field(
        default=False, metadata={"help": "each direction sees its own share of the batch, both its signs the same"}
    )
    directions_per_forward: int | None = field(
        default=None, metadata={"help": "directions evaluated at once; default: by the size of the batch"}
    )
    evaluation: str = field(
        default="functional",
        metadata={
            "help": "functional: weights are replaced, never changed; snapshot: changed, then copied back (one more "
            "copy of the weights); in_place: changed and changed back, up to rounding, float32 only"
        },
    )
    chunk_size: int | None = field(
        default=None,
        metadata={"help": "tokens of a row at a time, the state carried along; default: at most 512, by its rows"},
    )
    data_shards: int = field(
        default=1,
        metadata={"help": "parts that the batch is split into over processes; processes of one part share directions"},
    )
    search_learning_rate: bool = field(default=False, metadata={"help": "look for a learning rate before training"})
    replay_log: bool = field(
        default=True, metadata={"help": "write zo_replay.jsonl, from which `ZOTrainer.replay` rebuilds the weights"}
    )
    optim: str = field(default="sgd", metadata={"help": "sgd needs no gradients in memory; any other of Trainer's"})
    learning_rate: float = field(default=1e-2, metadata={"help": "independent of epsilon"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "see TrainingArguments"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: no clipping"})

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("estimator", ESTIMATORS), ("directions", KINDS), ("evaluation", EVALUATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {list(choices)}, got {getattr(self, name)!r}")
        for name in ("rank", "num_directions", "chunk_size", "data_shards", "directions_per_forward"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon: expected a number above 0, got {self.epsilon}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density: expected a share in (0, 1], got {self.density}")
        # Each process reads for itself what the others read
        self.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
        self.dataloader_drop_last = self.dataloader_drop_last or self.data_per_direction
        if self.data_per_direction and self.train_batch_size % self.num_directions:
            raise ValueError(
                f"data_per_direction: expected a batch of a multiple of {self.num_directions} rows, one for each "
                f"direction, got per_device_train_batch_size={self.per_device_train_batch_size}"
            )
        if self.data_per_direction and self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size: data_per_direction needs its batch as it is; leave one of them out")
        if self.fp16:
            raise ValueError("fp16: its loss scaling belongs to backpropagation; use bf16=True with float32 weights")
        if self.torch_compile:
            raise ValueError("torch_compile: perturbed weights are not compiled; leave it out")
        if self.deepspeed is not None or self.fsdp:
            raise ValueError("deepspeed, fsdp: they shard what a perturbation needs whole; use plain processes")

    @classmethod
    def paper_preset(cls, num_parameters: int, num_directions: int = 96, **settings) -> "ZOConfig":
        """The published settings of CD-RGE (arXiv 2505.17852, official code): dense signs, learning rate = epsilon by
        size, plain SGD, no momentum, no decay.

        Args:
            num_parameters: of the model.
            num_directions: 96 or 512.
            settings: the rest of a ZOConfig.
        """
        if num_directions not in (96, 512):
            raise ValueError(f"num_directions: published are 96 and 512, got {num_directions}")
        rate = next(row[1 if num_directions == 96 else 2] for row in _PAPER if num_parameters <= row[0])
        preset = dict(estimator="cd", directions="rademacher", num_directions=num_directions)
        return cls(**preset | dict(learning_rate=rate, epsilon=rate) | settings)  # type: ignore[arg-type]

    def _check_pieces(self) -> None:
        """Its chunks are of forward passes; `ZOTrainer` refuses to go back through any."""
        for name, default in dict(chunk_states=None, gradient_chunks=1).items():
            if getattr(self, name) != default:
                raise ValueError(f"{name}: of backpropagation over pieces, which zero-order training does without")
