"""What the layers around a recurrence cost in training: RMSNorm and the causal convolution against torch's own.

python benchmarks/layers.py
"""

import torch
from driver import DEVICE, compare, save, sized, table
from torch import nn

from hf_rnn.layers import CausalConv, RMSNorm
from hf_rnn_kernels.layout import SequenceLayout

BATCH, TIME, WIDTH = sized(cpu=(8, 512, 384), gpu=(8, 4096, 1024), dry=(2, 9, 16))
KERNEL = 4


def training_step(run, module: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    def step():
        y = run(x)
        grads = torch.autograd.grad(y, [x, *module.parameters()], grad)
        return [y.detach(), grads[0]]

    return step


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(BATCH, TIME, WIDTH, device=DEVICE, requires_grad=True)
    grad = torch.randn_like(x)
    shape, results = f"forward + backward, (B, T, D) = {(BATCH, TIME, WIDTH)}", {}

    norms = {"hf_rnn": RMSNorm(WIDTH, eps=1e-6), "torch.nn.RMSNorm": nn.RMSNorm(WIDTH, eps=1e-6)}
    norms = {name: norm.to(DEVICE) for name, norm in norms.items()}
    steps = {name: training_step(norm, norm, x, grad) for name, norm in norms.items()}
    layer_norm = training_step(layer := nn.LayerNorm(WIDTH).to(DEVICE), layer, x, grad)
    steps["torch.nn.LayerNorm, other work"] = lambda: layer_norm() and None
    doubles = [t.detach().double().requires_grad_() for t in (x, grad)]
    expected = training_step(double := nn.RMSNorm(WIDTH, eps=1e-6).to(DEVICE).double(), double, *doubles)()
    results[f"RMSNorm {shape}"] = compare(steps, expected, repeats=200, seconds=5)

    conv = nn.Conv1d(WIDTH, WIDTH, KERNEL, groups=WIDTH, padding=KERNEL - 1).to(DEVICE)
    ours = CausalConv(WIDTH, KERNEL).to(DEVICE)
    with torch.no_grad():
        ours.weight.copy_(conv.weight[:, 0])
        ours.bias.copy_(conv.bias)
    steps = {
        "hf_rnn": training_step(lambda x: ours(x, None, SequenceLayout())[0], ours, x, grad),
        "torch.nn.Conv1d, grouped": training_step(
            lambda x: conv(x.transpose(1, 2))[..., :TIME].transpose(1, 2), conv, x, grad
        ),
    }
    double = conv.double()
    expected = training_step(lambda x: double(x.transpose(1, 2))[..., :TIME].transpose(1, 2), double, *doubles)()
    conv.float()
    results[f"causal convolution of width {KERNEL} {shape}"] = compare(steps, expected, repeats=200, seconds=5)
    for title, rows in results.items():
        table(title, rows)
    save("layers", results)


if __name__ == "__main__":
    main()
