"""The mLSTM's backward loops on a CPU: see `cpu.py`."""

import numpy as np
from numba import prange

from hf_rnn_kernels.matrix_product import LANES, product
from hf_rnn_kernels.mlstm_scan.cpu_chunks import ROWS, dot, gates, load, sum_of, transpose, triangle, turned, weight
from hf_rnn_kernels.vector_math import F32, ONE, U, exp, parallel, row

_U0, _U1, _LANES = U(0), U(1), U(LANES)
_ZERO = F32(0)


@parallel
def adjoints(sizes, chunks, mask, q_rows, i_and_log_f, m_at, eps, outputs, last, ends, per_token, d_gates):
    """`last`: dC, dn and mu, the adjoint of m, from those of a sequence's last states to its first; `ends` get dC and
    dn of chunk ends, `per_token` 1 / denominator and the gradient of a, `d_gates` what mu gives to i and log f.
    `outputs`: h, the norms, the gradient of h."""
    chunk_size, heads, K, V, reverse = sizes
    first_chunk, start, count = chunks
    (q, q_apart), (h, norms, grad), (dC, dn, mu) = q_rows, outputs, last
    (dC_at, dn_at), (inverses, d_normalizers), (di, d_log_f) = ends, per_token, d_gates
    scale = ONE / np.sqrt(F32(K))
    keys, values = (K + _LANES - _U1) // _LANES * _LANES, (V + _LANES - _U1) // _LANES * _LANES
    for task in prange(U(first_chunk.size - 1) * heads):
        sequence, head = U(task) // heads, U(task) % heads
        qs, numerators = np.empty(chunk_size * keys, np.float32), np.empty(chunk_size * values, np.float32)
        g, top, total = np.empty(chunk_size), np.empty(chunk_size), np.empty(chunk_size)
        c0, n0, m0 = U(task) * keys * values, U(task) * keys, U(task)
        chunks = first_chunk[sequence + _U1] - first_chunk[sequence]
        for back in range(chunks):
            chunk = first_chunk[sequence + _U1] - _U1 - back
            at, token, rows = chunk * heads + head, start[chunk], count[chunk]
            turn = reverse * (rows - _U1)
            for d in range(keys * values):
                dC_at[at * keys * values + d] = dC[c0 + d]
            for d in range(keys):
                dn_at[at * keys + d] = dn[n0 + d]
            load(rows, K, keys, q, (head * K, q_apart), mask, (token, turn), scale, qs)
            load(rows, V, values, grad, (head * V, heads * V), mask, (token, turn), ONE, numerators)
            gates(rows, i_and_log_f, token * heads + head, heads, turn, m_at[at], g, top, total)
            keep = weight(m_at[at] - top[rows - _U1])
            for d in range(keys):
                dn[n0 + d] *= keep
            for d in range(keys * values):
                dC[c0 + d] *= keep
            for later in range(rows):
                r = rows - _U1 - later
                here = (token + turned(r, turn)) * heads + head
                # a and m come from the forward pass: which of the two decided must not be rounded the other way here.
                normalizer, floor = norms[here * U(2)], exp(-norms[here * U(2) + _U1])
                inverse = ONE / (max(abs(normalizer), floor) + eps)
                inner = dot(V, numerators, r * values, h, here * V) * inverse
                above = inner if abs(normalizer) > floor else _ZERO
                inverses[here] = inverse
                d_normalizers[here] = above if normalizer < _ZERO else -above
                mu[m0] -= inner * eps
                # Whether m comes from this token: compared as `gates` did, in float64, on the same numbers.
                if g[r] > (top[r - _U1] if r > _U0 else np.float64(m_at[at])):
                    di[here], d_log_f[here] = mu[m0], _ZERO
                    mu[m0] = _ZERO
                else:
                    di[here], d_log_f[here] = _ZERO, mu[m0]
                from_start = weight(m_at[at] - top[r])
                for d in range(values):
                    numerators[r * values + d] *= from_start * inverse
                for d in range(keys):
                    dn[n0 + d] += from_start * d_normalizers[here] * qs[r * keys + d]
            places = (c0, values)
            product(
                qs, (_U0, _U1, keys), numerators, (_U0, _LANES, values), dC, places, dC, places,
                keys, rows, values // _LANES,
            )  # fmt: skip


