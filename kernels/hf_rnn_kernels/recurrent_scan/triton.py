"""Triton backend for NVIDIA and AMD GPUs: the loop over time inside a kernel, R on chip from first step to last.

A program owns one head of BN sequences (the fewest rows a matrix unit takes) and walks them to the end of the longest.
Where R fits on chip (`_plan`) it is loaded once, before the loop, and the states stay in registers: a step is then
G small matrix products and the gates, and the inputs of the next one are on their way meanwhile. Where it does not,
the "streamed" kernels read R anew at each step, in tiles, from the GPU's cache: correct for any size, and slow.
Both kinds share everything else, first of all the cells: one step forward and one step back each.

Backward, R h_{t-1} is computed again for all steps at once, since none waits for another (`_recompute`), and left in
grad_x, rounded to the dtype of x. `_backward` finds it there and puts the gradients in its place: its steps have half
the work, and R is on chip in one layout. With the second one, which R h needs, 128 units in bfloat16 took 308 KiB of
shared memory for an LSTM and 228 KiB for a GRU, more than an H100 has, and spilled 1,302 and 776 registers on gfx942.

Perturbed copies R + left right^T are never formed: their sequences are a program's like any others, each with factors
of its own, which stay in registers beside R.

The numbers of sequences, heads and members and the lengths are run-time arguments on which nothing is specialised.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_rnn_kernels.gated_scan.triton import _rows
from hf_rnn_kernels.recurrent_scan.reference import CELLS, STEPS_BACK
from hf_rnn_kernels.recurrent_scan.triton_cells import CARRIED, _add, _float, _step, _step_back, _where
from hf_rnn_kernels.recurrent_scan.triton_tiles import (
    _add_low_rank,
    _bias,
    _held,
    _live,
    _load,
    _owner,
    _projected,
    _projected_streamed,
    _recurrent,
    _recurrent_streamed,
    _source,
    _store,
    _task,
    _through,
    _through_streamed,
)
from hf_rnn_kernels.recurrent_scan.weight_gradients import weight_gradients

BN = 16
ROOM = 160 * 1024  # bytes on chip for a program, where the device has no number for it
UNITS, DEPTH = 32, 64  # tiles of R where it is streamed
# `_recompute` has as many programs, several for each multiprocessor, if that leaves each so many steps.
PROGRAMS, STEPS = 1024, 16

_jit = triton.jit(
    do_not_specialize=["time", "rows", "sequences", "heads", "chunks", "rows_per_member"],
    do_not_specialize_on_alignment=["mask", "offsets"],
)


# Kernels. `first` (N, D) is h before the first token, rounded to the dtype of x as all later ones are. `tl.range` with
# num_stages has loads of the next step written to shared memory (AMD: registers) during this one.


@_jit
def _forward(
    x, weight, bias, mask, offsets, x_stride, time: tl.int64, rows: tl.int64, sequences, heads, size,
    first, h, others, last, left, right, rows_per_member,
    CELL: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr,
    BN: tl.constexpr, STEP: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`last` (STATES, N, D) holds the initial states on entry, the last ones on return, and behind them what else the
    cell carries; `others` the KEPT states but h. `left` (M, H, K, G * P), `right` (M, H, K, P) and with them a `bias`
    for each member (M, H * G * P), or None."""
    head, n, start, length, longest = _task(offsets, time, rows, sequences, heads, BN, STEP)
    n, start, length = n[:, None], start[:, None], length[:, None]
    unit = tl.arange(0, BP)[None, :]
    units = heads.to(tl.int64) * size
    weights = _held(weight, head, size, unit, GATES)
    own = _owner(n, head, sequences, heads, rows_per_member)
    biases = _bias(bias, own, size, unit, unit < size, GATES)
    if left is not None:
        lefts = _load(left, own * K * GATES * size, unit, size, unit < size, K * GATES)
        rights = _load(right, own * K * size, unit, size, unit < size, K)
    there = (n < sequences) & (unit < size)
    apart = sequences * units
    states = _load(last, n * units + head * size, unit, apart, there, STATES)
    for t in tl.range(longest, num_stages=STAGES):
        inside = (t < length) & (unit < size)
        x_t = _load(x, (start + t * STEP) * x_stride + head * GATES * size, unit, size, inside, GATES)
        live = _live(mask, start + t * STEP, t < length)
        # Rounded as the h that is written: backward, and a sequence split in two, must see the same.
        h_before = states[0].to(x.dtype.element_ty)
        recurrent = _add(_recurrent(h_before, weights, GATES), biases, GATES)
        if left is not None:
            recurrent = _add_low_rank(recurrent, _projected(h_before, rights, K), lefts, GATES, K)
        states = _where(live, _step(_float(x_t, GATES), recurrent, states, CELL), states, STATES)
        to = (start + t * STEP) * units
        tl.store(h + to + head * size + unit, states[0], inside)
        _store(others, to * KEPT + head * size, unit, units, inside, states, 1, KEPT)
    _store(last, n * units + head * size, unit, apart, there, states, 0, STATES)


