from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_rnn.layers.causal_conv import CausalConv
from hf_rnn.skeleton.configuration_block import RecurrentBlockConfig
from hf_rnn_kernels import silu_gate
from hf_rnn_kernels.fused_step.program import NotFusable, Op, Program, Vector
from hf_rnn_kernels.layout import SequenceLayout


class Mixer(nn.Module, ABC):
    """What a block has of an architecture: all that mixes tokens.

    Attributes:
        state_shapes: shape of each state tensor without its batch dimension.
        keeps_rows: where sequences are packed, the state is that of rows, (B, ...), not of sequences, (N, ...).
        exact_parts: linear layers that stay float32 where others are packed into few bits.
    """

    state_shapes: list[tuple[int, ...]]
    exact_parts: tuple[str, ...] = ()
    keeps_rows = False

    @abstractmethod
    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, T, D) and state to (B, T, D) and the float32 state after it: the same tensors, written to, if
        `layout.in_place` and no gradient flows."""

    def fuse(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        """What `forward` does for one token a row, as instructions of `hf_rnn_kernels.fused_step`: x and the state's
        tensors, which move on, to the output.

        Raises:
            NotFusable: a part without instructions.
        """
        raise NotFusable(f"a {type(self).__name__}, which has no instructions")

    def init_weights(self) -> None:
        """Initialise what `PreTrainedModel._init_weights` does not know; leaves loaded weights alone."""

    def initial_states(self, batch_size: int) -> tuple[Tensor, ...]:
        """The state before the first token, (B, ...) float32 (float64 in a float64 model) each."""
        weight = next(self.parameters())
        options = dict(dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        return tuple(torch.zeros(batch_size, *shape, **options) for shape in self.state_shapes)  # type: ignore

    def read(self, state: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """The output that `forward` gave with this state, (B, T, ...) each, for the token x (B, T, D): (B, T, D). For
        `MemoryMixin`."""
        raise self._no_memories()

    def to_states(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Vectors of length sqrt(channels) as a state that the recurrence could have come to. For `MemoryMixin`."""
        raise self._no_memories()

    def _no_memories(self) -> ValueError:
        return ValueError(
            f"{type(self).__name__}: nothing to gain from training by memories: its gates do not see its state, so it "
            "trains in parallel over time as it is. Those that gain: MemoryRNN, LSTM, GRU, and xLSTM of sLSTM blocks "
            "alone"
        )


def scan_ahead(
    scan: Callable, inputs: Sequence[Tensor], state: Sequence[Tensor | None], layout: SequenceLayout, ahead: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """scan(*inputs, *state, layout) over inputs (B, T, ...), of which the last `ahead` tokens leave the state as it is:
    what comes after a sequence is looked at while the weights around the scan are read once."""
    if not ahead:
        return scan(*inputs, *state, layout)
    now, parts, last = inputs[0].shape[1] - ahead, [], tuple(state)
    if now:
        h, last = scan(*(x[:, :now] for x in inputs), *state, layout)
        parts.append(h)
    h, _ = scan(*(x[:, now:] for x in inputs), *last, layout._replace(in_place=False))
    return torch.cat([*parts, h], 1), last  # type: ignore[return-value]


class RecurrentMixer(Mixer):
    """What recurrences over a vector share: the projection to pre-activations, a learned initial state, the output
    projection; in the gated layout a convolution before and a gate after.

    Its input has `config.hidden_size` channels, or `input_size`. An architecture gives `num_projections`, `recurrence`
    and, where they differ, `num_states` and `initial_bias`.

    Attributes:
        num_projections: pre-activations per channel.
        num_states: state tensors (N, inner_size).
    """

    num_projections: int
    num_states = 1

    def __init__(self, config: RecurrentBlockConfig, input_size: int | None = None):
        super().__init__()
        self.config = config
        size, inner, bias = input_size or config.hidden_size, config.inner_size, config.use_bias
        self.state_shapes = [(inner,)] * self.num_states
        self.conv, self.gate_proj = None, None
        if config.is_gated:
            self.gate_proj = nn.Linear(size, inner, bias=bias)
            if config.conv_kernel:
                self.conv = CausalConv(size, config.conv_kernel)
                self.state_shapes.append(self.conv.state_shape)
        self.in_proj = nn.Linear(size, self.num_projections * inner, bias=bias)
        self.initial_state = nn.Parameter(torch.empty(self.num_states, inner)) if config.learned_initial_state else None
        self.out_proj = (
            nn.Linear(config.output_size, config.hidden_size, bias=bias) if config.output_projection else nn.Identity()
        )

    @abstractmethod
    def recurrence(
        self,
        x: Tensor,
        state: tuple[Tensor | None, ...],
        layout: SequenceLayout,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, T, hidden_size) and state, `num_states` tensors (N, inner_size) or None for zeros, to
        h (B, T, inner_size) and the last state."""

    def initial_bias(self) -> Tensor:
        """Initial bias of the input projection, (num_projections * inner_size,)."""
        return torch.zeros(self.in_proj.out_features)

    def init_weights(self) -> None:
        if self.in_proj.bias is not None:
            init.copy_(self.in_proj.bias, self.initial_bias().to(self.in_proj.bias))
        if self.initial_state is not None:
            init.zeros_(self.initial_state)

    def initial_states(self, batch_size: int) -> tuple[Tensor, ...]:
        states = super().initial_states(batch_size)
        if self.initial_state is None:
            return states
        learned, others = self.initial_state.to(states[0].dtype), states[self.num_states :]
        # Not views of the parameter, for a forward pass writes to a state
        return *(s.repeat(batch_size, 1) for s in learned), *others

    def read(self, state: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return self._output(state[0].to(next(self.parameters()).dtype), x)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout, both_ways: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `Mixer.forward`; `both_ways`: the sum of the outputs of two directions with these weights. Gate and output
        projection are computed once, of the mean of both h, and what they give counts twice, as their bias does."""
        h, last = self._hidden(x, state, layout)
        if not both_ways:
            return self._output(h, x), last
        backwards, _ = self._hidden(x, state, layout._replace(reverse=True))
        return 2 * self._output((h + backwards) / 2, x), ()

    def _hidden(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, T, D) and state to h (B, T, output_size) and the state after it."""
        inputs: Tensor = x
        conv_states: tuple[Tensor, ...] = ()
        if self.conv is not None:
            inputs, conv_state = self.conv(x, None if state is None else state[-1], layout)
            conv_states = (conv_state,)
        if state is None and self.initial_state is not None:
            sequences = layout.sequences(x.shape[0])
            state = tuple(s.reshape(-1, s.shape[-1]).expand(sequences, -1) for s in self.initial_state.unbind(-2))
        before = (None,) * self.num_states if state is None else state[: self.num_states]
        h, last = self.recurrence(inputs, before, layout)
        return h, (*last, *conv_states)

    def fuse_recurrence(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        """As `recurrence`: x and the `num_states` state tensors to h."""
        raise NotFusable(f"a {type(self).__name__}, which has no instructions")

    def fuse(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        inputs = x if self.conv is None else program.conv(self.conv, x, states[-1])
        h = self.fuse_recurrence(program, inputs, states[: self.num_states])
        if self.gate_proj is not None:
            h = program.pointwise(Op.SILU_MULTIPLY, h, program.linear(self.gate_proj, x))
        return program.linear(self.out_proj, h)

    def _output(self, h: Tensor, x: Tensor) -> Tensor:
        return self.out_proj(h if self.gate_proj is None else silu_gate(h, self.gate_proj(x)))
