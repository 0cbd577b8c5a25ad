"""Parts that blocks are made of."""

from hf_rnn.layers.causal_conv import CausalConv
from hf_rnn.layers.feed_forward import FeedForward
from hf_rnn.layers.headwise import HeadwiseMixer
from hf_rnn.layers.mixer import RecurrentMixer
from hf_rnn.layers.norm import RMSNorm

__all__ = ["CausalConv", "FeedForward", "HeadwiseMixer", "RMSNorm", "RecurrentMixer"]
