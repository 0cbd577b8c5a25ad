"""Triton backend for NVIDIA and AMD GPUs: the low-rank part beside the matrix product, of whose x it is made.

A program owns a tile of y, (BM, BO), of all members' rows as of one matrix, and walks I. The tile of x that meets W
also meets each row's own `right`, loaded like x: a multiplication by it for BO by W, which the matrix units do
meanwhile. Their sums meet `left` at the end, in float32.

The numbers of members and of rows are run-time arguments on which nothing is specialised.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_rnn_kernels.gated_scan.triton import _rows

GROUP = 8  # tiles of rows that take the tiles of W in turn, while these are in cache
ROOM = 96 * 1024  # bytes of shared memory for tiles on their way: any GPU since the A100 has as much for a program


@triton.jit(do_not_specialize=["rows", "rows_per_member"])
def _linear(
    x, weight, left, right, y, x_stride, rows, rows_per_member, inner, outer,
    K: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y_r = W x_r + sum over k of (x_r . right_mk) left_mk; left (M, K, O), right (M, K, I)."""
    down, across = tl.cdiv(rows, BM), tl.cdiv(outer, BO)
    i, j = tl.swizzle2d(tl.program_id(0) // across, tl.program_id(0) % across, down, across, GROUP)
    # int64: rows times inner may pass 2^31.
    row = (i.to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    out = (j.to(tl.int64) * BO + tl.arange(0, BO))[None, :]
    real = row < rows
    factor = row // rows_per_member * K
    product = tl.zeros([BM, BO], tl.float32)
    u = (tl.zeros([BM, 1], tl.float32),) * K
    for begin in tl.range(0, inner, BI, num_stages=STAGES):
        in_ = begin + tl.arange(0, BI)
        inside = real & (in_ < inner)[None, :]
        x_tile = tl.load(x + row * x_stride + in_[None, :], inside, other=0.0)
        w_tile = tl.load(weight + out * inner + in_[:, None], (out < outer) & (in_ < inner)[:, None], other=0.0)
        product = tl.dot(x_tile, w_tile, product, input_precision="ieee")
        sums = ()
        # Sums and no products of matrices: K is small, and a matrix unit takes 16 columns.
        for k in tl.static_range(K):
            own = tl.load(right + (factor + k) * inner + in_[None, :], inside, other=0.0)
            sums = sums + (u[k] + tl.sum(x_tile.to(tl.float32) * own.to(tl.float32), 1, keep_dims=True),)
        u = sums
    there = real & (out < outer)
    for k in tl.static_range(K):
        product += u[k] * tl.load(left + (factor + k) * outer + out, there, other=0.0).to(tl.float32)
    tl.store(y + row * outer + out, product.to(y.dtype.element_ty), there)


def _plan(dtype: torch.dtype, rank: int) -> dict:
    """Tiles, stages and warps. Float32 has no matrix units on NVIDIA: what it multiplies takes registers. With 16 bits,
    128 rows spilled hundreds of bytes where I is odd."""
    block = {"BM": 64, "BO": 64, "BI": 16} if dtype == torch.float32 else {"BM": 64, "BO": 128, "BI": 32}
    # As many stages as there is room for, three at most.
    stage = (block["BO"] + (1 + rank) * block["BM"]) * block["BI"] * dtype.itemsize
    return block | {"STAGES": max(1, min(3, ROOM // stage)), "num_warps": 8}


def linear(x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """See `reference.linear`."""
    members, rows, inner = x.shape
    outer, rank = left.shape[1:]
    with torch.cuda.device_of(x):
        x, x_stride = _rows(x)
        left, right = (factor.to(x.dtype).transpose(1, 2).contiguous() for factor in (left, right))
        y = torch.empty(members, rows, outer, dtype=x.dtype, device=x.device)
        plan = _plan(x.dtype, rank)
        tiles = triton.cdiv(members * rows, plan["BM"]) * triton.cdiv(outer, plan["BO"])
        _linear[(tiles,)](
            x, weight.contiguous(), left, right, y, x_stride, members * rows, rows, inner, outer,
            K=rank, GROUP=GROUP, **plan,
        )  # fmt: skip
    return y
