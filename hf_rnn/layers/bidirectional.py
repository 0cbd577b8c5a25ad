import torch
from torch import Tensor, nn

from hf_rnn.layers.mixer import Mixer, RecurrentMixer
from hf_rnn_kernels.layout import SequenceLayout


class Bidirectional(Mixer):
    """A recurrence over each sequence's real tokens, and another one from the last of them to the first.

    Their outputs are added: of layers with an output projection, each with its own, that is both states side by side,
    projected. Without one they stand side by side, as `torch.nn.LSTM(bidirectional=True)` has them. Each direction
    starts from its own initial state; there is none to go on from, for a token's output depends on all that follow it.

    Args:
        forwards: a layer called as `Mixer.forward`, a `Mixer` or a `CausalConv`.
        backwards: the other direction's; None: the same weights for both.
        side_by_side: outputs are not added.
    """

    def __init__(self, forwards: nn.Module, backwards: nn.Module | None, side_by_side: bool = False):
        super().__init__()
        self.forwards = forwards
        self.backwards = backwards
        self.side_by_side = side_by_side
        self.state_shapes = []

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.backwards is None and isinstance(self.forwards, RecurrentMixer) and not self.side_by_side:
            return self.forwards(x, None, layout, both_ways=True)
        y, _ = self.forwards(x, None, layout)
        backwards = self.forwards if self.backwards is None else self.backwards
        z, _ = backwards(x, None, layout._replace(reverse=True))
        return _beside(y, z) if self.side_by_side else y + z, ()


def _beside(y: Tensor, z: Tensor) -> Tensor:
    """(B, T, D) twice to (B, T, 2 D), in memory as both are: torch's LSTM gives and reads them time by time."""
    if all(x.transpose(0, 1).is_contiguous() for x in (y, z)):
        return torch.cat([y.transpose(0, 1), z.transpose(0, 1)], -1).transpose(0, 1)
    return torch.cat([y, z], -1)
