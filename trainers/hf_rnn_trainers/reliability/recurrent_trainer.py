"""The trainer that all of the package's are."""

from hf_rnn_trainers.reliability.checkpoints import AtomicCheckpoints
from hf_rnn_trainers.reliability.non_finite import NonFiniteGuard
from hf_rnn_trainers.reliability.signals import SaveOnSignal


class RecurrentTrainer(NonFiniteGuard, SaveOnSignal, AtomicCheckpoints):
    """transformers' Trainer for runs that nobody watches. `NonFiniteGuard` stops at a loss that is not finite,
    `AtomicCheckpoints` keeps every checkpoint whole and goes on from whole ones alone, `SaveOnSignal` saves when told
    to end. A run that nothing happens to is the stock Trainer's, bit for bit.

    Base of `ZOTrainer`, `SMTTrainer`, `DMTTrainer` and `RateConstrainedTrainer`; by itself the one for backpropagation.

    Args:
        args: `TrainingArguments`, or `RecurrentTrainingArguments`, which add `max_skipped_steps`.
        others: Trainer's; any model.
    """
