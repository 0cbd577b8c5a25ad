"""Weights in few bits: quantisation, the generalised Gaussian model of them, and two entropy coders."""

from hf_rnn_kernels.coding.generalized_gaussian import GeneralizedGaussian
from hf_rnn_kernels.coding.payload import (
    CODERS,
    CorruptPayloadError,
    Header,
    encode_tensor,
    read_header,
    store_tensor,
)
from hf_rnn_kernels.coding.quantization import check_range, dequantize, entropy, quantize, symbol_bits
from hf_rnn_kernels.coding.rows import (
    check_symbols,
    decode_tensor,
    dequantize_rows,
    encode_rows,
    quantize_rows,
    row_exponents,
    suited,
    symbol_entropy,
    symbols,
)
from hf_rnn_kernels.coding.trellis import entropy_trellis, quantize_trellis

__all__ = [
    "CODERS",
    "CorruptPayloadError",
    "GeneralizedGaussian",
    "Header",
    "check_range",
    "check_symbols",
    "decode_tensor",
    "dequantize",
    "dequantize_rows",
    "encode_rows",
    "encode_tensor",
    "entropy",
    "entropy_trellis",
    "quantize",
    "quantize_rows",
    "quantize_trellis",
    "read_header",
    "row_exponents",
    "store_tensor",
    "suited",
    "symbol_bits",
    "symbol_entropy",
    "symbols",
]
