"""Recurrent kernels for PyTorch. This package imports torch, and triton or numba only when first used."""

from hf_rnn_kernels.gated_scan import linear_scan, min_gru_scan, min_lstm_scan

__all__ = ["linear_scan", "min_gru_scan", "min_lstm_scan"]
