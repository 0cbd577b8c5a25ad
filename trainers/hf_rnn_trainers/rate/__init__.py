"""Rate-constrained training: weights that cost few bits (BackSlash, Wu et al., arXiv 2504.16968, and what it needs)."""

from hf_rnn_trainers.rate.rate_callback import RateCallback
from hf_rnn_trainers.rate.rate_config import RateConstrainedConfig, RateSettings
from hf_rnn_trainers.rate.rate_trainer import RateConstrainedTrainer

__all__ = ["RateCallback", "RateConstrainedConfig", "RateConstrainedTrainer", "RateSettings"]
