"""Parts that blocks are made of."""

from hf_rnn.layers.block_linear import BlockLinear
from hf_rnn.layers.causal_conv import CausalConv
from hf_rnn.layers.feed_forward import FeedForward, GatedFeedForward
from hf_rnn.layers.headwise import HeadwiseMixer
from hf_rnn.layers.mixer import Mixer, RecurrentMixer
from hf_rnn.layers.norm import MultiHeadNorm, RMSNorm

__all__ = [
    "BlockLinear",
    "CausalConv",
    "FeedForward",
    "GatedFeedForward",
    "HeadwiseMixer",
    "Mixer",
    "MultiHeadNorm",
    "RMSNorm",
    "RecurrentMixer",
]
