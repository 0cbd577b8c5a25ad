"""Weights in few bits: quantisation, the generalised Gaussian model of them, and two entropy coders."""

from hf_rnn_kernels.coding.generalized_gaussian import GeneralizedGaussian
from hf_rnn_kernels.coding.payload import (
    CODERS,
    CorruptPayloadError,
    Header,
    decode_tensor,
    encode_tensor,
    read_header,
    store_tensor,
)
from hf_rnn_kernels.coding.quantization import check_range, dequantize, entropy, quantize, symbol_bits
from hf_rnn_kernels.coding.trellis import entropy_trellis, quantize_trellis

__all__ = [
    "CODERS",
    "CorruptPayloadError",
    "GeneralizedGaussian",
    "Header",
    "check_range",
    "decode_tensor",
    "dequantize",
    "encode_tensor",
    "entropy",
    "entropy_trellis",
    "quantize",
    "quantize_trellis",
    "read_header",
    "store_tensor",
    "symbol_bits",
]
