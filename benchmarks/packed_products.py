"""What bounds a token in 8 and 4 bits, bytes or instructions, and what does rounding activations to 16 bits cost?

    python benchmarks/packed_products.py

A matrix times a vector by one thread, in float32, 8 and 4 bits, and a loop that only reads the same bytes: from the
second cache, and from memory. Processor time of the thread, the least of turns that all take one after the other, for
the machine may be shared. Errors beside float64: by rounding activations, and by rounding weights.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from driver import relative_error, save, sized
from numba import njit
from torch import Tensor

from hf_rnn_kernels.packed_linear import pack, unpack
from hf_rnn_kernels.packed_linear.cpu import packed_dots, rounded
from hf_rnn_kernels.vector_math import U, dot

SHAPES = sized(*2 * [{"second cache": (512, 2048), "memory": (49_152, 2048)}], dry={"second cache": (8, 64)})
TURNS, SMALL = sized(40, 40, 2), 2**22  # weights of a matrix that is multiplied several times in a turn


@njit
def _float_product(sizes, w, x, y, repeats):
    outputs, inputs = sizes
    for _ in range(repeats):
        for o in range(outputs):
            y[o] = dot(inputs, w, o * inputs, x, U(0))


@njit
def _packed_product(sizes, w, scale, x, y, repeats):
    bits, outputs, inputs, group = sizes
    for _ in range(repeats):
        y[:] = 0
        q, x_scale, start = rounded(bits, inputs, group, x, U(0))
        packed_dots(bits, inputs, group, w, scale, U(0), outputs, x, U(0), q, x_scale, start, y, U(0))


@njit(fastmath=True)
def _read(w, repeats):
    total = np.int64(0)
    for _ in range(repeats):
        for i in range(U(w.size)):
            total += w[i]
    return total


def product(outputs: int, inputs: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, inputs), torch.randn(inputs)
    repeats, y = max(1, SMALL // weight.numel()), torch.empty(outputs)
    sizes = U(outputs), U(inputs)
    runs: dict[str, Callable] = {
        "float32": lambda: _float_product(sizes, weight.view(-1).numpy(), x.numpy(), y.numpy(), repeats),
        "float32, reading": lambda: _read(weight.view(-1).numpy().view(np.int64), repeats),
    }
    rows: dict[str, dict[str, float]] = {name: {} for name in runs}
    for bits in (8, 4):
        w, scale = pack(weight, bits)
        packed_sizes = U(bits), *sizes, U(inputs // scale.shape[1])

        def multiply(w=w, scale=scale, packed_sizes=packed_sizes) -> Tensor:
            _packed_product(packed_sizes, w.view(-1).numpy(), scale.view(-1).numpy(), x.numpy(), y.numpy(), repeats)
            return y

        runs[f"{bits} bits"] = multiply
        runs[f"{bits} bits, reading"] = lambda w=w: _read(w.view(-1).numpy().view(np.int64), repeats)
        kept = unpack(w, scale, bits).double() @ x.double()
        rows[f"{bits} bits"] = {
            "activations_error": relative_error(multiply(), kept),
            "weights_error": relative_error(kept, weight.double() @ x.double()),
        }
    for _ in range(TURNS):
        for name, run in runs.items():
            run()
            begun = time.thread_time()
            run()
            ms = 1e3 * (time.thread_time() - begun) / repeats
            row = rows.setdefault(name, {})
            row["ms"] = min(row.get("ms", ms), ms)
    for name, row in rows.items():
        row["times_float32"] = rows["float32"]["ms"] / row["ms"]
        print(f"{outputs} x {inputs} {name}: {row}", flush=True)
    return rows


def main() -> None:
    save("packed_products", {place: product(*shape) for place, shape in SHAPES.items()})


if __name__ == "__main__":
    main()
