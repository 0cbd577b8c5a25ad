"""The trainer that all of the package's are."""

from hf_rnn_trainers.model_card import ModelCardMixin
from hf_rnn_trainers.reliability.checkpoints import AtomicCheckpoints
from hf_rnn_trainers.reliability.non_finite import NonFiniteGuard
from hf_rnn_trainers.reliability.signals import SaveOnSignal
from hf_rnn_trainers.sharding import check_fsdp


class RecurrentTrainer(NonFiniteGuard, SaveOnSignal, AtomicCheckpoints, ModelCardMixin):
    """transformers' Trainer for runs that nobody watches. `NonFiniteGuard` stops at a loss that is not finite,
    `AtomicCheckpoints` keeps every checkpoint whole and goes on from whole ones alone, `SaveOnSignal` saves when told
    to end, and the card beside the weights (`ModelCardMixin`) tells of the run. A run that nothing happens to is the
    stock Trainer's, bit for bit.

    Base of `ZOTrainer`, `SMTTrainer`, `DMTTrainer` and `RateConstrainedTrainer`; by itself the one for backpropagation.

    Args:
        args: `TrainingArguments`, or `RecurrentTrainingArguments`, which add `max_skipped_steps`.
        others: Trainer's; any model.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.check_sharding()

    def check_sharding(self) -> None:
        """Whether the method works with FSDP or DeepSpeed, where they are on.

        Raises:
            ValueError: it does not, with the reason.
        """
        check_fsdp(self)
