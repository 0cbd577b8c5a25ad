"""minGRU against GRU and minLSTM against LSTM, the comparison of "Were RNNs All We Needed?" (arXiv 2410.01201).

    python benchmarks/min_against_traditional.py

Training step (forward and backward) of one layer, batch 64, width 64, against the traditional cell run step by step, as
the paper does, and against our fused one; and parameters at expansions 1, 2 and 4, biases and output projections aside.
Published, on a T4: 175 and 235 times as fast at T = 512, over 1,300 times at T = 4,096; 87% and 85% fewer parameters.
"""

import copy

import torch
from driver import DEVICE, compare, sized, table
from resumable import Parts
from torch import nn

import hf_rnn
from hf_rnn.models.gru.modeling_gru import GRU
from hf_rnn.models.lstm.modeling_lstm import LSTM
from hf_rnn.models.mingru.modeling_mingru import MinGRU
from hf_rnn.models.minlstm.modeling_minlstm import MinLSTM
from hf_rnn_kernels.layout import SequenceLayout

BATCH, WIDTH, TIMES = sized(*2 * [(64, 64, (512, 4096))], dry=(2, 16, (3,)))
WHY = "this package's own traditional cell: on few cores 64 sequences are work enough for a loop over time"
ACCEPTED = {"GRU, fused": WHY, "LSTM, fused": WHY}
PAIRS = {
    "minGRU and GRU": ((hf_rnn.MinGRUConfig, MinGRU), (hf_rnn.GRUConfig, GRU), nn.GRUCell),
    "minLSTM and LSTM": ((hf_rnn.MinLSTMConfig, MinLSTM), (hf_rnn.LSTMConfig, LSTM), nn.LSTMCell),
}


def layer(config_class, mixer_class, **settings) -> nn.Module:
    torch.manual_seed(0)
    mixer = mixer_class(config_class(hidden_size=WIDTH, learned_initial_state=False, **settings))
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return mixer.to(DEVICE)


def step_by_step(cell: nn.Module):
    def run(x):
        state, outputs = None, []
        for x_t in x.unbind(0):
            state = cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)

    return run


def training_step(run, module: nn.Module, x: torch.Tensor):
    parameters = list(module.parameters())

    def step():
        y = run(x)
        return [y.detach(), *torch.autograd.grad(y.sum(), [x, *parameters])]

    return step


def mixer_step(mixer: nn.Module, x: torch.Tensor):
    return training_step(lambda x: mixer(x, None, SequenceLayout())[0], mixer, x)


def cell_step(cell: nn.Module, x: torch.Tensor):
    return training_step(step_by_step(cell), cell, x)


def in_float64(make, module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return make(copy.deepcopy(module).double(), x.detach().double().requires_grad_())()


def count(mixer: nn.Module) -> int:
    names = ("in_proj.weight", "recurrent_weight")
    return sum(p.numel() for name, p in mixer.named_parameters() if name in names)


def training_steps(pair: str, time: int) -> dict[str, dict]:
    ours, traditional, cell_class = PAIRS[pair]
    x = torch.randn(BATCH, time, WIDTH, device=DEVICE, requires_grad=True)
    minimal, fused = (layer(*p, output_projection=False) for p in (ours, traditional))
    cell = cell_class(WIDTH, WIDTH, device=DEVICE)
    time_major = x.detach().transpose(0, 1).contiguous().requires_grad_()
    name = traditional[1].__name__
    made = {
        "hf_rnn": (mixer_step, minimal, x),
        f"{name}, fused": (mixer_step, fused, x),
        f"{name}, step by step": (cell_step, cell, time_major),
    }
    contestants = {what: make(module, x) for what, (make, module, x) in made.items()}
    references = {what: in_float64(*parts) for what, parts in made.items()}
    title = f"{pair}: training step, {time} tokens, batch {BATCH}, width {WIDTH}"
    rows = compare(contestants, references, 1e-3, seconds=8, accepted=ACCEPTED)
    table(title, rows)
    return {title: rows}


def main() -> None:
    parts, results = Parts("min_against_traditional"), {}
    for pair, (ours, traditional, _) in PAIRS.items():
        for time in TIMES:
            results |= parts.run(f"{pair}, {time}", training_steps, pair, time) or {}
        print(f"\n{pair}: parameters")
        for expansion in (1, 2, 4):
            small, large = (count(layer(*p, expansion_factor=expansion)) for p in (ours, traditional))
            print(f"  expansion {expansion}: {small:7,} and {large:9,}: {100 * (small / large - 1):.0f}%")
            results[f"{pair}: parameters, expansion {expansion}"] = {
                "minimal": small,
                "traditional": large,
                "fewer": 1 - small / large,
            }
    parts.finish(results)


if __name__ == "__main__":
    main()
