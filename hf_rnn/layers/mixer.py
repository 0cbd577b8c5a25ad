from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_rnn.configuration_recurrent import RecurrentConfig


class RecurrentMixer(nn.Module, ABC):
    """What the recurrences share: the projection to pre-activations, a learned initial state, the output projection.

    An architecture gives `num_projections`, `recurrence` and, where zeros are not it, `initial_bias`.

    Attributes:
        num_projections: pre-activations per channel.
        state_shapes: shape of each state tensor without its batch dimension.
    """

    num_projections: int

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.config = config
        inner = config.inner_size
        self.state_shapes: list[tuple[int, ...]] = [(inner,)]
        self.in_proj = nn.Linear(config.hidden_size, self.num_projections * inner, bias=config.use_bias)
        self.initial_state = nn.Parameter(torch.empty(inner)) if config.learned_initial_state else None
        self.out_proj = (
            nn.Linear(inner, config.hidden_size, bias=config.use_bias) if config.output_projection else nn.Identity()
        )

    @abstractmethod
    def recurrence(
        self, projections: tuple[Tensor, ...], h0: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Pre-activations (B, T, inner_size) and state (N, inner_size) to h (B, T, inner_size) and the last state."""

    def initial_bias(self) -> list[float]:
        """Initial bias of each projection."""
        return [0.0] * self.num_projections

    def init_weights(self) -> None:
        """Initialise what `PreTrainedModel._init_weights` does not know; leaves loaded weights alone."""
        if self.in_proj.bias is not None:
            inner = self.in_proj.out_features // self.num_projections
            bias = torch.tensor(self.initial_bias(), device=self.in_proj.bias.device)
            init.copy_(self.in_proj.bias, bias.repeat_interleave(inner).to(self.in_proj.bias.dtype))
        if self.initial_state is not None:
            init.zeros_(self.initial_state)

    def forward(
        self, x: Tensor, state: tuple[Tensor] | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor]]:
        """(B, T, D) and state to (B, T, D) and the float32 state after it; mask and cu_seqlens as in the ops."""
        projections = self.in_proj(x).chunk(self.num_projections, dim=-1)
        h0 = None if state is None else state[0]
        if h0 is None and self.initial_state is not None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            h0 = self.initial_state.expand(sequences, -1)
        h, last = self.recurrence(projections, h0, mask, cu_seqlens)
        return self.out_proj(h), (last,)
