"""Memory RNN: a memory of tokens that a small network rewrites at every step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_rnn.layers import FeedForward, Mixer, RMSNorm
from hf_rnn.models.memory.configuration_memory import MemoryRNNConfig
from hf_rnn.models.memory.updaters import MLPUpdater, TransformerUpdater, make_updater
from hf_rnn.skeleton.block import RecurrentBlock
from hf_rnn.skeleton.heads import (
    RecurrentForCTC,
    RecurrentForMaskedLM,
    RecurrentForPrediction,
    RecurrentForQuestionAnswering,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from hf_rnn.skeleton.modeling_recurrent import RecurrentForCausalLM, RecurrentModel
from hf_rnn_kernels.fused_step.program import Program, Vector
from hf_rnn_kernels.layout import SequenceLayout


class Memory(Mixer):
    """m_t = norm(update(m_{t-1}, norm(x_t))), m_{-1} = 0, y_t = read(m_t): K tokens of D channels, of length sqrt(D).

    Time is a loop: the network sees its own state, and it is no gated sum that a scan could take at once.
    """

    def __init__(self, config: MemoryRNNConfig):
        super().__init__()
        self.config = config
        self.state_shapes = [(config.num_memory_tokens, config.hidden_size)]
        self.token_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)  # as long as the memory's tokens
        self.updater = make_updater(config)
        self.out_proj = nn.Linear(config.memory_size, config.hidden_size, bias=config.use_bias)
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ff = FeedForward(config.hidden_size, config.feed_forward_size)

    def init_weights(self) -> None:
        """Products that neither grow nor shrink a vector, since the recurrence repeats them: std 1 / sqrt(inputs)."""
        for module in self.updater.modules():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=module.in_features**-0.5)
        init.normal_(self.out_proj.weight, std=self.out_proj.in_features**-0.5)
        if isinstance(self.updater, TransformerUpdater):
            init.normal_(self.updater.places)

    def update(self, memory: Tensor, x: Tensor) -> Tensor:
        """m_t: (N, K, D) in float32 and x_t (N, D), normalised, to (N, K, D) in float32."""
        new = self.updater(memory.to(x.dtype), x)
        return F.rms_norm(new.to(memory.dtype), new.shape[-1:])

    def read(self, state: tuple[Tensor, ...], x: Tensor | None = None) -> Tensor:
        """y_t: (N, ..., K, D) to (N, ..., D)."""
        x = self.out_proj(state[0].flatten(-2).to(self.norm.weight.dtype))
        return x + self.ff(self.norm(x))

    def to_states(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tokens  # they have the length that `update` gives

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if layout.offsets is not None:
            return self._packed(x, state, layout)
        if state is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            memory = x.new_zeros(x.shape[0], *self.state_shapes[0], dtype=dtype)
        else:
            memory = state[0]
        if torch.compiler.is_exporting():
            last, every = self._exported(memory, self.token_norm(x), layout)
            return self.read((every,)), (last,)
        if not x.shape[1]:
            return x, (memory,)
        every, memory = self._all(memory, self.token_norm(x), layout)
        y = self.read((every,))
        if layout.recorded:
            return y, (every[:, -layout.recorded :],)
        if layout.in_place and state is not None and not memory.requires_grad:
            memory = state[0].copy_(memory)
        return y, (memory,)

    def _all(self, memory: Tensor, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Memories after each of normalised tokens (B, T, D), and that after the last one read."""
        if isinstance(self.updater, MLPUpdater) and x.shape[1] > 1 and not layout.reverse:
            every = self.updater.scan(memory, x, layout.mask)
            if every is not None:
                return every, every[:, -1].clone()  # of its own, not a view that keeps them all
        memories, tokens = [], list(enumerate(x.unbind(1)))
        for t, x_t in reversed(tokens) if layout.reverse else tokens:
            new = self.update(memory, x_t)
            memory = new if layout.mask is None else torch.where(layout.mask[:, t, None, None], new, memory)
            memories.append(memory)
        return torch.stack(memories[::-1] if layout.reverse else memories, 1), memory

    def _exported(self, memory: Tensor, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """The loop as one operator, of any number of tokens: the first memory and normalised tokens (B, T, D) to the
        last memory and all of them, (B, T, K, D)."""
        from torch._higher_order_ops import scan

        def step(memory, inputs):
            x, real = inputs
            new = torch.where(real[:, None, None], self.update(memory, x), memory)
            return new, new.clone()  # an output must be no state

        real = x.new_ones(x.shape[:2], dtype=torch.bool) if layout.mask is None else layout.mask
        inputs = (x.transpose(0, 1), real.transpose(0, 1))
        last, memories = scan(step, memory, inputs, reverse=layout.reverse)
        return last, memories.transpose(0, 1)

    def fuse(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        memory, tokens = states[0], self.config.num_memory_tokens
        new = self.updater.fuse(program, memory, program.normalized(self.token_norm, x))  # type: ignore[operator]
        program.norm(new, None, torch.finfo(torch.float32).eps, tokens, out=memory)
        y = program.linear(self.out_proj, memory)
        return program.add(y, self.ff.fuse(program, program.normalized(self.norm, y)))

    def _packed(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Packed sequences laid out as rows, run, and laid back."""
        assert layout.offsets is not None
        tokens, mask = x.flatten(0, 1), layout.mask
        lengths = layout.offsets.diff().tolist()
        rows = nn.utils.rnn.pad_sequence(list(tokens.split(lengths)), batch_first=True)
        real = torch.ones_like(tokens[:, 0], dtype=torch.bool) if mask is None else mask.flatten()
        real = nn.utils.rnn.pad_sequence(list(real.split(lengths)), batch_first=True)
        y, last = self.forward(rows, state, SequenceLayout(real, reverse=layout.reverse))
        return torch.cat([row[:length] for row, length in zip(y, lengths, strict=True)]).view(x.shape), last


class MemoryRNNModel(RecurrentModel):
    """Memory RNN without a head."""

    config_class = MemoryRNNConfig

    def make_norm(self, config: Any) -> nn.Module:
        return RMSNorm(config.hidden_size, eps=config.norm_eps)

    def make_block(self, config: Any, layer_idx: int) -> RecurrentBlock:
        """No residual stream: what the memory does not hold is gone."""
        last = layer_idx == config.num_hidden_layers - 1
        mixer = self.directions(lambda: Memory(config))
        return RecurrentBlock(layer_idx, mixer, dropout=0.0 if last else config.hidden_dropout)


class MemoryRNNForCausalLM(RecurrentForCausalLM):
    """Memory RNN language model."""

    config_class = MemoryRNNConfig
    model_class = MemoryRNNModel


class MemoryRNNForMaskedLM(RecurrentForMaskedLM):
    """Memory RNN that fills in masked tokens."""

    config_class = MemoryRNNConfig
    model_class = MemoryRNNModel


class MemoryRNNForTokenClassification(RecurrentForTokenClassification):
    """Memory RNN with a label for each token."""

    config_class = MemoryRNNConfig
    model_class = MemoryRNNModel


class MemoryRNNForSequenceClassification(RecurrentForSequenceClassification):
    """Memory RNN with a classifier of sequences."""

    config_class = MemoryRNNConfig
    model_class = MemoryRNNModel


class MemoryRNNForQuestionAnswering(RecurrentForQuestionAnswering):
    """Memory RNN that marks the answer in a text."""

    config_class = MemoryRNNConfig
    model_class = MemoryRNNModel


class MemoryRNNForCTC(RecurrentForCTC):
    """Memory RNN that transcribes."""

    config_class = MemoryRNNConfig
    model_class = MemoryRNNModel


class MemoryRNNForPrediction(RecurrentForPrediction):
    """Memory RNN that forecasts series."""

    config_class = MemoryRNNConfig
    model_class = MemoryRNNModel
