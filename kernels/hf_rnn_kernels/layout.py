"""How the tokens of a batch make sequences."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from hf_rnn_kernels.checks import values_known


class SequenceLayout(NamedTuple):
    """Which of the (B, T) tokens of a batch are real, and which sequences they make.

    Checked once, by `of` or by the model that makes one of its own arguments, and handed to every op. A named tuple,
    since what moves a module's arguments to its device (accelerate, FSDP) moves the tensors in one.

    Attributes:
        mask: (B, T) bool, False at padding; None where all tokens are real.
        offsets: (N + 1) integers, 0 = c_0 <= ... <= c_N = B * T: sequence n is tokens c_n to c_{n+1} - 1 of all B * T,
            row after row. None where each row is one sequence, N = B.
        in_place: the initial states that an op is given are buffers of one that decodes: where no gradient flows, it
            writes the last states to them and returns them.
        continues: (B,) bool, of a model's packed rows, each of which begins with a sequence of its own: True where that
            one goes on from the row's state. None where no state is carried.
        reverse: each sequence is read from its last token to its first: what an op calls the initial state is that
            behind the last token, the last state that after the first one. The tokens stay where they lie.
        recorded: of rows, not of packed or reversed sequences: instead of the last states those after each of the last
            so many tokens, 1 to T, are returned, (B, recorded, ...), always new ones; so that tokens that turn out
            wrong can be taken back. 0: the last states.
    """

    mask: Tensor | None = None
    offsets: Tensor | None = None
    in_place: bool = False
    continues: Tensor | None = None
    reverse: bool = False
    recorded: int = 0

    @classmethod
    def of(
        cls, batch: int, time: int, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> "SequenceLayout":
        """The layout of B = `batch` rows of T = `time` tokens.

        Args:
            mask: (B, T), zero or False at padding, one or True elsewhere.
            cu_seqlens: (N + 1) int32 or int64 offsets of packed sequences in the B * T tokens. Where their values are
                known they are read here (on a GPU that waits for the device), and nowhere else.

        Raises:
            TypeError, ValueError: another dtype, shape or value than above, with the argument's name.
        """
        if mask is not None and mask.shape != (batch, time):
            raise ValueError(f"mask: expected shape (B, T) = {(batch, time)}, got {tuple(mask.shape)}")
        if mask is not None and values_known(mask) and not bool((mask == mask.bool()).all()):
            raise ValueError("mask: expected zeros at padding and ones elsewhere, got other values")
        if cu_seqlens is not None:
            check_offsets("cu_seqlens", cu_seqlens, batch * time)
        return cls(None if mask is None else mask.bool(), cu_seqlens)

    def sequences(self, batch: int) -> int:
        """N, of `batch` rows."""
        return batch if self.offsets is None else self.offsets.shape[0] - 1

    def spread(self, state: Tensor, initial: Tensor) -> Tensor:
        """The state of each row (B, ...) at its first sequence, where that continues; elsewhere `initial` (N, ...)."""
        assert self.offsets is not None and self.continues is not None
        first = torch.searchsorted(self.offsets, self._ends() - self._ends()[0])
        continues = self.continues.view(-1, *[1] * (state.dim() - 1))
        return initial.index_copy(0, first, torch.where(continues, state, initial[first]))

    def of_rows(self, x: Tensor) -> Tensor:
        """What is of the last sequence of each row, (B, ...) of (N, ...)."""
        assert self.offsets is not None
        return x[torch.searchsorted(self.offsets, self._ends()) - 1]

    def _ends(self) -> Tensor:
        """Of each row, in tokens."""
        assert self.offsets is not None and self.continues is not None
        rows = len(self.continues)
        return torch.arange(1, rows + 1, dtype=self.offsets.dtype, device=self.offsets.device) * (
            self.offsets[-1] // max(rows, 1)
        )

    def flat(self, x: Tensor) -> Tensor:
        """(B, T, ...) as the operators take it: rows that sequences run across as one, (1, B * T, ...)."""
        return x if self.offsets is None or x.shape[0] == 1 else x.flatten(0, 1)[None]

    def flat_mask(self) -> Tensor | None:
        """The mask in the same way."""
        return None if self.mask is None else self.flat(self.mask)


ROWS = SequenceLayout()  # each row one sequence, every token real


def check_layout(layout: SequenceLayout) -> None:
    """Raise TypeError for what is no layout, or for one with a mask that `SequenceLayout.of` did not make."""
    if not isinstance(layout, SequenceLayout):
        raise TypeError(
            f"layout: expected a SequenceLayout, as SequenceLayout.of(B, T, mask, cu_seqlens) makes them, got a "
            f"{type(layout).__name__}"
        )
    if layout.mask is not None and layout.mask.dtype != torch.bool:
        raise TypeError(f"layout.mask: expected bool, got {layout.mask.dtype}; SequenceLayout.of takes any dtype")


def check_offsets(name: str, offsets: Tensor, tokens: int) -> None:
    """Raise ValueError or TypeError unless the offsets cut so many `tokens` into sequences.

    Values are looked at where they are known: under torch.compile the operators do so when they run on a CPU, and the
    Triton kernels clamp them.
    """
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"{name}: expected shape (N + 1,) with N >= 1, got {tuple(offsets.shape)}")
    if not values_known(offsets):
        return
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name}: expected offsets that rise from 0 to {tokens}, the number of tokens, got {bounds}")


def check_packing(offsets: Tensor | None, x: Tensor) -> None:
    """Raise unless an operator's offsets, where it has any, cut the T tokens of a batch of one, x (1, T, ...)."""
    if offsets is None:
        return
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens: packed sequences lie in a batch of one, got a batch of {x.shape[0]}")
    check_offsets("cu_seqlens", offsets, x.shape[1])
