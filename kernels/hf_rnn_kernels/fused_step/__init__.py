"""One token as one compiled call: a model's parts write a `Program`, a compiled loop runs it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.fused_step.program import NotFusable, Op, Program, Vector, require

__all__ = ["NotFusable", "Op", "Program", "Vector", "require", "run"]

# Products of a weight and a number of a row, from so many of which on threads share each matrix: below, waiting for one
# another costs more than it saves (docs/log.md, 2026-11-30)
SHARED_PRODUCTS = 2**22


def run(program: Program, ids: Tensor, states: Sequence[Tensor], logits: Tensor, one_text: bool = False) -> None:
    """Run a program for one token of each row; or, `one_text`, for the tokens of one row, one after another, where all
    but what touches the state reads its weights once for all of them.

    Args:
        ids: (B,) int64, dense; of one text (T,).
        states: dense float32 (B, ...) tensors, in the order of `program.states`; they become those after the token. Of
            one text (T, ...), the first of which is the state before it: they become those after each token.
        logits: (B, V) or (T, V) float32, written to.
    """
    from hf_rnn_kernels.fused_step import cpu

    rows, workers = ids.shape[0], torch.get_num_threads()
    if (rows, one_text) not in program.bound:
        code, factors, counts = program.bind(rows, one_text)
        addresses = np.array([cpu.operation(Op(op)).address for op in code[:, 0]])
        program.bound[rows, one_text] = code, factors, addresses, counts
    code, factors, addresses, counts = program.bound[rows, one_text]
    scratch = np.empty(program.scratch_floats(rows), np.float32)
    bases = np.array([scratch.ctypes.data, 0, ids.data_ptr(), logits.data_ptr(), *(x.data_ptr() for x in states)])
    if workers > 1 and rows * program.weights >= SHARED_PRODUCTS:
        threads.run(cpu.some_threads, code, factors, bases, addresses, counts, workers)
    else:
        cpu.one_thread(code, factors, bases, addresses, counts)
