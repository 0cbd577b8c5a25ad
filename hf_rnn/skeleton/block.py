"""A block is pre-norm residual: x += conv(x), x += mixer(norm(x)), x += feed_forward(norm(x)), the first and the last
where the configuration has them."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_rnn.layers import Bidirectional, CausalConv, Mixer
from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn_kernels.fused_step.program import Op, Program, Vector
from hf_rnn_kernels.layout import ROWS, SequenceLayout


class RecurrentBlock(GradientCheckpointingLayer):
    """One block of parts that `RecurrentModel.make_block` chooses; all but the mixer may be missing."""

    def __init__(
        self,
        layer_idx: int,
        mixer: Mixer,
        mixer_norm: nn.Module | None = None,
        conv: CausalConv | Bidirectional | None = None,
        ff_norm: nn.Module | None = None,
        ff: nn.Module | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.layer_idx = layer_idx
        self.conv = conv
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.ff_norm = ff_norm
        self.ff = ff
        self.dropout = nn.Dropout(dropout)
        self.state_shapes = list(mixer.state_shapes) + ([conv.state_shape] if isinstance(conv, CausalConv) else [])

    def forward(self, x: Tensor, layout: SequenceLayout = ROWS, cache: RecurrentCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); reads and writes its layer's state in `cache` where there is one."""
        state = None if cache is None else cache[self.layer_idx]
        if layout.continues is not None and not self.mixer.keeps_rows:
            state = self._of_sequences(state, layout)
        new_state: tuple[Any, ...] = ()
        if self.conv is not None:
            y, conv_state = self.conv(x, None if state is None else state[-1], layout)
            x = x + self._drop(y)
            state = None if state is None else state[:-1]
            new_state = (conv_state,)
        y, mixer_state = self.mixer(self._normalized(x), state, layout)
        if cache is not None:
            new_state = (*mixer_state, *new_state)
            if layout.continues is not None and not self.mixer.keeps_rows:
                new_state = tuple(layout.of_rows(s) for s in new_state)
            cache.update(new_state, self.layer_idx)
        return self._after_mixer(x, y)

    def initial_states(self, batch_size: int) -> tuple[Tensor, ...]:
        """The state before the first token, (B, ...) each."""
        states = self.mixer.initial_states(batch_size)
        if not isinstance(self.conv, CausalConv):
            return states
        return *states, states[0].new_zeros(batch_size, *self.conv.state_shape)

    def _of_sequences(self, state: tuple[Tensor, ...] | None, layout: SequenceLayout) -> tuple[Tensor, ...]:
        """Each packed sequence's state, of that of the rows."""
        initial = self.initial_states(layout.sequences(0))
        if state is None:
            return initial
        return tuple(layout.spread(row, new) for row, new in zip(state, initial, strict=True))

    def _normalized(self, x: Tensor) -> Tensor:
        return x if self.mixer_norm is None else self.mixer_norm(x)

    def _after_mixer(self, x: Tensor, y: Tensor) -> Tensor:
        x = self._drop(y) if self.mixer_norm is None else x + self._drop(y)
        return x if self.ff is None else x + self._drop(self.ff(self.ff_norm(x)))

    def _drop(self, y: Tensor) -> Tensor:
        return self.dropout(y) if self.training else y  # calls are what a token costs

    def read(self, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """What `forward` gave for the token x (B, T, D), of the states (B, T, ...) after it."""
        return self._after_mixer(x, self.mixer.read(state, self._normalized(x)))

    def fuse(self, program: Program, x: Vector, states: list[Vector]) -> None:
        """What `forward` does for one token a row, as instructions; over x."""
        with program.scratch():
            if self.conv is not None:
                *states, conv_state = states
                program.add(x, program.conv(self.conv, x, conv_state))
            if self.mixer_norm is None:
                program.pointwise(Op.COPY, self.mixer.fuse(program, x, states), out=x)
            else:
                program.add(x, self.mixer.fuse(program, program.normalized(self.mixer_norm, x), states))
            if self.ff is not None:
                program.add(x, self.ff.fuse(program, program.normalized(self.ff_norm, x)))  # type: ignore
