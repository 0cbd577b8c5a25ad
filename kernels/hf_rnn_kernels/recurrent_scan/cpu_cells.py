"""The cells on a CPU, for numba: one sequence's row of one head at a time, one step forward and one back each.

`s` is scratch, SLOTS * P floats a row that begin at `s0` with R h + b; `x0` is where the pre-activations begin. What
the loops write is scratch and states; tensors are filled by copies, since LLVM gives up on a loop over too many arrays
that might overlap: it checks at most 8 pairs of them, of which one at least is written.
"""

from hf_rnn_kernels.vector_math import F32, HALF, ONE, U, decay, inline, keep_and_drop, log_sigmoid, row, sigmoids, tanh

LSTM, GRU, SLSTM = range(3)
KINDS = {"lstm": LSTM, "gru": GRU, "slstm": SLSTM}
# Up to four gates, and 1 - f or 1 - z; of a GRU R_n h + b_n is one.
SLOTS = 5
_NEVER = F32(-float("inf"))  # added to what may be NaN, which stays one


@row
def lstm_gates(size, x, x0, s, s0):
    """R h + b in scratch to i, f, tanh(g), o, 1 - f."""
    f, g, o, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        s[s0 + d] = sigmoids(s[s0 + d] + x[x0 + d])[1]
    for d in range(size):
        s[drop + d], s[f + d] = sigmoids(s[f + d] + x[x0 + size + d])
    for d in range(size):
        s[g + d] = tanh(s[g + d] + x[x0 + U(2) * size + d])
    for d in range(size):
        s[o + d] = sigmoids(s[o + d] + x[x0 + U(3) * size + d])[1]


@row
def lstm_step(size, s, s0, h, c, at):
    f, g, o, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        add = s[s0 + d] * s[g + d]
        # With a forget gate at sigmoid(8) the last states are off by 6e-7 after 4,096 steps; torch.nn's by 2.4e-5.
        slow = c[at + d] + (add - s[drop + d] * c[at + d])
        new = slow if s[drop + d] < HALF else s[f + d] * c[at + d] + add
        c[at + d] = new
        h[at + d] = s[o + d] * tanh(new)


@row
def lstm_step_back(size, s, s0, before, b0, after, a0, grad, grad0, dh, dc, at):
    """Gates in scratch to the gradients of their pre-activations; dh, dc from after the step to before it."""
    f, g, o, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        # Again from c, which is kept, instead of a second tensor.
        tanh_c = tanh(after[a0 + d])
        dh_t = dh[at + d] + grad[grad0 + d]
        dc[at + d] += dh_t * s[o + d] * (ONE - tanh_c * tanh_c)
        dh[at + d] = F32(0)
        s[o + d] = dh_t * tanh_c * s[o + d] * (ONE - s[o + d])
    for d in range(size):
        gate_i, gate_g = s[s0 + d], s[g + d]
        s[s0 + d] = dc[at + d] * gate_g * gate_i * (ONE - gate_i)
        s[g + d] = dc[at + d] * gate_i * (ONE - gate_g * gate_g)
    for d in range(size):
        dc_t = dc[at + d]
        dc[at + d] = decay(s[f + d], s[drop + d], dc_t)
        s[f + d] = dc_t * before[b0 + d] * s[f + d] * s[drop + d]


@row
def gru_gates(size, x, x0, s, s0):
    """R h + b in scratch to r, z, R_n h + b_n as it was, n, 1 - z."""
    z, hn, n, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        s[s0 + d] = sigmoids(s[s0 + d] + x[x0 + d])[1]
    for d in range(size):
        s[drop + d], s[z + d] = sigmoids(s[z + d] + x[x0 + size + d])
    for d in range(size):
        s[n + d] = tanh(x[x0 + U(2) * size + d] + s[s0 + d] * s[hn + d])


@row
def gru_step(size, s, s0, h, at):
    z, n, drop = s0 + size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        # As in `lstm_step`: 1.2e-6 after 4,096 steps, torch.nn 4.0e-5.
        step = s[n + d] - h[at + d]
        h[at + d] = h[at + d] + s[drop + d] * step if s[drop + d] < HALF else s[n + d] - s[z + d] * step


@row
def gru_step_back(size, s, s0, before, b0, grad, grad0, dh, at):
    """As `lstm_step_back`: to the gradients of r, z, R_n h + b_n and n."""
    z, hn, n, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        dh_t = dh[at + d] + grad[grad0 + d]
        r, new = s[s0 + d], s[n + d]
        dn = dh_t * s[drop + d] * (ONE - new * new)
        dh[at + d] = decay(s[z + d], s[drop + d], dh_t)
        s[s0 + d] = dn * s[hn + d] * r * (ONE - r)
        s[z + d] = dh_t * (before[b0 + d] - new) * s[z + d] * s[drop + d]
        s[hn + d] = dn * r
        s[n + d] = dn


@row
def slstm_gates(size, x, x0, s, s0):
    """R h + b in scratch to i, log(f), tanh(z), o, 1 - f."""
    f, z, o, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        s[s0 + d] = s[s0 + d] + x[x0 + d]
    for d in range(size):
        s[f + d], s[drop + d] = log_sigmoid(s[f + d] + x[x0 + size + d])
    for d in range(size):
        s[z + d] = tanh(s[z + d] + x[x0 + U(2) * size + d])
    for d in range(size):
        s[o + d] = sigmoids(s[o + d] + x[x0 + U(3) * size + d])[1]


@inline
def _shares(gap):
    """What is kept of c and n, 1 - that, and what is added, for gap = log(f) + m_{t-1} - i."""
    # Not one helper for the whole step, as in Triton: giving `keep` and `less` from it stopped the vectoriser, 3 times
    # slower.
    keep, drop = keep_and_drop(-abs(gap))
    fresh = gap < F32(0)
    return keep if fresh else ONE, drop if fresh else F32(0), ONE if fresh else keep


