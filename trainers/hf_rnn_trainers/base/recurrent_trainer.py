"""The trainer that all of the package's are."""

import inspect
from typing import Any

from transformers import TrainingArguments

from hf_rnn_trainers.base.arguments import RecurrentTrainingArguments
from hf_rnn_trainers.base.sharding import check_fsdp
from hf_rnn_trainers.base.streaming import StreamingTrainer
from hf_rnn_trainers.model_card import ModelCardMixin
from hf_rnn_trainers.reliability.checkpoints import AtomicCheckpoints
from hf_rnn_trainers.reliability.epochs import RepeatableEpochs
from hf_rnn_trainers.reliability.non_finite import NonFiniteGuard
from hf_rnn_trainers.reliability.signals import SaveOnSignal


class RecurrentTrainer(
    NonFiniteGuard, SaveOnSignal, AtomicCheckpoints, StreamingTrainer, RepeatableEpochs, ModelCardMixin
):
    """transformers' Trainer for runs that nobody watches. `NonFiniteGuard` stops at a loss that is not finite,
    `AtomicCheckpoints` keeps every checkpoint whole and goes on from whole ones alone, with the data in the order of
    the run that was interrupted (`RepeatableEpochs`), `SaveOnSignal` saves when told to end, and the card beside the
    weights (`ModelCardMixin`) tells of the run. A run that nothing happens to is the stock Trainer's, bit for bit.
    Long sequences are trained on piece by piece (`BackpropOverPieces`), and as streams whose state goes on from batch
    to batch (`StreamingTrainer`), where the arguments say so. A model that forecasts is evaluated by its
    `future_values`, which transformers' models of time series have for labels and Trainer does not know.

    Base of `ZOTrainer`, `SMTTrainer`, `DMTTrainer` and `RateConstrainedTrainer`; by itself the one for backpropagation.

    Args:
        args: `TrainingArguments`, or `RecurrentTrainingArguments`, which add `max_skipped_steps`; None: the defaults of
            the latter.
        others: Trainer's; any model.

    Attributes:
        config_class: of the arguments that a method needs, whose defaults stand in for None.
        no_pieces: why a method has no use for pieces and streams; None: it has.

    Raises:
        TypeError: arguments of another class.
        ValueError: arguments that the method or the model cannot do with, with the reason.
    """

    config_class: type[TrainingArguments] = RecurrentTrainingArguments
    no_pieces: str | None = None

    def __init__(self, model: Any = None, args: Any = None, *others, **options):
        args = self.config_class() if args is None else args
        # Backpropagation does with transformers' own
        needed = TrainingArguments if self.config_class is RecurrentTrainingArguments else self.config_class
        if not isinstance(args, needed):
            raise TypeError(f"args: expected a {needed.__name__}, got {type(args).__name__}")
        super().__init__(model, args, *others, **options)
        whole: Any = self.accelerator.unwrap_model(self.model)
        base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole  # without adapters
        if args.label_names is None and "future_values" in inspect.signature(base.forward).parameters:
            self.label_names = ["future_values"]
        self.check_sharding()
        if self.in_pieces or self.streams:
            if self.no_pieces is not None:
                raise ValueError(f"{'backprop' if self.in_pieces else 'stream'}: {self.no_pieces}")
            self.check_pieces()

    def card_method(self) -> str:
        args = self.args
        how = "backpropagation through time"
        if self.in_pieces and args.backprop == "truncated":
            how += f", truncated to {args.gradient_chunks * args.chunk_size} tokens"
        return how + (", the state carried from batch to batch" if self.streams else "")

    def check_sharding(self) -> None:
        """Whether the method works with FSDP or DeepSpeed, where they are on.

        Raises:
            ValueError: it does not, with the reason.
        """
        check_fsdp(self)
