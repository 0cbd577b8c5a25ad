"""What slstm_scan has that LSTM and GRU have not: the stabiliser m, and units that remember nothing yet. The rest is in
`test_recurrent_scan.py`."""

import pytest
import torch
from conftest import relative_error
from ops import test_recurrent_scan as shared
from torch.nn.functional import logsigmoid

from hf_rnn_kernels import slstm_scan


def some_start_from_nothing(leaves):
    """n of 0 for some units of some sequences, beside values of h, c and m that must not matter or overflow."""
    _, _, _, _, c, n, m = leaves
    n[0], n[1, ::2] = 0, 0
    m[0], m[1] = -1000, 1000
    m[1, ::2] = torch.tensor([-1000.0, 1000.0]).repeat(m.shape[1])[: m[1, ::2].numel()]
    m[1, 1::2] = 1
    c[0] = 1e6
    return leaves


@pytest.mark.parametrize("dtype, forward, backward", [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-13, 1e-13)])
@pytest.mark.parametrize("packed", [False, True])
def test_units_that_start_from_nothing_beside_others(packed, dtype, forward, backward):
    """With padding before, between and after; a unit starts at its first token that is none."""
    leaves = some_start_from_nothing(shared.make("slstm", 4, 20, 2, 5))
    mask = torch.rand(4, 20) < 0.7
    mask[0, :3] = False
    mask[1, 15:] = False
    grad, grad_last = shared.cotangents(leaves, 10)
    grad = grad * mask[..., None]  # the loop's output at padding is the state, too, but before its first token
    expected = shared.slstm_float64(leaves, grad, grad_last, mask)
    actual = [t.to(dtype) for t in leaves]
    if packed:
        cu_seqlens, actual[0] = torch.tensor([0, 20, 40, 60, 80]), actual[0].view(1, 80, -1)
        results = shared.run(
            "slstm", actual, grad.view(1, 80, -1).to(dtype), grad_last.to(dtype), mask.view(1, 80), cu_seqlens
        )
        results[0], results[2] = results[0].view(4, 20, -1), results[2].view(4, 20, -1)
    else:
        results = shared.run("slstm", actual, grad.to(dtype), grad_last.to(dtype), mask)
    results[0], expected[0] = results[0] * mask[..., None], expected[0] * mask[..., None]
    for n in range(4):  # one by one: the first sequence's c would hide all others
        shared.check([results[0][n], results[1][:, n]], [expected[0][n], expected[1][:, n]], forward)
    shared.check(results, expected, forward, backward)


def test_gradients_of_a_start_from_nothing():
    """None goes to c, n and m, which do not count; all to h."""
    leaves = shared.make("slstm", 1, 3, 1, 4)
    leaves[5] = leaves[5] * 0
    grads = shared.run("slstm", leaves, *shared.cotangents(leaves, 4))[5:]
    assert grads[0].all() and not any(g.any() for g in grads[1:])


@pytest.mark.parametrize("shift", [-50.0, 0.5, 50.0])
def test_only_m_knows_the_scale(shift):
    """Input gates and m0 larger by a number: so is m, and nothing else differs."""
    x, weight, bias, *initial = shared.make("slstm", 2, 40, 2, 3, dtype=torch.float64)
    h, last = slstm_scan(x, weight, bias, *initial)
    bias.view(2, 4, 3)[:, 0] += shift
    moved_h, moved_last = slstm_scan(x, weight, bias, *initial[:3], initial[3] + shift)
    for a, b in zip((h, *last[:3], last[3] + shift), (moved_h, *moved_last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("input_gate", [-5.0, 0.0])
def test_thousands_of_equal_steps(input_gate):
    """Where the forget gate is m, m is a sum of 4,096 equal terms; where the input gate is, c keeps 3e-4 less than all
    at each step. Both would round the same way every time."""
    leaves = shared.make("slstm", 1, 4096, 1, 3)
    x, weight, bias = leaves[:3]
    x[..., :3], x[..., 3:6] = input_gate, 8.0
    weight[:, :6], bias[:6] = 0, 0
    grads = shared.cotangents(leaves, 3)
    shared.check(shared.run("slstm", leaves, *grads), shared.slstm_float64(leaves, *grads), 3e-6)


def test_a_tie_is_the_forget_gates():
    """Where i = log s(f) + m, m's gradient goes to f and m0."""
    f, zeros = torch.tensor([0.3], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    m0 = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    x = torch.stack([logsigmoid(f) + m0.detach()[0], f, zeros[0], zeros[0]], 1)[None].requires_grad_()
    _, (_, _, _, m) = slstm_scan(x, torch.zeros(1, 4, 1), None, zeros, zeros, zeros + 1, m0)
    grad_x, grad_m0 = torch.autograd.grad(m.sum(), [x, m0])
    expected = torch.stack([zeros[0, 0], (-f).sigmoid()[0], zeros[0, 0], zeros[0, 0]])
    torch.testing.assert_close(grad_x[0, 0], expected)
    torch.testing.assert_close(grad_m0, zeros + 1)


def test_some_initial_states_without_the_others():
    x, weight, bias, h0, c0, n0, m0 = shared.make("slstm", 2, 4, 2, 3)
    for some in ((h0, None, None, None), (None, c0, n0, None), (None, None, n0, m0)):
        all_ = [torch.zeros_like(h0) if s is None else s for s in some]
        for a, b in zip(slstm_scan(x, weight, bias, *some)[1], slstm_scan(x, weight, bias, *all_)[1], strict=True):
            assert torch.equal(a, b)


def test_step_by_step_is_the_scan():
    x, weight, bias, *states = shared.make("slstm", 2, 30, 2, 3)
    h, last = slstm_scan(x, weight, bias, *states)
    steps = []
    for t in range(30):
        h_t, states = slstm_scan(x[:, t : t + 1], weight, bias, *states)
        steps.append(h_t)
    for a, b in zip((torch.cat(steps, 1), *states), (h, *last), strict=True):
        assert relative_error(a, b) <= 2e-6
