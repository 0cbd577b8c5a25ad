"""What every trainer of the package does so that a run can be left alone overnight."""

from hf_rnn_trainers.reliability.checkpoints import CheckpointError
from hf_rnn_trainers.reliability.manifest import accept_checkpoint
from hf_rnn_trainers.reliability.non_finite import NonFiniteLossError

__all__ = ["CheckpointError", "NonFiniteLossError", "accept_checkpoint"]
