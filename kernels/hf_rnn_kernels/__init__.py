"""Recurrent kernels for PyTorch. This package imports torch, and triton or numba only when first used."""

from hf_rnn_kernels.causal_conv import causal_conv
from hf_rnn_kernels.gated_norm import gated_norm
from hf_rnn_kernels.gated_scan import linear_scan, min_gru_scan, min_lstm_scan
from hf_rnn_kernels.layout import SequenceLayout
from hf_rnn_kernels.mlp_scan import mlp_scan
from hf_rnn_kernels.mlstm_scan import mlstm_scan, mlstm_step
from hf_rnn_kernels.perturbed import Perturbed, perturbed_embedding, perturbed_linear
from hf_rnn_kernels.recurrent_scan import gru_scan, lstm_scan, slstm_scan
from hf_rnn_kernels.rms_norm import rms_norm
from hf_rnn_kernels.silu_gate import silu_gate
from hf_rnn_kernels.swiglu import swiglu

__all__ = [
    "Perturbed",
    "SequenceLayout",
    "causal_conv",
    "gated_norm",
    "gru_scan",
    "linear_scan",
    "lstm_scan",
    "min_gru_scan",
    "min_lstm_scan",
    "mlp_scan",
    "mlstm_scan",
    "mlstm_step",
    "perturbed_embedding",
    "perturbed_linear",
    "rms_norm",
    "silu_gate",
    "slstm_scan",
    "swiglu",
]
