"""States before the last tokens, to take these back."""

from collections.abc import Callable

from torch import Tensor

LayerStates = list[tuple[Tensor, ...] | None]  # per layer; None before the first token of a text


class Recording:
    """What a state that records keeps.

    Args:
        reach: at least so many tokens can be taken back at any time; 0: those since the last that were.

    Attributes:
        parts: in the order of reading, the position of a token, and the states before it and those that follow,
            (B, n, ...).
    """

    def __init__(self, reach: int = 0):
        if reach < 0:
            raise ValueError(f"tokens: expected at least 0, got {reach}")
        self.reach = reach
        self.parts: list[tuple[int, LayerStates]] = []

    def changed(self, change: Callable[[LayerStates], LayerStates]) -> "Recording":
        other = Recording(self.reach)
        other.parts = [(first, change(states)) for first, states in self.parts]
        return other

    def add(self, first: int, states: LayerStates) -> None:
        if self.reach:
            self.cut(first)
        self.parts.append((first, states))

    def at(self, position: int) -> LayerStates | None:
        """The state before a token, in memory of its own."""
        for first, states in reversed(self.parts):
            if first <= position < first + _count(states):
                return one_of(states, position - first)
        return None

    def cut(self, end: int) -> None:
        """Forget the states before the token at `end` and later ones, and those that lie more than `reach` before."""
        kept = []
        for first, states in self.parts:
            start, stop = max(first, end - self.reach), min(first + _count(states), end)
            if start >= stop:
                continue
            if stop - start < _count(states):  # without the memory of the rest
                states = [x and tuple(y[:, start - first : stop - first].clone() for y in x) for x in states]
            kept.append((start, states))
        self.parts = kept


def one_of(states: LayerStates, place: int) -> LayerStates:
    """One of several states (B, n, ...), in memory of its own."""
    return [x and tuple(y[:, place].clone() for y in x) for x in states]


def _count(states: LayerStates) -> int:
    return 1 if states[0] is None else states[0][0].shape[1]
