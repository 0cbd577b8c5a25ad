"""How fast is each recurrence over T at a constant number of tokens, and over batch sizes? How near to the limit?

    python benchmarks/kernels.py

65,536 tokens as 128 sequences of 512, 16 of 4,096, one of 65,536, and 512 tokens at batch 1 and 8; forward, and
forward + backward, float32 on a CPU, bfloat16 on a GPU. Beside it minGRU-pytorch's parallel scan, torch's own LSTM and
GRU with the input projection on both sides, FlashRNN's vanilla backend, mlstm_kernels and on a GPU what else is
installed; not where a loop over time takes minutes. All are checked against the equation in float64 first, on a
GPU with 1,024 tokens.

The limit is what the larger takes, of the bytes of arguments, results and gradients at the speed of a copy, and of the
matrix products at that of a large one; both are measured in the same run. The first call in a process, of one op of
each family, is timed with nothing compiled yet and with what an earlier process left on disk; then with other T and B,
where nothing may be compiled again.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from driver import DEVICE, GPU, LIKE_GPU, compare, compilations, limits, milliseconds, share_of_limit, sized, table
from resumable import Parts
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hf_rnn_kernels import gru_scan, linear_scan, lstm_scan, min_gru_scan, min_lstm_scan, mlstm_scan, slstm_scan

DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 5e-2 if GPU else 1e-4
CHECKED = 2**10 if GPU else 2**16  # tokens at most whose equation in float64, step by step, is worth its time
SHAPES = sized(
    cpu=[(128, 512), (16, 4096), (1, 65536), (1, 512), (8, 512)],
    gpu=[(2, 512), (128, 512), (32, 2048), (8, 8192), (1, 65536), (1, 512), (8, 512)],
    dry=[(2, 16)],
)
WIDTH, HEADS = sized(cpu=(64, 2), gpu=(1024, 16), dry=(32, 2))
KEYS, VALUES = sized(cpu=(32, 64), gpu=(128, 256), dry=(16, 16))  # of each head of mLSTM
COLD = sized(cpu=(4, 256), gpu=(4, 256), dry=(1, 4))  # the shape of the first call, and those after it
WARM = sized(*2 * [[(4, 512), (3, 257), (17, 64), (1, 4096), (64, 33)]], dry=[(2, 3)])

Function = Callable[..., Tensor]


@dataclass
class Op:
    """A recurrence: random arguments for (B, T), ours and its peers from them to h, and what a token takes."""

    make: Callable[[int, int], list[Tensor]]
    ours: Function
    arguments: int  # numbers read for each token
    results: int  # numbers written for each token
    products: int = 0  # multiplications with additions for each token, of the forward pass
    peers: dict[str, Function] = field(default_factory=dict)
    tolerance: float = TOLERANCE


def gates(count: int, positive: bool = False) -> Callable[[int, int], list[Tensor]]:
    def make(batch: int, time: int) -> list[Tensor]:
        inputs = [torch.randn(batch, time, WIDTH) for _ in range(count)]
        return [x.sigmoid() for x in inputs] if positive else inputs

    return make


def log_scan(a: Tensor, b: Tensor) -> Tensor:
    """minGRU-pytorch's parallel scan, of logarithms."""
    from minGRU_pytorch.minGRU import heinsen_associative_scan_log

    return heinsen_associative_scan_log(a, b)


def peer_min_gru(gate: Tensor, candidate: Tensor) -> Tensor:
    """minGRU-pytorch's minGRU from its pre-activations on, as in its forward."""
    from minGRU_pytorch.minGRU import log_g

    return log_scan(-F.softplus(gate), -F.softplus(-gate) + log_g(candidate))


def peer_min_lstm(forget: Tensor, input_: Tensor, candidate: Tensor) -> Tensor:
    """minGRU-pytorch's minLSTM from its pre-activations on, as in its forward."""
    from minGRU_pytorch.minGRU import log_g

    difference = F.softplus(-forget) - F.softplus(-input_)
    return log_scan(-F.softplus(difference), -F.softplus(-difference) + log_g(candidate))


