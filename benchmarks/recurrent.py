"""How fast are LSTM and GRU, dense against torch.nn's, with heads against a loop over time and against FlashRNN?

    python benchmarks/recurrent.py

Dense: a layer's training step, input projection included. Heads: the recurrence alone, from its pre-activations; beside
it on a CPU "products and activations alone", the arithmetic that nobody can do without, each at once over all tokens;
on a GPU FlashRNN's backends and, at one head, cuDNN. On a GPU everything is bfloat16, else float32.
"""

import torch
from driver import DEVICE, GPU, LIKE_GPU, compare, sized, table
from resumable import Parts
from torch import Tensor, nn

from hf_rnn import GRUConfig, LSTMConfig
from hf_rnn.models.gru.modeling_gru import GRU
from hf_rnn.models.lstm.modeling_lstm import LSTM
from hf_rnn_kernels import gru_scan, lstm_scan
from hf_rnn_kernels.layout import SequenceLayout

DTYPE = torch.bfloat16 if GPU else torch.float32
DENSE = sized(cpu=(8, 512, 384), gpu=(16, 1024, 768), dry=(2, 3, 16))  # batch, time, width
HEADS = sized(*2 * [(16, 1024, 12, 64)], dry=(2, 3, 2, 8))  # batch, time, heads, units of each
TOLERANCE = 5e-2 if GPU else 1e-4
ACCEPTED = {
    "torch.nn.LSTM": "level on a CPU: our loop and oneDNN's kernel, which of them is ahead changes from run to run"
}
CELLS = {"lstm": (LSTM, LSTMConfig, nn.LSTM, lstm_scan, 4), "gru": (GRU, GRUConfig, nn.GRU, gru_scan, 3)}


def step(run, inputs: list[Tensor], grad: Tensor, backward: bool):
    """A contestant: h, and with `backward` the gradients of the inputs, too."""

    def forward():
        with torch.no_grad():
            return [run(*inputs)]

    def both():
        h = run(*inputs)
        return [h.detach(), *torch.autograd.grad(h, inputs, grad)]

    return both if backward else forward


def expected(run, inputs: list[Tensor], grad: Tensor, backward: bool) -> list[Tensor]:
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    return step(run, doubles, grad.double(), backward)()


