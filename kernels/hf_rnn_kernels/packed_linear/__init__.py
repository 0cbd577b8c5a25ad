"""Linear layers whose weights are integers of 8 or 4 bits: y = (scale * q) x + b, multiplied as they lie."""

from hf_rnn_kernels.packed_linear.layer import PackedLinear, PackedMatrix, plain
from hf_rnn_kernels.packed_linear.op import packed_linear
from hf_rnn_kernels.packed_linear.packing import check_bits, choose_group, is_exact, pack, unpack

__all__ = [
    "PackedLinear",
    "PackedMatrix",
    "check_bits",
    "choose_group",
    "is_exact",
    "pack",
    "packed_linear",
    "plain",
    "unpack",
]