def accelerated_scan(a: Tensor, b: Tensor) -> Tensor:
    from accelerated_scan.scalar import scan

    return scan(a.mT.contiguous(), b.mT.contiguous()).mT


def dense(gates_: int) -> Callable[[int, int], list[Tensor]]:
    """x, W, R and b of an RNN of torch's, with one bias."""

    def make(batch: int, time: int) -> list[Tensor]:
        weights = [torch.randn(gates_ * WIDTH, WIDTH) / (2 * math.sqrt(WIDTH)) for _ in range(2)]
        return [torch.randn(batch, time, WIDTH), *weights, torch.randn(gates_ * WIDTH)]

    return make


def projected(scan: Function) -> Function:
    return lambda x, w, r, b: scan(F.linear(x, w), r[None], b)[0]


def library(name: str) -> Function:
    """torch.lstm or torch.gru, whose second bias is zero here."""

    def run(x, w, r, b):
        state = x.new_zeros(1, x.shape[0], WIDTH)
        hx = (state, state) if name == "lstm" else state
        return getattr(torch, name)(x, hx, [w, r, torch.zeros_like(b), b], True, 1, 0.0, True, False, True)[0]

    return run


def with_heads(batch: int, time: int) -> list[Tensor]:
    """x, R and b of sLSTM."""
    size = WIDTH // HEADS
    weight = torch.randn(HEADS, 4 * size, size) / (2 * math.sqrt(size))
    return [torch.randn(batch, time, 4 * WIDTH), weight, torch.randn(4 * WIDTH)]


def flash_rnn(backend: str) -> Function:
    """FlashRNN's sLSTM, from our layout."""

    def run(x, weight, bias):
        from flashrnn import flashrnn

        heads, size = weight.shape[0], weight.shape[2]
        wx = x.unflatten(2, (heads, 4, size)).transpose(2, 3)
        r, b = weight.unflatten(1, (4, size)).transpose(0, 1), bias.view(heads, 4, size).transpose(0, 1)
        dtype = str(DTYPE).removeprefix("torch.")
        return flashrnn(wx, r, b, function="slstm", backend=backend, dtype=dtype)[0][0].flatten(2)

    return run


def matrix_memory(batch: int, time: int) -> list[Tensor]:
    """q, k, v, i and f of mLSTM."""
    q, k, v = (torch.randn(batch, time, HEADS, n) for n in (KEYS, KEYS, VALUES))
    return [q, k, v, torch.randn(batch, time, HEADS), torch.randn(batch, time, HEADS) + 4]


def mlstm_kernels(kernel: str) -> Function:
    def run(*inputs):
        from mlstm_kernels.torch import get_mlstm_kernel

        q, k, v, i, f = (x.transpose(1, 2) for x in inputs)
        call = get_mlstm_kernel(f"chunkwise--{kernel}")
        return call(q, k, v, i=i, f=f, autocast_kernel_dtype=DTYPE).transpose(1, 2)

    return run


def simple_gla(q, k, v, i, f):
    """flash-linear-attention's nearest: no input gate, no normaliser."""
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, F.logsigmoid(f))[0]


def attention(q, k, v, i, f):
    """Causal attention of heads of 128 (fewer in a rehearsal), as wide as the values: other work, and no state."""
    x = v.flatten(2).unflatten(2, (-1, min(128, VALUES))).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).reshape(v.shape)


def first_of(scan: Function) -> Function:
    return lambda *inputs: scan(*inputs)[0]


