"""TiRex-2's recurrences over patches: xLSTM-7B's mLSTM, and an sLSTM whose gates see a patch's own head alone."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_rnn.layers import BlockLinear, Mixer, MultiHeadNorm, scan_ahead
from hf_rnn.models.tirex2.configuration_tirex2 import TiRex2Config
from hf_rnn.models.xlstm.mlstm import FORGET_BIASES, MLSTM
from hf_rnn.models.xlstm.slstm import initial_gates
from hf_rnn_kernels import slstm_scan
from hf_rnn_kernels.layout import SequenceLayout
from hf_rnn_kernels.packed_linear import plain


class PatchMLSTM(MLSTM):
    """The mLSTM of xLSTM-7B with input gates that start half open, for series are short."""

    def init_weights(self) -> None:
        biases = torch.cat([0.1 * torch.randn(self.num_heads), torch.linspace(*FORGET_BIASES, self.num_heads)])
        init.copy_(self.gate_proj.bias, biases.to(self.gate_proj.bias))
        init.zeros_(self.gate_proj.weight)
        init.normal_(self.out_proj.weight, std=self.output_std)


class PatchSLSTM(Mixer):
    """norm(h) of an sLSTM whose pre-activations i, f, z, o are linear in x, each head for itself."""

    def __init__(self, config: TiRex2Config, layer_idx: int):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.slstm_heads
        size = width // self.num_heads
        self.ifzo_proj = BlockLinear(self.num_heads, size, 4 * size, bias=False)
        self.recurrent_weight = nn.Parameter(torch.empty(self.num_heads, 4 * size, size))
        self.recurrent_bias = nn.Parameter(torch.empty(4 * width))
        self.norm = MultiHeadNorm(width, config.norm_eps)
        self.state_shapes = [(width,)] * 4
        self.depth = layer_idx / max(config.num_hidden_layers - 1, 1)

    def init_weights(self) -> None:
        init.normal_(self.ifzo_proj.weight, std=(2 / (5 * self.norm.weight.shape[0])) ** 0.5)
        init.zeros_(self.recurrent_weight)
        bias = initial_gates(self.num_heads, self.recurrent_weight.shape[2], self.depth)
        init.copy_(self.recurrent_bias, bias.to(self.recurrent_bias))

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout, ahead: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `Mixer.forward`; the last `ahead` tokens leave the state as it is."""
        weight, bias = plain(self.recurrent_weight), self.recurrent_bias

        def scan(gates, *state_and_layout):
            return slstm_scan(gates, weight, bias, *state_and_layout)

        y, last = scan_ahead(scan, [self.ifzo_proj(x)], state or (None,) * 4, layout, ahead)
        return self.norm(y.unflatten(-1, (self.num_heads, -1))), last
