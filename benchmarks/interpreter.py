"""Triton's interpreter in the place of a GPU: every op runs its Triton kernels on a CPU's tensors, slowly.

For `make gpu DRY=1`; TRITON_INTERPRET=1 has to be set before any kernel is imported.
"""

import os

import torch


def use() -> None:
    """From here on the ops take the backends that they take on a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before hf_rnn_kernels is imported")
    from hf_rnn_kernels import operators, threads
    from hf_rnn_kernels.perturbed import op, reference, triton

    operators.backend_name = _name
    threads.worthwhile = lambda x: False  # norms and the like: torch's own
    op._linear = lambda x, *rest: (triton if _name(x) == "triton" else reference).linear(x, *rest)


def _name(x: torch.Tensor) -> str:
    return "reference" if x.dtype == torch.float64 or x.numel() == 0 else "triton"