FUSED = {"flashrnn triton_fused": flash_rnn("triton_fused"), "flashrnn cuda_fused": flash_rnn("cuda_fused")}
LOG_SPACE = 5e-2  # how far gradients of minGRU-pytorch's are off at thousands of tokens; the error is shown
OPS = {
    "linear_scan": Op(
        gates(2, positive=True), first_of(linear_scan), 2 * WIDTH, WIDTH,
        peers={"minGRU-pytorch": lambda a, b: log_scan(a.log(), b.log())}
        | ({"accelerated-scan": accelerated_scan} if GPU else {}),
        tolerance=LOG_SPACE,
    ),
    "min_gru_scan": Op(
        gates(2), first_of(min_gru_scan), 2 * WIDTH, WIDTH,
        peers={"minGRU-pytorch": peer_min_gru}, tolerance=LOG_SPACE,
    ),
    "min_lstm_scan": Op(
        gates(3), first_of(min_lstm_scan), 3 * WIDTH, WIDTH,
        peers={"minGRU-pytorch": peer_min_lstm}, tolerance=LOG_SPACE,
    ),
    "lstm_scan and its projection": Op(
        dense(4), projected(lstm_scan), WIDTH, WIDTH, 8 * WIDTH**2, peers={"torch.nn.LSTM": library("lstm")}
    ),
    "gru_scan and its projection": Op(
        dense(3), projected(gru_scan), WIDTH, WIDTH, 6 * WIDTH**2, peers={"torch.nn.GRU": library("gru")}
    ),
    "mlstm_scan": Op(
        matrix_memory, first_of(mlstm_scan), HEADS * (2 * KEYS + VALUES + 2), HEADS * VALUES, 2 * HEADS * KEYS * VALUES,
        peers={
            "mlstm_kernels triton_xl_chunk": mlstm_kernels("triton_xl_chunk"), "fla simple_gla": simple_gla,
            "attention": attention,
        }
        if LIKE_GPU else {"mlstm_kernels native_autograd": mlstm_kernels("native_autograd")},
    ),
    "slstm_scan": Op(
        with_heads, first_of(slstm_scan), 4 * WIDTH, WIDTH, 4 * WIDTH**2 // HEADS,
        peers=FUSED if LIKE_GPU else {"flashrnn vanilla": flash_rnn("vanilla")},
    ),
}  # fmt: skip
FAMILIES = ["min_gru_scan", "lstm_scan and its projection", "mlstm_scan"]  # others share their compiled loops
ACCEPTED = {"torch.nn.LSTM": "for few sequences the LSTM layer calls torch's own, whatever this op costs (docs/log.md)"}
OTHER_WORK = {"fla simple_gla", "attention"}


