from types import NoneType

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_rnn.layers.mixer import RecurrentMixer
from hf_rnn_kernels.transforms import transforming


class MultiHeadMixer(RecurrentMixer):
    """What recurrences whose gates see the state share: recurrent weights, block-diagonal over heads.

    Parameters lie head by head, within a head gate by gate; with one head, as in torch.nn's `weight_ih`, `weight_hh`,
    `bias_ih` and `bias_hh` (see `hf_rnn.exchange.gate_order`).
    """

    def __init__(self, config):
        super().__init__(config)
        heads, size = config.num_heads, config.inner_size // config.num_heads
        self.recurrent_weight = nn.Parameter(torch.empty(heads, self.num_projections * size, size))
        biases = self.num_projections * config.inner_size
        self.recurrent_bias = nn.Parameter(torch.empty(biases)) if config.use_bias else None

    def init_weights(self) -> None:
        """Each gate's matrix of each head orthogonal, which keeps norms over many steps (Saxe et al., 1312.6120)."""
        super().init_weights()
        if not getattr(self.recurrent_weight, "_is_hf_initialized", False):
            size = self.recurrent_weight.shape[2]
            weight = torch.empty(self.config.num_heads * self.num_projections, size, size)
            for matrix in weight:
                nn.init.orthogonal_(matrix)
            init.copy_(self.recurrent_weight, weight.view_as(self.recurrent_weight).to(self.recurrent_weight))
        if self.recurrent_bias is not None:
            init.zeros_(self.recurrent_bias)

    def to_states(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.tanh(tokens[0]), *tokens[1:]  # h, and an LSTM's c

    def library_applies(
        self, x: Tensor, state: tuple[Tensor | None, ...], mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> bool:
        """Whether torch's own recurrence (oneDNN, cuDNN) can take this call: one head, no padding, no packing.

        It takes x and the weights themselves, so the input projection must be a bare linear layer, no adapter, no
        hook, and the weights plain tensors: not perturbed, quantized or sharded. It takes states in its own dtype
        alone: a float32 state in front of bfloat16 would be rounded. Not for a single step, for which it packs its
        weights anew (see `cell_applies`), not under torch.compile or torch.export, which would unroll it, and not
        under torch.func's transforms, for which it has no batching rule.
        """
        if x.shape[1] < 2 or x.shape[0] == 0 or not self._is_plain(mask, cu_seqlens):
            return False
        dtype = torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype
        return all(s is None or s.dtype == dtype for s in state)

    def cell_applies(
        self, x: Tensor, state: tuple[Tensor | None, ...], mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> bool:
        """Whether torch's own cell can take this step: as `library_applies`, from a state in the dtype of x."""
        return (
            x.shape[1] == 1
            and state[0] is not None
            and not _autocasts(x)
            and self._is_plain(mask, cu_seqlens)
            and x.dtype == state[0].dtype == self.in_proj.weight.dtype
        )

    def cell_arguments(self) -> tuple:
        """What `torch.lstm_cell` and `torch.gru_cell` take after x and state."""
        return self.in_proj.weight, self.recurrent_weight[0], self.in_proj.bias, self.recurrent_bias

    def _is_plain(self, mask: Tensor | None, cu_seqlens: Tensor | None) -> bool:
        projection = self.in_proj
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooked = "forward" in vars(projection) or any(getattr(projection, name) for name in hooks)
        bare = type(projection) is nn.Linear and not hooked
        weights = (projection.weight, projection.bias, self.recurrent_weight, self.recurrent_bias)
        dense = bare and all(type(w) in (nn.Parameter, Tensor, NoneType) for w in weights)
        simple = mask is None and cu_seqlens is None and self.config.num_heads == 1
        return dense and simple and not torch.compiler.is_compiling() and not transforming()

    def library_arguments(self, x: Tensor, state: tuple[Tensor | None, ...]) -> tuple:
        """State (1, B, D) each, in the dtype of x, and the rest of what `torch.lstm` and `torch.gru` take after x."""
        zeros = x.new_zeros(x.shape[0], self.config.inner_size)
        states = [(zeros if s is None else s.to(x.dtype))[None].contiguous() for s in state]
        weights = [self.in_proj.weight, self.recurrent_weight[0]]
        if self.recurrent_bias is not None:
            weights += [self.in_proj.bias, self.recurrent_bias]
        train = torch.is_grad_enabled()  # cuDNN keeps what its backward needs only if so; there is no dropout
        # has_biases, num_layers, dropout, train, bidirectional, batch_first
        return states, weights, self.recurrent_bias is not None, 1, 0.0, train, False, True

    @staticmethod
    def to_state_dtype(state: Tensor) -> Tensor:
        """In float32, or float64."""
        return state.to(torch.promote_types(state.dtype, torch.float32))


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # the meta device has none
