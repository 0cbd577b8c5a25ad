"""What reading both ways costs: a layer of both directions beside two layers that both read forwards, and torch.nn's.

    python benchmarks/bidirectional.py

The layers of every architecture, and the bare LSTM and GRU with torch.nn's weights, whose outputs are the same.
"""

import torch
from driver import DEVICE, compare, save, sized, table
from torch import nn

import hf_rnn
from hf_rnn.layers import Bidirectional
from hf_rnn_kernels.layout import SequenceLayout

BATCH, TIME, WIDTH = sized(cpu=(8, 512, 256), gpu=(8, 4096, 1024), dry=(2, 9, 16))
SHORT = sized(64, 64, 4)  # of the memory RNN, whose time is a loop in Python
LAYERS = {
    "LSTM": {},
    "GRU": {},
    "MinGRU": {},
    "MinLSTM": {},
    "XLSTM": {},
    "XLSTM, sLSTM": dict(block_layout="gated", slstm_at=[0]),
    "MemoryRNN": dict(num_memory_tokens=4),
}
BARE = {"LSTM": nn.LSTM, "GRU": nn.GRU}
ACCEPTED = {"torch.nn.LSTM": "the same oneDNN, called once for each direction; what is more is the model around it"}


def work(run, parameters, x: torch.Tensor, grad: torch.Tensor, training: bool):
    """The output, and in training the gradient of x."""

    def step():
        if not training:
            with torch.no_grad():
                return [run(x)]
        y = run(x)
        grads = torch.autograd.grad(y, [x, *parameters], grad, allow_unused=True)
        return [y.detach(), grads[0]]

    return step


def both_and_apart(layer: Bidirectional, x: torch.Tensor, training: bool) -> dict:
    parameters, grad = list(layer.parameters()), torch.randn_like(x)

    def apart(x):
        return layer.forwards(x, None, SequenceLayout())[0] + layer.backwards(x, None, SequenceLayout())[0]

    steps = {
        "hf_rnn, both ways": work(lambda x: layer(x, None, SequenceLayout())[0], parameters, x, grad, training),
        "hf_rnn, two layers forwards": work(apart, parameters, x, grad, training),
    }
    return compare(steps, repeats=60, seconds=6)


def bare(name: str, x: torch.Tensor, training: bool) -> dict:
    rnn = BARE[name](WIDTH, WIDTH, batch_first=True, bidirectional=True).to(DEVICE)
    model = getattr(hf_rnn, f"{name}Model").from_torch(rnn).train(training)
    double = BARE[name](WIDTH, WIDTH, batch_first=True, bidirectional=True).to(DEVICE).double()
    double.load_state_dict(rnn.state_dict())
    grad = torch.randn(*x.shape[:2], 2 * WIDTH, device=DEVICE)
    ours = [p for n, p in model.named_parameters() if "embed" not in n]
    steps = {
        "hf_rnn": work(lambda x: model(inputs_embeds=x).last_hidden_state, ours, x, grad, training),
        f"torch.nn.{name}": work(lambda x: rnn(x)[0], list(rnn.parameters()), x, grad, training),
    }
    y = x.detach().double().requires_grad_()
    expected = work(lambda x: double(x)[0], list(double.parameters()), y, grad.double(), training)()
    return compare(steps, expected, repeats=60, seconds=6, accepted=ACCEPTED)


def main() -> None:
    torch.manual_seed(0)
    results = {}
    for training in (False, True):
        what = "forward + backward" if training else "forward"
        for label, settings in LAYERS.items():
            name = label.split(",")[0]
            config = getattr(hf_rnn, f"{name}Config")(
                hidden_size=WIDTH, num_hidden_layers=1, bidirectional=True, **settings
            )
            layer = getattr(hf_rnn, f"{name}Model")(config).to(DEVICE).layers[0].mixer
            time = SHORT if name == "MemoryRNN" else TIME
            x = torch.randn(BATCH, time, WIDTH, device=DEVICE, requires_grad=True)
            results[f"{label}, {what}, (B, T, D) = {(BATCH, time, WIDTH)}"] = both_and_apart(layer, x, training)
        for name in BARE:
            for batch, time in ((BATCH, TIME), (1, 4 * TIME)):
                x = torch.randn(batch, time, WIDTH, device=DEVICE, requires_grad=True)
                results[f"bare {name}, {what}, (B, T, D) = {(batch, time, WIDTH)}"] = bare(name, x, training)
    for title, rows in results.items():
        table(title, rows)
    save("bidirectional", results)


if __name__ == "__main__":
    main()