def arguments(op: Op, batch: int, time: int, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    torch.manual_seed(0)
    return [x.to(DEVICE, dtype).requires_grad_() for x in op.make(batch, time)]


def call(function: Function, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """h, and with `grad` the gradients of all arguments."""
    if grad is None:
        with torch.no_grad():
            return [function(*inputs)]
    h = function(*inputs)
    return [h.detach(), *torch.autograd.grad(h, inputs, grad, allow_unused=True, materialize_grads=True)]


def takes_minutes(peer: str, batch: int, time: int) -> bool:
    """Loops over time whose backward pass adds to a whole gradient at every step."""
    loops = peer in ("torch.nn.GRU", "mlstm_kernels native_autograd")
    return (loops and time > 4096) or (peer == "flashrnn vanilla" and batch * time > 4096)


def gradient(op: Op, batch: int, time: int) -> Tensor:
    """Of h."""
    with torch.no_grad():
        shape = op.ours(*arguments(op, 1, 1)).shape[2:]
    torch.manual_seed(1)
    return torch.randn(batch, time, *shape).to(DEVICE, DTYPE)


def in_float64(name: str, batch: int, time: int) -> list[np.ndarray]:
    """What `call` returns with a gradient, by the equation, step by step."""
    op = OPS[name]
    doubles = [x.detach().double().requires_grad_() for x in arguments(op, batch, time)]
    return [x.cpu().numpy() for x in call(op.ours, doubles, gradient(op, batch, time).double())]


def references(names: list[str]) -> dict[tuple, list[np.ndarray]]:
    """`in_float64` of every op and shape that is worth its time, on a CPU: a process with one thread for each core."""
    jobs = [(name, *shape) for shape in SHAPES for name in names if math.prod(shape) <= CHECKED]
    jobs.sort(key=lambda job: -job[2])  # the longest first
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(torch.get_num_threads(), context, torch.set_num_threads, (1,)) as pool:
        found = pool.map(in_float64, *zip(*jobs, strict=True))
        return dict(zip(jobs, tqdm(found, total=len(jobs), desc="float64", unit="reference"), strict=True))


def measure(
    name: str, batch: int, time: int, arrays: list[np.ndarray] | None, results: dict[str, dict]
) -> dict[str, dict]:
    """The op at one shape, beside its peers but those that `results` show to be wrong; expected are `arrays`."""
    op, wrong = OPS[name], known_wrong(name, results)
    if LIKE_GPU and batch * time <= CHECKED:
        arrays = in_float64(name, batch, time)
    expected = None if arrays is None else [torch.from_numpy(x) for x in arrays]
    results = {}
    inputs, grad = arguments(op, batch, time), gradient(op, batch, time)
    for what, given in (("forward", None), ("forward + backward", grad)):
        contestants: dict[str, Callable] = {"hf_rnn": partial(call, op.ours, inputs, given)}
        left_out = {}
        for peer, function in op.peers.items():
            run = partial(call, function, inputs, given)
            if f"{peer} {what}" in wrong:
                left_out[peer] = {"error": None, "refused": "left out: wrong with 1,024 tokens"}
            elif takes_minutes(peer, batch, time):
                left_out[peer] = {"error": None, "refused": "left out: a loop over time that takes minutes"}
            else:
                contestants[peer] = (lambda run=run: run() and None) if peer in OTHER_WORK else run
        reference = expected if given is not None or expected is None else expected[:1]
        rows = compare(contestants, reference, op.tolerance, seconds=2, accepted=ACCEPTED) | left_out
        size, back = inputs[0].element_size(), given is not None
        moved = op.arguments + op.results + back * (2 * op.arguments + 2 * op.results)
        share_of_limit(rows["hf_rnn"], moved * size * batch * time, 2 * op.products * batch * time * (3 if back else 1))
        results[f"{name} {what}, {batch} x {time}"] = rows
        table(f"{name}, {what}, {batch} x {time} tokens", rows)
    return results


def known_wrong(name: str, results: dict[str, dict]) -> set[str]:
    """Who was refused with 1,024 tokens or fewer."""
    found = set()
    for title, rows in results.items():
        what, _, shape = title.removeprefix(name).strip().rpartition(", ")
        if title.startswith(name) and math.prod(map(int, shape.split(" x "))) <= 1024:
            found |= {f"{peer} {what}" for peer, row in rows.items() if "refused" in row}
    return found


def first_call(name: str) -> dict[str, float | int]:
    """In a process of its own: milliseconds of the first call, forward + backward; what other T and B compile."""
    op = OPS[name]

    def once(batch: int, time: int) -> float:
        inputs = arguments(op, batch, time)
        return milliseconds(lambda: op.ours(*inputs).sum().backward())

    with compilations() as first:
        ms = once(*COLD)
    with compilations() as later:
        for shape in WARM:
            once(*shape)
    return {"ms": ms, "compiled": len(first), "compiled_again": len(later)}


def first_calls(name: str) -> dict[str, dict]:
    """`first_call` with empty caches of compiled kernels, and with what that left there."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--first-call", name]
        found = {}
        for what in ("nothing compiled", "compiled before"):
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            found[what] = json.loads(output.splitlines()[-1])
            print(f"{name}: first call, {what}: {found[what]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-call", metavar="OP", help="print what the first call takes, and end")
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    options = parser.parse_args()
    if options.first_call:
        print(json.dumps(first_call(options.first_call)))
        return

    parts, results = Parts("kernels"), {}
    ceiling, first = parts.run("limits", limits), {}
    print(f"{ceiling['bytes_per_second'] / 1e9:.1f} GB/s, {ceiling['operations_per_second'] / 1e9:.0f} GFLOP/s")
    doubles = {} if LIKE_GPU else references(options.ops)
    for name in options.ops:
        if name in FAMILIES and (found := parts.run(f"first call, {name}", first_calls, name)):
            first[name] = found
        for batch, time in SHAPES:
            arrays = doubles.pop((name, batch, time), None)
            found = parts.run(f"{name}, {batch} x {time}", measure, name, batch, time, arrays, results)
            results |= found or {}
    parts.finish({"limits": ceiling, "first call": first} | results)


if __name__ == "__main__":
    main()