def dense(cell: str, batch: int, time: int, width: int) -> dict[str, dict]:
    """A layer's training step, or its forward pass, ours and torch.nn's, weights the same."""
    mixer_class, config_class, torch_class = CELLS[cell][:3]
    torch.manual_seed(0)
    settings = dict(hidden_size=width, output_projection=False, learned_initial_state=False)
    ours = mixer_class(config_class(**settings)).to(DEVICE, DTYPE)
    theirs = torch_class(width, width, batch_first=True).to(DEVICE, DTYPE)
    weights = [w.detach().requires_grad_() for w in theirs.parameters()]
    names = ["in_proj.weight", "recurrent_weight", "in_proj.bias", "recurrent_bias"]
    x = torch.randn(batch, time, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    grad = torch.randn(batch, time, width, device=DEVICE, dtype=DTYPE)

    def run_ours(x, *weights):
        weights = dict(zip(names, weights, strict=True))
        weights["recurrent_weight"] = weights["recurrent_weight"][None]
        return torch.func.functional_call(ours, weights, (x, None, SequenceLayout()))[0]

    def run_theirs(x, *weights):
        names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
        return torch.func.functional_call(theirs, dict(zip(names, weights, strict=True)), (x,))[0]

    results = {}
    for backward in (False, True):
        contestants = {
            "hf_rnn": step(run_ours, [x, *weights], grad, backward),
            f"torch.nn.{torch_class.__name__}": step(run_theirs, [x, *weights], grad, backward),
        }
        what = "training step" if backward else "forward"
        title = f"dense {cell} {what}, batch {batch}, {time} tokens, width {width}"
        reference = expected(run_theirs, [x, *weights], grad, backward) if not GPU else None
        results[title] = compare(contestants, reference, TOLERANCE, repeats=15, seconds=6, accepted=ACCEPTED)
        table(title, results[title])
    return results


def loop(cell: str, heads: int, size: int):
    """The recurrence as one writes it in PyTorch: a loop over Wx.unbind(0), which is time-major for it."""
    gates = CELLS[cell][4]

    def run(x, weight, bias):
        h = x.new_zeros(heads, x.shape[2], size)
        c = h
        bias = bias.view(heads, 1, -1)
        steps = []
        for x_t in x.unbind(0):
            recurrent = torch.baddbmm(bias, h, weight.transpose(1, 2))
            if cell == "lstm":
                i, f, g, o = (x_t + recurrent).chunk(gates, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                r, z = (x_t + recurrent)[..., : 2 * size].sigmoid().chunk(2, -1)
                n = (x_t[..., 2 * size :] + r * recurrent[..., 2 * size :]).tanh()
                h = n + z * (h - n)
            steps.append(h)
        return torch.stack(steps)

    return run


def arithmetic(cell: str, tokens: int, heads: int, size: int, backward: bool):
    """Matrix products and activations alone: those of all tokens at once, into memory that is there."""
    gates = CELLS[cell][4]
    h, d = torch.randn(heads, tokens, size), torch.randn(heads, tokens, gates * size)
    weight = torch.randn(heads, size, gates * size)
    back, weight_grad = torch.empty(heads, tokens, size), torch.empty(heads, size, gates * size)
    pre = torch.empty(heads, tokens, gates * size)

    def run():
        torch.bmm(h, weight, out=pre)
        split = (gates - 1) * size
        torch.sigmoid(pre[..., :split], out=pre[..., :split])
        torch.tanh(pre[..., split:], out=pre[..., split:])
        if cell == "lstm":
            torch.tanh(h, out=back)
        if backward:
            torch.bmm(d, weight.transpose(1, 2), out=back)
            torch.bmm(h.transpose(1, 2), d, out=weight_grad)

    return run


def with_heads(cell: str, batch: int, time: int, heads: int, size: int) -> dict[str, dict]:
    scan, gates = CELLS[cell][3:]
    torch.manual_seed(0)
    x = torch.randn(batch, time, heads * gates * size, device=DEVICE, dtype=DTYPE)
    weight = (torch.randn(heads, gates * size, size, device=DEVICE) / (2 * size**0.5)).to(DTYPE)
    bias = torch.randn(heads * gates * size, device=DEVICE).to(DTYPE)
    grad = torch.randn(batch, time, heads * size, device=DEVICE, dtype=DTYPE)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    time_major = x.detach().view(batch, time, heads, -1).permute(1, 2, 0, 3).contiguous().requires_grad_()
    grad_time_major = grad.view(batch, time, heads, size).permute(1, 2, 0, 3).contiguous()

    def by_head(run, *dims):
        """h and the gradient of x as views (B, T, H, ...), by which results are compared."""

        def viewed():
            outputs = run()
            views = [t.permute(dims) if dims else t.unflatten(2, (heads, -1)) for t in outputs[:2]]
            return [*views, *outputs[2:]]

        return viewed

    results = {}
    for backward in (False, True):
        run_loop = step(loop(cell, heads, size), [time_major, *inputs[1:]], grad_time_major, backward)
        contestants = {
            "hf_rnn": by_head(step(lambda *t: scan(*t)[0], inputs, grad, backward)),
            "loop over Wx.unbind(0)": by_head(run_loop, 2, 0, 1, 3),
        }
        if LIKE_GPU:
            contestants |= flash_rnn(cell, x, weight, bias, grad, backward)
        else:
            contestants["products and activations alone"] = arithmetic(cell, batch * time, heads, size, backward)
        reference = by_head(lambda b=backward: expected(lambda *t: scan(*t)[0], inputs, grad, b))()
        what = "forward + backward" if backward else "forward"
        title = f"{cell} {what}, {heads} heads x {size}, batch {batch}, {time} tokens"
        results[title] = compare(contestants, reference, tolerance=TOLERANCE, repeats=10, seconds=5)
        table(title, results[title])
    return results


def flash_rnn(cell: str, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, backward: bool) -> dict:
    """FlashRNN's backends, from its own layout, that of its outputs left as it is."""
    from flashrnn import flashrnn

    heads, rows, size = weight.shape
    gates = rows // size
    Wx = x.detach().view(*x.shape[:2], heads, gates, size).transpose(2, 3).contiguous().requires_grad_()
    R = weight.detach().view(heads, gates, size, size).transpose(0, 1)
    b = bias.detach().view(heads, gates, size).transpose(0, 1)
    if cell == "gru":
        R, b = R[[2, 0, 1]], torch.stack([b[2], b[0], b[1], torch.zeros_like(b[0])])
    inputs = [Wx, R.contiguous().requires_grad_(), b.contiguous().requires_grad_()]
    grad = grad.view(*grad.shape[:2], heads, size)
    contestants = {}
    for backend in ("triton_fused", "cuda_fused") if cell == "lstm" else ("cuda_fused",):
        run = step(
            lambda *t, backend=backend: flashrnn(*t, function=cell, backend=backend, dtype="bfloat16")[0][0],
            inputs, grad, backward,
        )  # fmt: skip
        contestants[f"flashrnn {backend}"] = lambda run=run: run() and None
    return contestants


def main() -> None:
    parts, results = Parts("recurrent"), {}
    for cell in CELLS:
        results |= parts.run(f"dense {cell}", dense, cell, *DENSE) or {}
        results |= parts.run(f"{cell} with heads", with_heads, cell, *HEADS) or {}
    parts.finish(results)


if __name__ == "__main__":
    main()
