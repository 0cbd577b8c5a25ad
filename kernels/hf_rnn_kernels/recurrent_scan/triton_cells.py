"""The cells on a GPU, one step forward and one back each, on tiles in registers; and arithmetic on tuples of tiles."""

import triton
import triton.language as tl

from hf_rnn_kernels.gated_scan.triton import _sigmoids

CARRIED = {"slstm": 1}  # tiles that a cell's forward step has behind its states, zero at first


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
    # Both forms are computed and one is taken.
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
def _log_sigmoid(x):
    """log(sigmoid(x)) and sigmoid(-x). Polynomial: of `vector_math.py`."""
    e = tl.exp(-tl.abs(x))
    p = (((0.0052326913 * e - 0.0295052268) * e + 0.078225933) * e - 0.136632442) * e + 0.191060066
    p = (((p * e - 0.24842982) * e + 0.333190978) * e - 0.499994934) * e + 0.99999994
    return tl.where(x < 0, x, 0.0) - e * p, tl.where(x < 0, 1.0, e) / (1.0 + e)


@triton.jit
def _slstm_shares(x, recurrent, before, lost):
    """The smaller of what is kept of c and n and what is added, the other being 1; 1 - what is kept; whether m is i and
    1 is added; m, and what rounding took from it."""
    i = x[0] + recurrent[0]
    log_f, _ = _log_sigmoid(x[1] + recurrent[1])
    # As on a CPU: m alone moves, by an amount rounded alike at each step.
    log_f += lost
    kept = before[3] + log_f
    gap = tl.where(before[2] == 0, i + float("-inf"), (before[3] - i) + log_f)  # a NaN in i stays one
    fresh, size = gap < 0, tl.abs(gap)
    near = (((-0.00103013404 * size + 0.00806245673) * size - 0.0415693521) * size + 0.166650593) * size - 0.499999017
    less = tl.exp(-size)
    # 1 - e^-size cancels where little is forgotten.
    drop = tl.where(size < 0.7, size + size * (size * near), 1.0 - less)  # keeps small ones' last bits
    lost = tl.where(fresh, 0.0, log_f - (kept - before[3]))
    return less, tl.where(fresh, drop, 0.0), fresh, tl.where(fresh, i, kept), lost


@triton.jit
def _mix(keep, drop, x, add):
    """keep * x + add; `keep` counts only where it is less than half."""
    return tl.where(drop < 0.5, x + (add - drop * x), keep * x + add)


@triton.jit
def _slstm_step(x, recurrent, states):
    """Beside h, c, n and m the states hold what rounding took from m: a constant forget gate would otherwise be rounded
    the same way at each step, off by 1e-4 after thousands."""
    less, drop, fresh, m, lost = _slstm_shares(x, recurrent, states, states[4])
    add = tl.where(fresh, 1.0, less)
    n = _mix(less, drop, states[2], add)
    c = _mix(less, drop, states[1], add * _tanh(x[2] + recurrent[2]))
    o, _ = _sigmoids(x[3] + recurrent[3])
    return o * (c / n), c, n, m, lost


@triton.jit
def _slstm_step_back(x, recurrent, before, grads):
    """Of i and log(f) + m, the one that is not m gets its gradient from c and n, the other the rest of that of m."""
    less, drop, fresh, _, _ = _slstm_shares(x, recurrent, before, 0.0)
    add = tl.where(fresh, 1.0, less)
    z = _tanh(x[2] + recurrent[2])
    o, not_o = _sigmoids(x[3] + recurrent[3])
    # n and c after the step, again: h = o c / n needs both.
    n = _mix(less, drop, before[2], add)
    mean, by_mean = _mix(less, drop, before[1], add * z) / n, grads[0] * o / n
    dc, dn, dm = grads[1] + by_mean, grads[2] - by_mean * mean, grads[3]
    d = less * tl.where(fresh, dc * before[1] + dn * before[2], dc * z + dn)
    di, d_keep = tl.where(fresh, dm - d, d), tl.where(fresh, d, dm - d)
    _, not_f = _log_sigmoid(x[1] + recurrent[1])
    dx = (di, d_keep * not_f, dc * add * (1.0 - z * z), grads[0] * mean * (o * not_o))
    return dx, dx, (tl.zeros_like(dc), _decay(less, drop, dc), _decay(less, drop, dn), d_keep)


@triton.jit
def _step(x, recurrent, states, CELL: tl.constexpr):
    """States after a step, from those before it."""
    if CELL == "lstm":
        new = _lstm_step(x, recurrent, states)
    elif CELL == "gru":
        new = _gru_step(x, recurrent, states)
    elif CELL == "slstm":
        new = _slstm_step(x, recurrent, states)
    return new


@triton.jit
def _step_back(x, recurrent, before, grads, CELL: tl.constexpr):
    """Gradients of x, of `recurrent`, and of the states before the step but for what comes through R h."""
    if CELL == "lstm":
        new = _lstm_step_back(x, recurrent, before, grads)
    elif CELL == "gru":
        new = _gru_step_back(x, recurrent, before, grads)
    elif CELL == "slstm":
        new = _slstm_step_back(x, recurrent, before, grads)
    return new
