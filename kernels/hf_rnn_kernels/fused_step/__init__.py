"""One token as one compiled call: a model's parts write a `Program`, a compiled loop runs it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.fused_step.program import NotFusable, Op, Pointwise, Program, Vector, require

__all__ = ["NotFusable", "Op", "Pointwise", "Program", "Vector", "require", "run"]

# Bytes of weights from which on more than one thread is faster, and numbers of products where rows are shared out:
# docs/log.md, 2026-11-30
SHARED_BYTES, SHARED_PRODUCTS = 2**22, 2**24


def run(program: Program, ids: Tensor, states: Sequence[Tensor], logits: Tensor) -> None:
    """Run a program for one token of each row.

    Args:
        ids: (B,) int64, dense.
        states: dense float32 (B, ...) tensors, in the order of `program.states`; they become those after the token.
        logits: (B, V) float32, written to.
    """
    from hf_rnn_kernels.fused_step import cpu

    rows, workers = ids.shape[0], torch.get_num_threads()
    weights = program.bytes // 4
    shares = min(rows, workers) if rows >= 2 * workers and rows * weights >= SHARED_PRODUCTS else 1
    code, factors = program.bound(-(-rows // shares))
    size = program.scratch_floats(-(-rows // shares))
    scratch = np.empty(shares * size, np.float32)
    addresses = [scratch.ctypes.data, 0, ids.data_ptr(), logits.data_ptr(), *(x.data_ptr() for x in states)]
    bases = np.array(addresses)
    if shares > 1:
        threads.run(cpu.rows_apart, code, factors, bases, rows, shares, 4 * size)
    elif workers > 1 and program.bytes >= SHARED_BYTES:
        threads.run(cpu.weights_apart, code, factors, bases, rows, workers)
    else:
        cpu.one_thread(code, factors, bases, rows)
