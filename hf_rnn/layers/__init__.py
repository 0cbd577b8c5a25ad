"""Parts that blocks are made of."""

from hf_rnn.layers.bidirectional import Bidirectional
from hf_rnn.layers.block_linear import BlockLinear
from hf_rnn.layers.causal_conv import CausalConv
from hf_rnn.layers.continuous_input import ContinuousInput
from hf_rnn.layers.feed_forward import FeedForward, GatedFeedForward
from hf_rnn.layers.mixer import Mixer, RecurrentMixer, scan_ahead
from hf_rnn.layers.multi_head import MultiHeadMixer
from hf_rnn.layers.norm import MultiHeadNorm, RMSNorm
from hf_rnn.layers.residual_mlp import ResidualMLP
from hf_rnn.layers.sliding_attention import SlidingAttention

__all__ = [
    "Bidirectional",
    "BlockLinear",
    "CausalConv",
    "ContinuousInput",
    "FeedForward",
    "GatedFeedForward",
    "Mixer",
    "MultiHeadMixer",
    "MultiHeadNorm",
    "RMSNorm",
    "RecurrentMixer",
    "ResidualMLP",
    "SlidingAttention",
    "scan_ahead",
]
