"""The cells on a GPU, one step forward and one back each, on tiles in registers; and arithmetic on tuples of tiles."""

import triton
import triton.language as tl

from hf_rnn_kernels.gated_scan.triton import _sigmoids


@triton.jit
def _float(tiles, COUNT: tl.constexpr):
    new = ()
    for k in tl.static_range(COUNT):
        new = new + (tiles[k].to(tl.float32),)
    return new


@triton.jit
def _where(condition, tiles, others, COUNT: tl.constexpr):
    new = ()
    for k in tl.static_range(COUNT):
        new = new + (tl.where(condition, tiles[k], others[k]),)
    return new


@triton.jit
def _add(tiles, others, COUNT: tl.constexpr):
    new = ()
    for k in tl.static_range(COUNT):
        new = new + (tiles[k].to(tl.float32) + others[k].to(tl.float32),)
    return new


@triton.jit
def _tanh(x):
    """To the last bits near 0, too: a polynomial fitted below 1/2, where 1 - e^-2|x| would cancel."""
    square = x * x
    p = ((0.0172569 * square - 0.053052906) * square + 0.13325986) * square - 0.3333315
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.5, x + x * (square * p), tl.where(x < 0, -y, y))


# The cells: as in `reference.py`, tuples of (BN, units) tiles in float32. A gate that is nearly open forgets 1 - f,
# which comes from the sigmoid of -x, since 1 - f of a rounded f would have few bits left.


@triton.jit
def _decay(keep, drop, x):
    return tl.where(drop < 0.5, x - drop * x, keep * x)


@triton.jit
def _lstm_gates(x, recurrent):
    i, not_i = _sigmoids(x[0] + recurrent[0])
    f, not_f = _sigmoids(x[1] + recurrent[1])
    o, not_o = _sigmoids(x[3] + recurrent[3])
    return i, not_i, f, not_f, _tanh(x[2] + recurrent[2]), o, not_o


@triton.jit
def _lstm_cell(i, f, not_f, g, c):
    add = i * g
    return tl.where(not_f < 0.5, c + (add - not_f * c), f * c + add)


@triton.jit
def _lstm_step(x, recurrent, states):
    i, _, f, not_f, g, o, _ = _lstm_gates(x, recurrent)
    c = _lstm_cell(i, f, not_f, g, states[1])
    return o * _tanh(c), c


@triton.jit
def _lstm_step_back(x, recurrent, before, grads):
    i, not_i, f, not_f, g, o, not_o = _lstm_gates(x, recurrent)
    tanh_c = _tanh(_lstm_cell(i, f, not_f, g, before[1]))
    dh, dc = grads[0], grads[1]
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    dx = (dc * g * (i * not_i), dc * before[1] * (f * not_f), dc * i * (1.0 - g * g), dh * tanh_c * (o * not_o))
    return dx, dx, (tl.zeros_like(dh), _decay(f, not_f, dc))


@triton.jit
def _gru_gates(x, recurrent):
    r, not_r = _sigmoids(x[0] + recurrent[0])
    z, not_z = _sigmoids(x[1] + recurrent[1])
    return r, not_r, z, not_z, _tanh(x[2] + r * recurrent[2])


@triton.jit
def _gru_step(x, recurrent, states):
    _, _, z, not_z, n = _gru_gates(x, recurrent)
    h = states[0]
    return (tl.where(not_z < 0.5, h + not_z * (n - h), n + z * (h - n)),)


@triton.jit
def _gru_step_back(x, recurrent, before, grads):
    r, not_r, z, not_z, n = _gru_gates(x, recurrent)
    dh = grads[0]
    dn = dh * not_z * (1.0 - n * n)
    dr, dz = dn * recurrent[2] * (r * not_r), dh * (before[0] - n) * (z * not_z)
    return (dr, dz, dn), (dr, dz, dn * r), (_decay(z, not_z, dh),)


@triton.jit
def _step(x, recurrent, states, CELL: tl.constexpr):
    """States after a step, from those before it."""
    return _lstm_step(x, recurrent, states) if CELL == "lstm" else _gru_step(x, recurrent, states)


@triton.jit
def _step_back(x, recurrent, before, grads, CELL: tl.constexpr):
    """Gradients of x, of `recurrent`, and of the states before the step but for what comes through R h."""
    lstm: tl.constexpr = CELL == "lstm"
    return _lstm_step_back(x, recurrent, before, grads) if lstm else _gru_step_back(x, recurrent, before, grads)
