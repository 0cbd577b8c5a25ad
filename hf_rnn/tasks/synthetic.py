"""The synthetic tasks of "Pretraining Recurrent Networks without Recurrence" (2026), parity and selective copying.

Each is a data set without end whose row i is a function of (seed, i): `Trainer` takes it as it is. A row has `length`
tokens to take in; input_ids and labels are one longer, since labels are shifted inside models (position t predicts
labels[t + 1]); what is not to be predicted is -100. The vocabulary does not depend on `length`, so that a model can be
tried on longer rows than it was trained on.
"""

import dataclasses
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

if TYPE_CHECKING:
    from datasets import IterableDataset

IGNORED = -100
Row = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class SyntheticTask(ABC):
    """A map-style data set of `size` rows.

    Args:
        length: T, tokens that the network takes in.
        size: number of rows; they cost nothing until they are asked for.
        seed: other rows for another seed.
    """

    length: int = 32
    size: int = 2**20
    seed: int = 0

    shortest = 4  # length

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = {"length": self.shortest, "seed": 0}.get(field.name, 1)
            value = getattr(self, field.name)
            if field.type is bool:
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name}: expected True or False, got {value!r}")
            elif field.type is float:
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                    raise ValueError(f"{field.name}: expected a share in [0, 1], got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field.name}: expected a whole number of at least {least}, got {value!r}")

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, of inputs and answers."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of different answers."""

    @property
    def chance(self) -> float:
        """Accuracy of guessing, all answers being as likely; a simple rule can do better where a task says so."""
        return 1 / self.num_classes

    @abstractmethod
    def row(self, random: Generator) -> Row:
        """x (T,), what goes in, and y (T,), what to answer after each, `IGNORED` for nothing."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.row(random_of_row(index, self.size, self.seed))
        answer = max(int(y[-1]), 0)  # takes the last place, which nothing reads
        input_ids, labels = np.append(x, answer), np.insert(y, 0, IGNORED)
        return {"input_ids": torch.from_numpy(input_ids).long(), "labels": torch.from_numpy(labels).long()}

    def to_iterable(self) -> "IterableDataset":
        """The same rows as a `datasets.IterableDataset`."""
        from datasets import IterableDataset

        return IterableDataset.from_generator(_rows, gen_kwargs={"task": self})


def random_of_row(index: int, size: int, seed: int) -> Generator:
    """The random numbers of row `index` of a data set of `size` rows, from the end where it is negative.

    Raises:
        IndexError: there is no such row.
    """
    index = operator.index(index)
    if not -size <= index < size:
        raise IndexError(f"index: expected one of {size} rows, got {index}")
    return np.random.default_rng([seed, index % size])


def _rows(task: SyntheticTask) -> Iterator[dict[str, list[int]]]:
    for index in range(len(task)):
        yield {name: x.tolist() for name, x in task[index].items()}


def _no_answers(length: int) -> np.ndarray:
    return np.full(length, IGNORED)


def _with_noise(y: np.ndarray, symbols: int, noise: float, random: Generator) -> np.ndarray:
    """Each answer replaced by one of 1 to `symbols` with the probability `noise`."""
    if not noise:  # and nothing drawn
        return y
    wrong = (random.random(len(y)) < noise) & (y != IGNORED)
    return np.where(wrong, random.integers(1, symbols + 1, len(y)), y)


@dataclass(frozen=True)
class Retrieval(SyntheticTask):
    """A needle among distractors: 0 marks the symbol after it, somewhere in the first half; at a last 0, say which.

    Args:
        noise: share of answers that are drawn anew, from all symbols. For training alone: with it no more than
            1 - noise (symbols - 1) / symbols of them can be right.
    """

    symbols: int = 8
    noise: float = 0.0

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def num_classes(self) -> int:
        return self.symbols

    def row(self, random: Generator) -> Row:
        x, y = random.integers(1, self.symbols + 1, self.length), _no_answers(self.length)
        at = random.integers(1, max(2, self.length // 2))
        x[at - 1] = x[-1] = 0
        y[-1] = x[at]
        return x, _with_noise(y, self.symbols, self.noise, random)


@dataclass(frozen=True)
class StringCopy(SyntheticTask):
    """A string, 0, and then the string backwards, each symbol to be said before it is shown.

    The commonest symbol of the string is right about 0.4 of the time at a length of 24, 0.33 at 96. `noise`: see
    `Retrieval`; what is shown stays the string.
    """

    symbols: int = 4
    noise: float = 0.0

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def num_classes(self) -> int:
        return self.symbols

    def row(self, random: Generator) -> Row:
        half = self.length // 2
        backwards = random.integers(1, self.symbols + 1, half)
        x = np.concatenate([np.zeros(self.length % 2, int), backwards[::-1], [0], backwards[:-1]])
        y = _no_answers(self.length)
        y[-half:] = backwards
        return x, _with_noise(y, self.symbols, self.noise, random)


@dataclass(frozen=True)
class Stack(SyntheticTask):
    """Symbols are pushed, 0 pops one and asks which it was. Pushes and pops are as likely where both can be.

    Most pops want a symbol just pushed: the last one pushed is right about seven times of ten, with no stack at all.
    """

    symbols: int = 4
    depth: int = 6

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def num_classes(self) -> int:
        return self.symbols

    def row(self, random: Generator) -> Row:
        stack: list[int] = []
        x, y = np.zeros(self.length, int), _no_answers(self.length)
        pops, symbols = random.random(self.length) < 0.5, random.integers(1, self.symbols + 1, self.length)
        for t in range(self.length):
            if len(stack) == self.depth or (stack and pops[t]):
                y[t] = stack.pop()
            else:
                x[t] = symbols[t]
                stack.append(symbols[t])
        return x, y


@dataclass(frozen=True)
class KeysValues(SyntheticTask):
    """Pairs of a key and a value, no key twice, then keys in another order, each to be answered with its value.

    Tokens: 0, values, keys. A third of the row for each of keys, values and questions, up to `keys` pairs: in longer
    rows zeros stand between pairs and questions. The commonest value of a row is right about a third of the time.

    Args:
        one_query: one question, at the end, after as many pairs as there is room for.
    """

    keys: int = 8
    values: int = 8
    one_query: bool = False

    @property
    def vocab_size(self) -> int:
        return 1 + self.values + self.keys

    @property
    def num_classes(self) -> int:
        return self.values

    def row(self, random: Generator) -> Row:
        pairs = min(self.keys, (self.length - 1) // 2 if self.one_query else self.length // 3)
        questions = 1 if self.one_query else pairs
        keys = random.permutation(self.keys)[:pairs]
        values = random.integers(1, self.values + 1, pairs)
        order = random.permutation(pairs)[:questions]
        x, y = np.zeros(self.length, int), _no_answers(self.length)
        x[0 : 2 * pairs : 2], x[1 : 2 * pairs : 2] = 1 + self.values + keys, values
        x[-questions:], y[-questions:] = 1 + self.values + keys[order], values[order]
        return x, y


@dataclass(frozen=True)
class ModularArithmetic(SyntheticTask):
    """A chain of operations on a number, a + b - c * d ..., from left to right, modulo `modulus`: after each number the
    result so far. A row begins with a number; tokens: numbers, then + - *.

    Products make 0 the likeliest answer: always 0 is right about a quarter of the time with the modulus of 5.
    """

    modulus: int = 5

    @property
    def vocab_size(self) -> int:
        return self.modulus + 3

    @property
    def num_classes(self) -> int:
        return self.modulus

    def row(self, random: Generator) -> Row:
        numbers = random.integers(0, self.modulus, (self.length + 1) // 2)
        operations = random.integers(0, 3, self.length // 2)
        x, y = np.zeros(self.length, int), _no_answers(self.length)
        x[::2], x[1::2] = numbers, self.modulus + operations
        result = numbers[0]
        y[0] = result
        for i, number in enumerate(numbers[1:]):
            result = (result + number, result - number, result * number)[operations[i]] % self.modulus
            y[2 * i + 2] = result
        return x, y


@dataclass(frozen=True)
class LinearRule(SyntheticTask):
    """Modular arithmetic that has to be learned from the row itself: pairs of a number x and a x + b modulo `modulus`,
    with a and b of the row; after each x, its partner.

    To be answered is what the pairs before settle, whatever a and b: with a prime modulus all after two different x.
    The commonest partner so far is right about 0.36 of the time with the modulus of 5.
    """

    modulus: int = 5

    @property
    def vocab_size(self) -> int:
        return self.modulus

    @property
    def num_classes(self) -> int:
        return self.modulus

    def row(self, random: Generator) -> Row:
        a, b = random.integers(0, self.modulus, 2)
        x, y = random.integers(0, self.modulus, self.length), _no_answers(self.length)
        slopes, shifts = np.mgrid[: self.modulus, : self.modulus]  # the rules that are left
        for t in range(0, self.length, 2):
            answer = (a * x[t] + b) % self.modulus
            found = (slopes * x[t] + shifts) % self.modulus
            if (found == answer).all():
                y[t] = answer
            slopes, shifts = slopes[found == answer], shifts[found == answer]
            if t + 1 < self.length:
                x[t + 1] = answer
        return x, y


@dataclass(frozen=True)
class Parity(SyntheticTask):
    """Bits, and whether the ones so far are odd, after each, or with `last_only` at the end alone."""

    last_only: bool = False

    @property
    def vocab_size(self) -> int:
        return 2

    @property
    def num_classes(self) -> int:
        return 2

    def row(self, random: Generator) -> Row:
        x = random.integers(0, 2, self.length)
        y = x.cumsum() % 2
        if self.last_only:
            y[:-1] = IGNORED
        return x, y


@dataclass(frozen=True)
class SelectiveCopying(SyntheticTask):
    """Symbols among blanks (0), to be said in order at the end, where `copied` askers (symbols + 1) stand (Gu and Dao,
    arXiv 2312.00752). The commonest symbol of a row is right about 0.4 of the time."""

    symbols: int = 8
    copied: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.length < 2 * self.copied:
            raise ValueError(f"length: expected at least {2 * self.copied}, twice copied, got {self.length}")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def num_classes(self) -> int:
        return self.symbols

    def row(self, random: Generator) -> Row:
        symbols = random.integers(1, self.symbols + 1, self.copied)
        x, y = np.zeros(self.length, int), _no_answers(self.length)
        x[np.sort(random.permutation(self.length - self.copied)[: self.copied])] = symbols
        x[-self.copied :], y[-self.copied :] = self.symbols + 1, symbols
        return x, y
