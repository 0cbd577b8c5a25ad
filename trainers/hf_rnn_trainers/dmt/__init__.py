"""DAgger Memory Training: the network's own rollouts pulled back to the teacher's memories."""

from hf_rnn_trainers.dmt.dmt_config import DMTConfig
from hf_rnn_trainers.dmt.dmt_trainer import DMTTrainer

__all__ = ["DMTConfig", "DMTTrainer"]