@inline
def _mix(keep, drop, x, add):
    """keep * x + add; as `decay`."""
    return x + (add - drop * x) if drop < HALF else keep * x + add


@row
def slstm_step(size, s, s0, h, rest, at, apart):
    """c, n, m and what rounding took from m lie `apart` in `rest`, the first at `at`, as h in `h`.

    Without the last, a constant forget gate would be rounded the same way at each step, off by 1e-4 after thousands.
    """
    f, z, o, gap = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    c, n, m, lost = at, at + apart, at + U(2) * apart, at + U(3) * apart
    for d in range(size):
        new = (rest[m + d] - s[s0 + d]) + (s[f + d] + rest[lost + d])
        s[gap + d] = s[s0 + d] + _NEVER if rest[n + d] == F32(0) else new
    for d in range(size):
        before, add = rest[m + d], s[f + d] + rest[lost + d]
        # Where the gate keeps all, m alone moves, by an amount rounded alike each time: off by 2.5e-4 after 4,096
        # steps, with what rounding lost carried along 1.5e-6.
        kept = before + add
        rest[m + d] = s[s0 + d] if s[gap + d] < F32(0) else kept
        rest[lost + d] = F32(0) if s[gap + d] < F32(0) else add - (kept - before)
    for d in range(size):
        keep, drop, add = _shares(s[gap + d])
        rest[n + d] = _mix(keep, drop, rest[n + d], add)
        rest[c + d] = _mix(keep, drop, rest[c + d], add * s[z + d])
    for d in range(size):
        # No zero: from an empty state on n is 1 at least, as one of the two shares is 1.
        h[at + d] = s[o + d] * rest[c + d] / rest[n + d]


@row
def slstm_step_back(size, s, s0, before, b_places, after, a_places, grad, grad0, dh, rest, places):
    """As `lstm_step_back`; places are those of c and how far n and m lie apart: before and after the step, and of the
    gradients, which are in `rest`."""
    (b0, b_apart), (a0, a_apart), (at, apart) = b_places, a_places, places
    f, z, o, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    dc, dn, dm = at, at + apart, at + U(2) * apart
    for d in range(size):
        gap = (before[b0 + U(2) * b_apart + d] - s[s0 + d]) + s[f + d]
        s[f + d] = s[s0 + d] + _NEVER if before[b0 + b_apart + d] == F32(0) else gap
    for d in range(size):
        dh[at + d] = (dh[at + d] + grad[grad0 + d]) * s[o + d] / after[a0 + a_apart + d]
    for d in range(size):
        by_mean = dh[at + d] * after[a0 + d]
        s[o + d] = by_mean * (ONE - s[o + d])
        rest[dn + d] -= by_mean / after[a0 + a_apart + d]
    for d in range(size):
        rest[dc + d] += dh[at + d]
        dh[at + d] = F32(0)
    for d in range(size):  # of i and log(f) + m, the one that is not m
        keep, _, add = _shares(s[f + d])
        d_keep = keep * (rest[dc + d] * before[b0 + d] + rest[dn + d] * before[b0 + b_apart + d])
        d_add = add * (rest[dc + d] * s[z + d] + rest[dn + d])
        s[s0 + d] = d_keep if s[f + d] < F32(0) else d_add
    for d in range(size):
        keep, gone, add = _shares(s[f + d])
        s[z + d] = rest[dc + d] * add * (ONE - s[z + d] * s[z + d])
        rest[dc + d] = decay(keep, gone, rest[dc + d])
        rest[dn + d] = decay(keep, gone, rest[dn + d])
    for d in range(size):  # and the other gets the rest of the gradient of m
        one, other = s[s0 + d], rest[dm + d] - s[s0 + d]
        fresh = s[f + d] < F32(0)
        rest[dm + d] = one if fresh else other
        s[s0 + d] = other if fresh else one
    for d in range(size):
        s[f + d] = rest[dm + d] * s[drop + d]


@inline
def step(kind, size, x, x0, s, s0, h, rest, at, apart):
    """One step: h, and the other states, `apart` in `rest`, from before it to after it."""
    if kind == LSTM:
        lstm_gates(size, x, x0, s, s0)
        lstm_step(size, s, s0, h, rest, at)
    elif kind == GRU:
        gru_gates(size, x, x0, s, s0)
        gru_step(size, s, s0, h, at)
    elif kind == SLSTM:
        slstm_gates(size, x, x0, s, s0)
        slstm_step(size, s, s0, h, rest, at, apart)


@inline
def step_back(kind, size, x, s, h_before, before, after, grad, dh, d_rest, offsets, b_places, a_places, places):
    """One step back: R h + b in scratch to its gradients, gate by gate, and behind them those of x that are not the
    same; dh and `d_rest` from after the step to before it, but for what comes through R h. `offsets` are where x,
    scratch, h before the step and the gradient of h begin; of the other states before and after the step, and of the
    gradients of states, places are where they begin and how far apart they lie."""
    x0, s0, h0, grad0 = offsets
    if kind == LSTM:
        lstm_gates(size, x, x0, s, s0)
        lstm_step_back(size, s, s0, before, b_places[0], after, a_places[0], grad, grad0, dh, d_rest, places[0])
    elif kind == GRU:
        gru_gates(size, x, x0, s, s0)
        gru_step_back(size, s, s0, h_before, h0, grad, grad0, dh, places[0])
    elif kind == SLSTM:
        slstm_gates(size, x, x0, s, s0)
        slstm_step_back(size, s, s0, before, b_places, after, a_places, grad, grad0, dh, d_rest, places)
