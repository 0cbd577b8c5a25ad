"""Zero-order training: gradients estimated from losses at perturbed weights."""

from hf_rnn_trainers.zo.directions import Directions
from hf_rnn_trainers.zo.optimizer import ZOSGD
from hf_rnn_trainers.zo.zo_config import ZOConfig
from hf_rnn_trainers.zo.zo_trainer import ZOTrainer

__all__ = ["ZOSGD", "Directions", "ZOConfig", "ZOTrainer"]
