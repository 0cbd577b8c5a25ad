"""Triton's interpreter in the place of a GPU: every op runs its Triton kernels on a CPU's tensors, slowly.

For `make gpu DRY=1`; TRITON_INTERPRET=1 has to be set before any kernel is imported.
"""

import importlib
import os
from collections.abc import Callable

import torch


def use() -> None:
    """From here on the ops take the backends that they take on a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before hf_rnn_kernels is imported")
    for name, choice in (("gated_scan", "_compiled"), ("mlstm_scan", "_backend"), ("recurrent_scan", "_backend")):
        op = importlib.import_module(f"hf_rnn_kernels.{name}.op")
        setattr(op, choice, _chooser(op.reference, importlib.import_module(f"hf_rnn_kernels.{name}.triton")))

    from hf_rnn_kernels.mlstm_scan import op as mlstm
    from hf_rnn_kernels.mlstm_scan import triton_step
    from hf_rnn_kernels.perturbed import op as perturbed
    from hf_rnn_kernels.perturbed import triton

    choose_step = _chooser(mlstm.reference.decode, _step(triton_step.step))
    mlstm.decode = lambda q, *rest: choose_step(q)(q, *rest)
    choose_linear = _chooser(perturbed.reference.linear, triton.linear)
    perturbed._linear = lambda x, *rest: choose_linear(x)(x, *rest)


def _chooser(reference, triton) -> Callable:
    return lambda x: reference if x.dtype == torch.float64 or x.numel() == 0 else triton


def _step(kernel: Callable) -> Callable:
    """`triton_step.step` with the results of `op.decode`."""

    def step(*arguments):
        h, *states = kernel(*arguments)
        return h, tuple(states)

    return step
