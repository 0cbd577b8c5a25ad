"""What every trainer of the package does so that a run can be left alone overnight."""

from hf_rnn_trainers.reliability.non_finite import NonFiniteGuard, NonFiniteLossError, RecurrentTrainer

__all__ = ["NonFiniteGuard", "NonFiniteLossError", "RecurrentTrainer"]
