"""How fast are the scans, against minGRU-pytorch's parallel scan and against the memory traffic of torch.add?

    python benchmarks/scan.py

Forward and forward + backward, float32, on the GPU where there is one, else on the CPU.
"""

import torch
from driver import compare, save, table
from minGRU_pytorch.minGRU import heinsen_associative_scan_log, log_g
from torch import Tensor
from torch.nn.functional import softplus

from hf_rnn_kernels import linear_scan, min_gru_scan, min_lstm_scan
from hf_rnn_kernels.gated_scan import reference

SHAPES = [(8, 512, 384), (1, 4096, 384), (4, 4096, 1024)]


def peer_scan(a: Tensor, b: Tensor) -> Tensor:
    """minGRU-pytorch's parallel scan; b must be positive."""
    return heinsen_associative_scan_log(a.log(), b.log())


def peer_min_gru(gate: Tensor, candidate: Tensor) -> Tensor:
    """minGRU-pytorch's minGRU from its pre-activations on, as in its forward."""
    return heinsen_associative_scan_log(-softplus(gate), -softplus(-gate) + log_g(candidate))


def peer_min_lstm(forget: Tensor, input_: Tensor, candidate: Tensor) -> Tensor:
    """minGRU-pytorch's minLSTM from its pre-activations on, as in its forward."""
    difference = softplus(-forget) - softplus(-input_)
    return heinsen_associative_scan_log(-softplus(difference), -softplus(-difference) + log_g(candidate))


OPS = {
    "linear_scan": ("linear", lambda *x: linear_scan(*x)[0], peer_scan),
    "min_gru_scan": ("min_gru+g", lambda *x: min_gru_scan(*x)[0], peer_min_gru),
    "min_lstm_scan": ("min_lstm+g+normalize", lambda *x: min_lstm_scan(*x)[0], peer_min_lstm),
}


def forward(run, inputs):
    def measure():
        with torch.no_grad():
            return [run(*inputs)]

    return measure


def forward_backward(run, inputs, grad):
    leaves = [x.clone().requires_grad_() for x in inputs]

    def measure():
        h = run(*leaves)
        return [h.detach(), *torch.autograd.grad(h, leaves, grad)]

    return measure


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for shape in SHAPES:
        for name, (gates, ours, peer) in OPS.items():
            torch.manual_seed(0)
            inputs = [torch.randn(shape, device=device) for _ in range(3 if name == "min_lstm_scan" else 2)]
            if name == "linear_scan":
                inputs = [x.sigmoid() for x in inputs]
            grad, out = torch.randn(shape, device=device), torch.empty(shape, device=device)
            double = [x.double() for x in inputs]
            h, last = reference.scan(gates, double)
            grads, _ = reference.scan_backward(
                gates, double, None, None, None, h, grad.double(), torch.zeros_like(last)
            )
            expected = [h, *grads.unbind(2)]
            add = {"torch.add(a, b, out=...)": lambda x=inputs, out=out: (torch.add(x[0], x[1], out=out), None)[1]}
            for what, wrap, reference_values, extra in [
                ("forward", lambda f, x=inputs: forward(f, x), expected[:1], add),
                ("forward + backward", lambda f, x=inputs, g=grad: forward_backward(f, x, g), expected, {}),
            ]:
                contestants = {"hf_rnn": wrap(ours), "minGRU-pytorch": wrap(peer), **extra}
                # minGRU-pytorch's gradients are off by 1e-2 from T = 4,096 on: timed all the same, the error is shown
                few = shape[2] > 1000  # seconds a run
                rows = compare(contestants, reference_values, 5e-2, repeats=5 if few else 15, warmup=1 if few else 2)
                title = f"{name} {what}, (B, T, D) = {shape}"
                table(title, rows)
                results[title] = rows
    save("scan", results)


if __name__ == "__main__":
    main()
