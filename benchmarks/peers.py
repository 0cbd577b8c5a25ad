"""The same architecture by others, with the weights of ours.

minGRU-pytorch's and torch.nn's layers stand in our frame: embedding, norms, residuals and head are the same. xLSTM is
transformers' own class.
"""

import copy
import importlib.util
import tempfile

import torch
from models import LAYERS, width
from torch import nn
from transformers import PreTrainedModel

import hf_rnn
from hf_rnn.models.xlstm.transformers_config import to_transformers_config

# transformers' class changes when the `xlstm` package is there: this asks for its own
_find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "xlstm" else _find_spec(name, *rest)
from transformers import xLSTMForCausalLM  # noqa: E402

importlib.util.find_spec = _find_spec
from minGRU_pytorch.minGRU import minGRU  # noqa: E402
from minGRU_pytorch.minLSTM import minLSTM  # noqa: E402

# What the peers' layers have: no biases in minGRU-pytorch, no output projection, states that begin with zeros
_PAPER = dict(block_layout="paper", output_projection=False, learned_initial_state=False)
FRAMES = {
    "minGRU": _PAPER | dict(use_bias=False),
    "minLSTM": _PAPER | dict(use_bias=False),
    "LSTM": _PAPER,
    "GRU": _PAPER,
}
PEERS = {
    "minGRU": "minGRU-pytorch",
    "minLSTM": "minGRU-pytorch",
    "LSTM": "torch.nn.LSTM",
    "GRU": "torch.nn.GRU",
    "xLSTM": "transformers",
}


class PeerMixer(nn.Module):
    """A layer of another package in place of our mixer; its state is one more tuple."""

    def __init__(self, ours: nn.Module, name: str):
        super().__init__()
        self.name, size = name, ours.in_proj.in_features
        self.state_shapes = ours.state_shapes
        if name in ("LSTM", "GRU"):
            self.layer = getattr(nn, name)(size, size, batch_first=True)
            self.layer.load_state_dict(
                {
                    "weight_ih_l0": ours.in_proj.weight,
                    "weight_hh_l0": ours.recurrent_weight[0],
                    "bias_ih_l0": ours.in_proj.bias,
                    "bias_hh_l0": ours.recurrent_bias,
                }
            )
        elif name == "minGRU":
            self.layer = minGRU(size)
            gate, candidate = ours.in_proj.weight.detach().chunk(2)
            self.layer.to_hidden_and_gate.weight.data = torch.cat([candidate, gate])
        else:
            self.layer = minLSTM(size)
            forget, input_, candidate = ours.in_proj.weight.detach().chunk(3)
            self.layer.to_hidden_and_f_i_gate.weight.data = torch.cat([candidate, forget, input_])

    def forward(self, x, state, layout):
        if self.name in ("LSTM", "GRU"):
            hx = None if state is None else tuple(s[None] for s in state)
            y, last = self.layer(x, hx if self.name == "LSTM" or hx is None else hx[0])
            return y, tuple(s[0] for s in (last if self.name == "LSTM" else (last,)))
        if state is None and not torch.is_grad_enabled():
            y, last = self.layer(x, return_next_prev_hidden=True)
            return y, (last[:, 0],)
        if state is None:
            return self.layer(x), ()
        y, last = self.layer(x, state[0][:, None], return_next_prev_hidden=True)
        return y, (last[:, 0],)


def pair(name: str, parameters: int, vocab_size: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Ours, and the same by `PEERS[name]`."""
    torch.manual_seed(0)
    tokens = dict(vocab_size=vocab_size, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    layout = f"{name}, paper" if name in FRAMES else name
    size = dict(hidden_size=width(layout, parameters, vocab_size), num_hidden_layers=LAYERS)
    if name == "xLSTM":
        size["hidden_size"] = max(128, size["hidden_size"] // 128 * 128)  # theirs fails at others
        return xlstm_pair(hf_rnn.XLSTMConfig(num_heads=4, **size, **tokens))
    stem = name.replace("min", "Min")
    config = getattr(hf_rnn, f"{stem}Config")(**FRAMES[name], **size, **tokens)
    ours = getattr(hf_rnn, f"{stem}ForCausalLM")(config)
    theirs = copy.deepcopy(ours)
    for layer in theirs.model.layers:
        layer.mixer = PeerMixer(layer.mixer, name)
    return ours, theirs


def xlstm_pair(config: hf_rnn.XLSTMConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Ours, read from a checkpoint of transformers' own class, and that."""
    theirs = xLSTMForCausalLM(to_transformers_config(config))
    with torch.no_grad():
        for parameter in theirs.parameters():  # their own initial weights leave parts at zero
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.add_(0.01)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return hf_rnn.XLSTMForCausalLM.from_pretrained(folder), theirs