@_jit
def _forward_streamed(
    x, weight, bias, mask, offsets, x_stride, time: tl.int64, rows: tl.int64, sequences, heads, size,
    first, h, others, last, left, right, rows_per_member,
    CELL: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr,
    BN: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """As `_forward`; between steps the states are in `last`."""
    head, n, start, length, longest = _task(offsets, time, rows, sequences, heads, BN, STEP)
    n, start, length = n[:, None], start[:, None], length[:, None]
    units = heads.to(tl.int64) * size
    own = _owner(n, head, sequences, heads, rows_per_member)
    apart = sequences * units
    for t in range(longest):
        row = start + t * STEP
        live = _live(mask, row, t < length)
        source, source_to, _ = _source(first, h, t, n, row, sequences, units, 1, STEP)
        if left is not None:
            u = _projected_streamed(source, source_to + head * size, t < length, right, own, size, K, BN, DEPTH)
        for begin in range(0, size, UNITS):
            unit = begin + tl.arange(0, UNITS)[None, :]
            inside = (t < length) & (unit < size)
            recurrent = _recurrent_streamed(
                source, source_to + head * size, t < length, weight, head, size, unit, GATES, BN, UNITS, DEPTH
            )
            recurrent = _add(recurrent, _bias(bias, own, size, unit, unit < size, GATES), GATES)
            if left is not None:
                lefts = _load(left, own * K * GATES * size, unit, size, unit < size, K * GATES)
                recurrent = _add_low_rank(recurrent, u, lefts, GATES, K)
            x_t = _load(x, row * x_stride + head * GATES * size, unit, size, inside, GATES)
            states = _load(last, n * units + head * size, unit, apart, inside, STATES)
            states = _where(live, _step(_float(x_t, GATES), recurrent, states, CELL), states, STATES)
            tl.store(h + row * units + head * size + unit, states[0], inside)
            _store(others, row * KEPT * units + head * size, unit, units, inside, states, 1, KEPT)
            _store(last, n * units + head * size, unit, apart, inside, states, 0, STATES)
        # The barrier of a block of threads: no other program reads these rows.
        tl.debug_barrier()  # the next step reads what other threads wrote in this one


@_jit
def _recompute(
    x, weight, bias, mask, offsets, x_stride, time: tl.int64, rows: tl.int64, sequences, heads, size,
    first, h, chunks, recurrent,
    CELL: tl.constexpr, GATES: tl.constexpr,
    BN: tl.constexpr, STEP: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """R h_{t-1} for all t, which nothing has to wait for: of `chunks` programs each takes every chunks-th step."""
    head, n, start, length, longest = _task(offsets, time, rows, sequences, heads, BN, STEP)
    n, start, length = n[:, None], start[:, None], length[:, None]
    unit = tl.arange(0, BP)[None, :]
    units = heads.to(tl.int64) * size
    weights = _held(weight, head, size, unit, GATES)
    # Every chunks-th step and not a stretch of them: sequences that end early leave no program idle.
    for t in tl.range(tl.program_id(1), longest, chunks, num_stages=STAGES):
        row = start + t * STEP
        inside = (t < length) & (unit < size)
        source, to, _ = _source(first, h, t, n, row, sequences, units, 1, STEP)
        h_before = tl.load(source + (to + head * size) + unit, inside, other=0.0)
        products = _recurrent(h_before, weights, GATES)
        _store(recurrent, (row * heads + head) * GATES * size, unit, size, inside, products, 0, GATES)


@_jit
def _recompute_streamed(
    x, weight, bias, mask, offsets, x_stride, time: tl.int64, rows: tl.int64, sequences, heads, size,
    first, h, chunks, recurrent,
    CELL: tl.constexpr, GATES: tl.constexpr,
    BN: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """As `_recompute`."""
    head, n, start, length, longest = _task(offsets, time, rows, sequences, heads, BN, STEP)
    n, start, length = n[:, None], start[:, None], length[:, None]
    units = heads.to(tl.int64) * size
    for t in range(tl.program_id(1), longest, chunks):
        row = start + t * STEP
        source, to, _ = _source(first, h, t, n, row, sequences, units, 1, STEP)
        for begin in range(0, size, UNITS):
            unit = begin + tl.arange(0, UNITS)[None, :]
            inside = (t < length) & (unit < size)
            products = _recurrent_streamed(
                source, to + head * size, t < length, weight, head, size, unit, GATES, BN, UNITS, DEPTH
            )
            _store(recurrent, (row * heads + head) * GATES * size, unit, size, inside, products, 0, GATES)


@triton.jit
def _gradients(
    x, mask, x_stride, sequences, heads, size, first, states, h, others, grad, grad_stride, grad_x, own,
    t, head, n, start, length, unit, biases, carry,
    CELL: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Step t of the backward pass, but for R^T d: stores the gradients; returns that of R h + b, and of the states
    before the step, from those after it."""
    units = heads.to(tl.int64) * size
    row = start + t * STEP
    inside = (t < length) & (unit < size)
    live = _live(mask, row, t < length)
    x_t = _load(x, row * x_stride + head * GATES * size, unit, size, inside, GATES)
    dx_to = (row * heads + head) * GATES * size
    recurrent = _add(_load(grad_x, dx_to, unit, size, inside, GATES), biases, GATES)
    source, to, apart = _source(first, h, t, n, row, sequences, units, 1, STEP)
    before = _load(source, to + head * size, unit, apart, inside, 1)
    source, to, apart = _source(states + sequences * units, others, t, n, row, sequences, units, STATES - 1, STEP)
    before = _float(before, 1) + _load(source, to + head * size, unit, apart, inside, STATES - 1)
    dh = tl.load(grad + (row * grad_stride + head * size) + unit, inside, other=0.0)
    # The output is h: its gradient joins what comes from later steps.
    carry = (carry[0] + dh.to(tl.float32),) + carry[1:]
    dx, d, passed = _step_back(_float(x_t, GATES), recurrent, before, carry, CELL)
    zeros = (tl.zeros_like(dx[0]),) * GATES
    dx, d, passed = _where(live, dx, zeros, GATES), _where(live, d, zeros, GATES), _where(live, passed, carry, STATES)
    _store(grad_x, dx_to, unit, size, inside, dx, 0, GATES)
    _store(own, (row * heads + head) * OWN * size, unit, size, inside, d, GATES - OWN, OWN)
    return d, passed


@_jit
def _backward(
    x, weight, bias, mask, offsets, x_stride, time: tl.int64, rows: tl.int64, sequences, heads, size,
    first, states, h, others, grad, grad_stride, grads, grad_x, own,
    CELL: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr, OWN: tl.constexpr,
    BN: tl.constexpr, STEP: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`states` (S, N, D) are the initial ones; `grads` (S, N, D) holds the gradients of the last states on entry, those
    of the initial states on return; `grad_x` what `_recompute` left there, which each step replaces by its gradients.
    """
    head, n, start, length, longest = _task(offsets, time, rows, sequences, heads, BN, STEP)
    n, start, length = n[:, None], start[:, None], length[:, None]
    unit = tl.arange(0, BP)[None, :]
    units = heads.to(tl.int64) * size
    weights = _held(weight, head, size, unit, GATES)
    biases = _bias(bias, head, size, unit, unit < size, GATES)
    there = (n < sequences) & (unit < size)
    apart = sequences * units
    carry = _load(grads, n * units + head * size, unit, apart, there, STATES)
    for back in tl.range(longest, num_stages=STAGES):
        d, passed = _gradients(
            x, mask, x_stride, sequences, heads, size, first, states, h, others, grad, grad_stride, grad_x, own,
            longest - 1 - back, head, n, start, length, unit, biases, carry, CELL, GATES, STATES, OWN, STEP,
        )  # fmt: skip
        carry = (passed[0] + _through(d, weights, x.dtype.element_ty, GATES),) + passed[1:]
    _store(grads, n * units + head * size, unit, apart, there, carry, 0, STATES)


@_jit
def _backward_streamed(
    x, weight, bias, mask, offsets, x_stride, time: tl.int64, rows: tl.int64, sequences, heads, size,
    first, states, h, others, grad, grad_stride, grads, grad_x, own,
    CELL: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr, OWN: tl.constexpr,
    BN: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """As `_backward`; between steps the gradients of the states are in `grads`."""
    head, n, start, length, longest = _task(offsets, time, rows, sequences, heads, BN, STEP)
    n, start, length = n[:, None], start[:, None], length[:, None]
    units = heads.to(tl.int64) * size
    apart = sequences * units
    to = n * units + head * size
    for back in range(longest):
        t = longest - 1 - back
        for begin in range(0, size, UNITS):
            unit = begin + tl.arange(0, UNITS)[None, :]
            inside = (t < length) & (unit < size)
            carry = _load(grads, to, unit, apart, inside, STATES)
            biases = _bias(bias, head, size, unit, unit < size, GATES)
            _, passed = _gradients(
                x, mask, x_stride, sequences, heads, size, first, states, h, others, grad, grad_stride, grad_x,
                own, t, head, n, start, length, unit, biases, carry, CELL, GATES, STATES, OWN, STEP,
            )  # fmt: skip
            _store(grads, to, unit, apart, inside, passed, 0, STATES)
        tl.debug_barrier()  # what follows reads what other threads wrote above
        for begin in range(0, size, UNITS):
            unit = begin + tl.arange(0, UNITS)[None, :]
            inside = (t < length) & (unit < size)
            through = _through_streamed(
                grad_x, own, start + t * STEP, t < length, weight, head, heads, size, unit,
                GATES, OWN, BN, UNITS, DEPTH,
            )  # fmt: skip
            tl.store(grads + to + unit, tl.load(grads + to + unit, inside, other=0.0) + through, inside)
        tl.debug_barrier()


def _chip(device: torch.device) -> tuple[int, bool]:
    """Bytes that a program may hold on chip, and whether it is AMD's: there R goes to registers, on NVIDIA to shared
    memory."""
    if device.type != "cuda" or torch.version.hip is not None:
        return ROOM, torch.version.hip is not None
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin, False


def _plan(cell: str, weight: Tensor, back: bool) -> tuple[bool, dict]:
    """Whether R is held on chip, and tiles, stages and warps for that, from what Triton 3.7 makes of these kernels."""
    gates, states = CELLS[cell].gates, CELLS[cell].states
    block = max(16, triton.next_power_of_2(weight.shape[2]))
    tile = BN * block * weight.element_size()
    room, amd = _chip(weight.device)
    # R, and tiles on their way from one layout to another: two, or backward d and one more.
    # In bytes; powers of two, as tiles are padded.
    held = gates * block * tile // BN + (gates + 1 if back else 2) * tile
    if held > room:
        return False, {"UNITS": UNITS, "DEPTH": DEPTH, "num_warps": 8}
    # Loaded ahead: x, and backward R h, h before the step, the gradient of h and, in float32, the other states before.
    ahead = (2 * gates + 2) * tile + (states - 1) * BN * block * 4 if back else gates * tile
    # Float32 has no matrix units on NVIDIA. At 64 units 4 warps there spill hundreds of bytes, on AMD 8 do.
    warps = 8 if block > 64 or (tile > 2048 and not amd) else 4
    return True, {"BP": block, "STAGES": 2 if held + ahead <= room else 1, "num_warps": warps, "num_stages": 1}


class _Launch:
    """The arguments that the kernels of one scan share."""

    def __init__(
        self, cell: str, x: Tensor, weight: Tensor, bias: Tensor | None, states: list[Tensor], mask: Tensor | None,
        cu_seqlens: Tensor | None, reverse: bool, perturbation: Sequence[Tensor] = (),
    ):  # fmt: skip
        batch, time, _ = x.shape
        self.heads, _, size = weight.shape
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.weight = weight.to(x.dtype).contiguous()
        x, x_stride = _rows(x)
        self.members, self.rank = (None, None, None), 0
        if perturbation:
            left, right, biases = perturbation
            bias = biases if bias is None else biases + bias
            left, right = (factor.to(x.dtype).transpose(2, 3).contiguous() for factor in (left, right))
            self.members, self.rank = (left, right, self.sequences // len(left)), left.shape[2]
        bias = None if bias is None else bias.float().contiguous()
        # Of 16 bits because Triton lays out the operands of `tl.dot` for the narrowest load they depend on.
        mask = None if mask is None else mask.bool().to(torch.int16).contiguous()
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.shared = (
            x, self.weight, bias, mask, offsets, x_stride,
            time, batch * time, self.sequences, self.heads, size,
        )  # fmt: skip
        self.tasks = self.heads * triton.cdiv(self.sequences, BN)
        self.cell = CELLS[cell]
        self.constants = {"CELL": cell, "GATES": self.cell.gates, "BN": BN, "STEP": -1 if reverse else 1}
        zeros = torch.zeros(self.sequences, self.heads * size, device=x.device)
        states = [state.float() for state in states] or [zeros] * self.cell.states
        self.states = torch.stack([*states, *[zeros] * CARRIED.get(cell, 0)])
        # A copy, since `last` shares its memory with the states.
        self.first = self.states[0].to(x.dtype, copy=True)

    def run(self, kernel, streamed, *arguments, chunks: int = 1, **constants) -> None:
        held, plan = _plan(self.constants["CELL"], self.weight, kernel is _backward)
        kernel = kernel if held else streamed
        kernel[(self.tasks, chunks)](*self.shared, self.first, *arguments, **self.constants, **constants, **plan)


def scan(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    training: bool = False,
    perturbation: Sequence[Tensor] = (),
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.scan`."""
    with torch.cuda.device_of(x):
        launch = _Launch(cell, x, weight, bias, states, mask, cu_seqlens, reverse, perturbation)
        batch, time, units = *x.shape[:2], launch.states.shape[2]
        kept = launch.cell.states - 1 if training else 0
        h = torch.empty(batch, time, units, dtype=x.dtype, device=x.device)
        others = torch.empty(batch, time, kept, units, dtype=torch.float32, device=x.device)
        carried = launch.states.shape[0]
        launch.run(
            _forward, _forward_streamed, h, others, launch.states, *launch.members,
            STATES=carried, KEPT=kept, K=launch.rank,
        )  # fmt: skip
    return h, others, launch.states[: launch.cell.states]


def scan_backward(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    others: Tensor,
    grad: Tensor,
    grad_last: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `op.scan_backward`."""
    with torch.cuda.device_of(x):
        launch = _Launch(cell, x, weight, bias, states, mask, cu_seqlens, reverse)
        h, (grad, grad_stride) = h.contiguous(), _rows(grad)
        grads = grad_last.to(torch.float32, copy=True).contiguous()
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        gates = STEPS_BACK[cell].own
        own = torch.empty(*x.shape[:2], gates * h.shape[2], dtype=x.dtype, device=x.device)
        # At least STEPS steps for each: loading R is to be worth it.
        chunks = max(1, min(PROGRAMS // launch.tasks, x.shape[1] // STEPS))
        launch.run(_recompute, _recompute_streamed, h, chunks, grad_x, chunks=chunks)
        launch.run(
            _backward, _backward_streamed, launch.states, h, others.contiguous(), grad, grad_stride,
            grads, grad_x, own, STATES=launch.cell.states, OWN=gates,
        )  # fmt: skip
        grad_weight, grad_bias = weight_gradients(grad_x, own, weight, h, states, cu_seqlens, reverse)
    return grad_x, grad_weight, grad_bias, grads
