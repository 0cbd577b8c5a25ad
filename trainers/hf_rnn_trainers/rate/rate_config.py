import math
import re
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_rnn_trainers.base import RecurrentTrainingArguments

SCOPES = ("tensor", "global")


@dataclass
class RateSettings:
    """How weights are pulled towards what costs few bits.

    After each optimizer step: w <- c sign(w) max(|w| - s, 0), s = lr * rate_shrink * nu * (|w| / r + eps)^(nu - 1),
    where nu is the shape of a generalised Gaussian with the weights' moments, r their root mean square and eps
    `rate_epsilon`: the slope of the rate |w|^nu, proximal, so that zeros are exact, and decoupled from the gradient. c
    keeps the tensor's norm, so that it is the shape of the density that saves bits and not its scale. With `rate_base`
    w is the difference to that checkpoint's weights, c = 1, and nu at most 1.
    """

    rate_shrink: float = field(
        default=0.05, metadata={"help": "how far weights shrink a step, in learning rates: the multiplier of the rate"}
    )
    rate_epsilon: float = field(
        default=0.1, metadata={"help": "keeps the slope at zero finite, in root mean squares; smaller: more zeros"}
    )
    rate_scope: str = field(
        default="tensor", metadata={"help": "tensor: a shape for each; global: one for all, as published"}
    )
    rate_every: int = field(default=20, metadata={"help": "optimizer steps between two estimates of the shape"})
    rate_exclude: str = field(
        default=r"norm|bias",
        metadata={"help": "regular expression of parameters to leave alone; those of one dimension always are"},
    )
    rate_base: str | None = field(
        default=None,
        metadata={
            "help": "the checkpoint that is fine-tuned, a folder or a name on the Hub: not the weights cost few bits "
            "but their difference to it, for save_compressed(base=...)"
        },
    )
    rate_warmup: float = field(default=0.1, metadata={"help": "share of the steps over which the rate term grows"})
    rate_finetune: float = field(
        default=0.2, metadata={"help": "share of the steps, the last, without the rate term: zeros stay zeros"}
    )
    rate_step: float | None = field(
        default=None,
        metadata={
            "help": "quantisation step, a power of two, of reported bits, target_bits and quantization_aware; default: "
            "an eighth of the weights' root mean square at the start, with rate_base the learning rate, rounded"
        },
    )
    quantization_aware: bool = field(
        default=False,
        metadata={
            "help": "in the last share, losses and gradients are those of the quantised weights, and so is the model "
            "that training ends with"
        },
    )
    target_bits: float | None = field(
        default=None, metadata={"help": "bits a weight: the multiplier is steered to reach it"}
    )
    max_loss_increase: float | None = field(
        default=None,
        metadata={
            "help": "as a share, 0.01 for 1%%: the multiplier is steered at evaluations to what eval_loss allows"
        },
    )
    reference_loss: float | None = field(
        default=None, metadata={"help": "what max_loss_increase is over; default: of the first evaluation"}
    )
    paper_preset: bool = field(
        default=False,
        metadata={
            "help": "the published step for comparison: lambda = 2,000 of the mean over all N weights, every step, not "
            "scaled by the learning rate, nor proximal; on small models ruinous"
        },
    )

    def __post_init__(self):
        if self.rate_scope not in SCOPES:
            raise ValueError(f"rate_scope: expected one of {SCOPES}, got {self.rate_scope!r}")
        if not 0 <= self.rate_shrink < float("inf"):
            raise ValueError(f"rate_shrink: expected a finite number of at least 0, got {self.rate_shrink}")
        if not 0 < self.rate_epsilon < float("inf"):
            raise ValueError(f"rate_epsilon: expected a finite number above 0, got {self.rate_epsilon}")
        if self.rate_every < 1:
            raise ValueError(f"rate_every: expected at least 1, got {self.rate_every}")
        if not (min(self.rate_warmup, self.rate_finetune) >= 0 and self.rate_warmup + self.rate_finetune <= 1):
            raise ValueError(
                "rate_warmup, rate_finetune: expected shares in [0, 1] that sum to at most 1, got "
                f"{self.rate_warmup} and {self.rate_finetune}"
            )
        if self.rate_step is not None and (self.rate_step <= 0 or math.frexp(self.rate_step)[0] != 0.5):
            raise ValueError(f"rate_step: expected a power of two, such as 0.03125, got {self.rate_step}")
        if self.target_bits is not None and self.max_loss_increase is not None:
            raise ValueError("target_bits, max_loss_increase: one of them steers the multiplier; give one")
        for name in ("target_bits", "max_loss_increase", "reference_loss"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if (self.target_bits is not None or self.max_loss_increase is not None) and self.rate_shrink == 0:
            raise ValueError("rate_shrink: a multiplier of 0 cannot be steered; leave the default")
        if self.paper_preset and self.rate_base is not None:
            raise ValueError("paper_preset: is a rate of the weights; leave rate_base")
        if self.paper_preset and (self.target_bits is not None or self.max_loss_increase is not None):
            raise ValueError("paper_preset: its multiplier is fixed; leave target_bits and max_loss_increase")
        if self.quantization_aware and self.rate_finetune == 0:
            raise ValueError("quantization_aware: happens in the last share of steps; expected rate_finetune above 0")
        try:
            re.compile(self.rate_exclude)
        except re.error as error:
            raise ValueError(f"rate_exclude: {self.rate_exclude!r} is no regular expression ({error})") from error


def check_arguments(settings: RateSettings, args: TrainingArguments) -> None:
    """What settings and arguments have to agree on; for a callback they are two.

    Raises:
        ValueError: which argument, and what was expected.
    """
    if args.deepspeed is not None:
        raise ValueError("deepspeed: keeps weights of its own, which the rate step would not reach; use fsdp")
    if settings.max_loss_increase is not None:
        if args.eval_strategy == "no":
            raise ValueError("max_loss_increase: is judged at evaluations; expected an eval_strategy")
        if settings.reference_loss is None and not args.eval_on_start:
            raise ValueError("reference_loss: expected the loss to compare with, or eval_on_start for the model's")


@dataclass
class RateConstrainedConfig(RateSettings, RecurrentTrainingArguments):
    """TrainingArguments of `RateConstrainedTrainer`, with the settings of its rate term."""

    def __post_init__(self):
        RecurrentTrainingArguments.__post_init__(self)
        RateSettings.__post_init__(self)
        check_arguments(self, self)