@row
def _pairs(r, below, d_normalizer, g, top, w, dw, w0, decay, shares, columns):
    """Row r of Q K^T and of the gradient of W to W and to the gradient of Q K^T; zero beyond the diagonal. `shares`:
    what each pair (r, j) gives to the logarithm of its weight; summed over rows in `columns`."""
    largest = top[r]
    # Three loops, each with few arrays to write, and a select instead of an end at the diagonal: as in `_decays`.
    for j in range(below):
        here = weight(g[j] - largest)
        decay[j] = here if j <= r else _ZERO
    for j in range(below):
        dw[w0 + j] = (dw[w0 + j] + d_normalizer) * decay[j]
        shares[j] = dw[w0 + j] * w[w0 + j]
        w[w0 + j] *= decay[j]
    for j in range(below):
        columns[j] += shares[j]


@parallel
def gradients(sizes, chunks, mask, inputs, i_and_log_f, states_at, grad, ends, per_token, d_inputs, d_gates):
    """Of q, k and v; of i and log f, to what is there. `ends` and `per_token` as `adjoints` left them."""
    chunk_size, heads, K, V, reverse = sizes
    _, start, count = chunks
    (q, q_apart), (k, k_apart), (v, v_apart) = inputs
    (C_at, n_at, m_at), (dC_at, dn_at), (inverses, d_normalizers) = states_at, ends, per_token
    (dq, dk, dv), (di, d_log_f) = d_inputs, d_gates
    scale = ONE / np.sqrt(F32(K))
    keys, values = (K + _LANES - _U1) // _LANES * _LANES, (V + _LANES - _U1) // _LANES * _LANES
    side = chunk_size
    for task in prange(U(start.size) * heads):
        chunk, head, at = U(task) // heads, U(task) % heads, U(task)
        token, rows, c0 = start[chunk], count[chunk], at * keys * values
        turn = reverse * (rows - _U1)
        qs, ks = np.empty(chunk_size * keys, np.float32), np.empty(chunk_size * keys, np.float32)
        vs, numerators = np.empty(chunk_size * values, np.float32), np.empty(chunk_size * values, np.float32)
        # For whichever matrix is transposed next.
        panels = np.empty(max(side * max(keys, values), keys * values), np.float32)
        w, dw = np.empty(chunk_size * side, np.float32), np.empty(chunk_size * side, np.float32)
        dqs, dks = np.empty(chunk_size * keys, np.float32), np.empty(chunk_size * keys, np.float32)
        dvs, nothing = np.empty(chunk_size * values, np.float32), np.zeros(max(side, keys, values), np.float32)
        g, top, total = np.empty(chunk_size), np.empty(chunk_size), np.empty(chunk_size)
        decay, shares = np.empty(chunk_size, np.float32), np.empty(chunk_size, np.float32)
        columns, crossing = np.zeros(chunk_size, np.float32), np.zeros(chunk_size)
        enter, leave = np.empty(chunk_size, np.float32), np.empty(chunk_size, np.float32)
        load(rows, K, keys, q, (head * K, q_apart), mask, (token, turn), scale, qs)
        load(rows, K, keys, k, (head * K, k_apart), mask, (token, turn), ONE, ks)
        load(rows, V, values, v, (head * V, v_apart), mask, (token, turn), ONE, vs)
        load(rows, V, values, grad, (head * V, heads * V), mask, (token, turn), ONE, numerators)
        for r in range(rows):
            for d in range(values):
                numerators[r * values + d] *= inverses[(token + turned(r, turn)) * heads + head]
        gates(rows, i_and_log_f, token * heads + head, heads, turn, m_at[at], g, top, total)

        # Pairs of tokens of this chunk
        transpose(rows, keys, keys, ks, _U0, panels)
        triangle(rows, keys, side, qs, panels, nothing, w)
        transpose(rows, values, values, vs, _U0, panels)
        triangle(rows, values, side, numerators, panels, nothing, dw)
        for r in range(rows):
            here = (token + turned(r, turn)) * heads + head
            _pairs(r, (r // ROWS + _U1) * ROWS, d_normalizers[here], g, top, w, dw, r * side, decay, shares, columns)
            crossing[r] = sum_of(r + _U1, shares, _U0)

        # What the chunk's first state gives to its outputs, and its tokens to the last
        transpose(keys, values, values, C_at, c0, panels)
        product(
            numerators, (_U0, values, _U1), panels, (_U0, values * _LANES, _LANES), nothing, (_U0, _U0),
            dqs, (_U0, keys), rows, values, keys // _LANES,
        )  # fmt: skip
        transpose(keys, values, values, dC_at, c0, panels)
        product(
            vs, (_U0, values, _U1), panels, (_U0, values * _LANES, _LANES), nothing, (_U0, _U0),
            dks, (_U0, keys), rows, values, keys // _LANES,
        )  # fmt: skip
        product(
            ks, (_U0, keys, _U1), dC_at, (c0, _LANES, values), nothing, (_U0, _U0),
            dvs, (_U0, values), rows, keys, values // _LANES,
        )  # fmt: skip
        for r in range(rows):
            from_start, to_end = weight(m_at[at] - top[r]), weight(g[r] - top[rows - _U1])
            d_normalizer = d_normalizers[(token + turned(r, turn)) * heads + head]
            for d in range(keys):
                dqs[r * keys + d] = from_start * (dqs[r * keys + d] + d_normalizer * n_at[at * keys + d])
            for d in range(keys):
                dks[r * keys + d] = to_end * (dks[r * keys + d] + dn_at[at * keys + d])
            for d in range(values):
                dvs[r * values + d] *= to_end
            enter[r] = dot(keys, qs, r * keys, dqs, r * keys)
            leave[r] = dot(keys, ks, r * keys, dks, r * keys)
        through = dot(keys * values, dC_at, c0, C_at, c0) + dot(keys, dn_at, at * keys, n_at, at * keys)
        through *= weight(m_at[at] - top[rows - _U1])

        # Gates: a forget gate counts in every weight that reaches across it
        # Running sums of terms that cancel.
        before = np.float64(through)
        for r in range(rows):
            before += leave[r]
        inside = np.float64(0)
        for later in range(rows):
            r = rows - _U1 - later
            here = (token + turned(r, turn)) * heads + head
            inside += crossing[r] - columns[r]
            before += enter[r] - leave[r]
            di[here] += columns[r] + leave[r]
            d_log_f[here] += F32(before + inside)

        for b in range(_U0, rows, ROWS):
            many = min(ROWS, rows - b)
            # W and the gradient of Q K^T are lower triangles: rows of q end at the diagonal block, rows of k and v
            # begin there.
            to_keys, to_values = (b * keys, keys), (b * values, values)
            product(
                dw, (b * side, side, _U1), ks, (_U0, _LANES, keys), dqs, to_keys, dqs, to_keys,
                many, b + many, keys // _LANES,
            )  # fmt: skip
            product(
                dw, (b * side + b, _U1, side), qs, (b * keys, _LANES, keys), dks, to_keys, dks, to_keys,
                many, rows - b, keys // _LANES,
            )  # fmt: skip
            product(
                w, (b * side + b, _U1, side), numerators, (b * values, _LANES, values), dvs, to_values, dvs, to_values,
                many, rows - b, values // _LANES,
            )  # fmt: skip
        for r in range(rows):
            here = (token + turned(r, turn)) * heads + head
            for d in range(K):
                dq[here * K + d] = dqs[r * keys + d] * scale
            for d in range(K):
                dk[here * K + d] = dks[r * keys + d]
            for d in range(V):
                dv[here * V + d] = dvs[r * values + d]
