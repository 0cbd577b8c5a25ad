"""The mLSTM cell alone, beside mlstm_kernels and, on a GPU, flash-linear-attention's nearest and attention.

    python benchmarks/mlstm.py

On a CPU in float32. On a GPU in bfloat16, 65,536 tokens of 16 heads of 128/256, the cell of xLSTM-7B's kernels' paper.
Gradients are those of a raw loss, checked in float64 on the first shape: mlstm_kernels' own backward leaves out the
normaliser's and is refused for it; its `native_autograd` has it, and keeps every intermediate. fla's simple_gla has
neither input gates nor a normaliser, and attention no state.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from driver import compare, save, table
from torch import Tensor

from hf_rnn_kernels import mlstm_scan

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
# batch, time, heads, keys, values; the first is small enough for float64
SHAPES = [(2, 512, 4, 32, 64), (8, 8192, 16, 128, 256)] if GPU else [(4, 512, 4, 32, 64), (1, 4096, 8, 64, 128)]
KERNELS = ["triton_xl_chunk", "native_autograd"] if GPU else ["native_autograd", "native_custbw"]


def make(batch: int, time: int, heads: int, keys: int, values: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v, i, f, and a gradient of h."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(batch, time, heads, n) for n in (keys, keys, values, values))
    i, f = torch.randn(batch, time, heads), torch.randn(batch, time, heads) + 4
    leaves = [x.to(DEVICE, DTYPE).requires_grad_() for x in (q, k, v)]
    return [*leaves, *(x.to(DEVICE).requires_grad_() for x in (i, f))], grad.to(DEVICE, DTYPE)


def run(function: Callable, leaves: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """h, and with `grad` the gradients of all inputs."""
    if grad is None:
        with torch.no_grad():
            return [function(*leaves)]
    h = function(*leaves)
    return [h.detach(), *torch.autograd.grad(h, leaves, grad, allow_unused=True, materialize_grads=True)]


def peers() -> dict[str, Callable]:
    """Functions of q, k, v, i, f (time before heads) to h."""
    found: dict[str, Callable] = {}
    if importlib.util.find_spec("mlstm_kernels"):
        from mlstm_kernels.torch import get_mlstm_kernel

        for kernel in KERNELS:
            call = get_mlstm_kernel(f"chunkwise--{kernel}")

            def heads_first(*inputs, call=call):
                q, k, v, i, f = (x.transpose(1, 2) for x in inputs)
                return call(q, k, v, i=i, f=f, autocast_kernel_dtype=DTYPE).transpose(1, 2)

            found[f"mlstm_kernels {kernel}"] = heads_first
    if GPU and importlib.util.find_spec("fla"):
        from fla.ops.simple_gla import chunk_simple_gla

        log_sigmoid = torch.nn.functional.logsigmoid
        found["fla simple_gla (less work)"] = lambda q, k, v, i, f: chunk_simple_gla(q, k, v, log_sigmoid(f))[0]
    return found


def attention(batch: int, time: int) -> Callable:
    """32 heads of 128, as wide as 16 of 256."""
    q, k, v = (torch.randn(batch, 32, time, 128, device=DEVICE, dtype=DTYPE) for _ in range(3))

    def call():
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def main() -> None:
    results = {}
    functions = {"hf_rnn": lambda *inputs: mlstm_scan(*inputs)[0], **peers()}
    for shape in SHAPES:
        leaves, grad = make(*shape)
        for what, given in (("forward", None), ("forward + backward", grad)):
            expected = None
            if shape == SHAPES[0]:
                double = [x.detach().double().requires_grad_() for x in leaves]
                expected = run(functions["hf_rnn"], double, None if given is None else given.double())
            contestants = {name: partial(run, function, leaves, given) for name, function in functions.items()}
            if GPU and given is None:
                contestants["attention"] = attention(*shape[:2])
            rows = compare(contestants, expected, tolerance=3e-2 if GPU else 1e-4, repeats=10)
            results[f"{shape} {what}"] = rows
            table(f"{shape}, {what}", rows)
    save("mlstm", results)


if __name__ == "__main__":
    main()
