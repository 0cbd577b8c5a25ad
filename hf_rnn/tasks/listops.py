"""ListOps: the value of a nested expression (Nangia and Bowman, arXiv 1804.06028), for classifiers."""

from dataclasses import dataclass
from statistics import median

import torch
from numpy.random import Generator
from torch import Tensor

from hf_rnn.tasks.synthetic import random_of_row

# Tokens: padding, ten digits, the operators with their opening bracket, the closing one
PAD, DIGITS, OPERATORS, CLOSE = 0, range(1, 11), range(11, 15), 15
# Of the digits that follow: the least, the largest, the median rounded down, the sum modulo 10
MEANINGS = (min, max, lambda values: int(median(values)), lambda values: sum(values) % 10)

_TRIES = 10_000  # at the Arena's lengths one in three is kept


@dataclass(frozen=True)
class ListOps:
    """A map-style data set of expressions such as [MAX 2 9 [MIN 4 7 ] 0 ], and their values, 0 to 9.

    By the rules of Long Range Arena (arXiv 2011.04006), whose lengths are 500 to 2,000 tokens at a depth of 10: an
    argument is an expression of its own with a probability of a quarter, else a digit; an expression has 2 to
    `max_arguments` of them; other lengths are thrown away. Row i is a function of (seed, i): `input_ids` (T,), of 16
    tokens, 0 for padding, and `labels`, the value.

    Args:
        size: number of rows; they cost nothing until they are asked for.
        seed: other rows for another seed.
        min_length, max_length: of an expression, in tokens, brackets included.
        max_depth: levels, of which the last has digits alone.
        max_arguments: of an expression.

    Raises:
        ValueError: a setting out of its range; when a row is asked for, lengths that no expression comes to.
    """

    size: int = 2**20
    seed: int = 0
    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_arguments: int = 10

    vocab_size = 16
    num_classes = 10
    pad_token_id = PAD

    def __post_init__(self):
        for name, least in dict(size=1, seed=0, max_depth=2, max_arguments=2, min_length=1).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.max_length < max(self.min_length, 4):
            raise ValueError(
                f"max_length: expected at least min_length ({self.min_length}) and 4, the shortest expression, got "
                f"{self.max_length}"
            )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = random_of_row(index, self.size, self.seed)
        for _ in range(_TRIES):
            tokens: list[int] = []
            value = self._expression(random, tokens, depth=1)
            if self.min_length <= len(tokens) <= self.max_length:
                return {"input_ids": torch.tensor(tokens), "labels": torch.tensor(value)}
        raise ValueError(
            f"min_length: expected a length that expressions of depth {self.max_depth} come to, got {self.min_length} "
            f"to {self.max_length} tokens: none in {_TRIES:,} tries"
        )

    def _expression(self, random: Generator, tokens: list[int], depth: int) -> int:
        """Append an expression's tokens; returns its value."""
        operation = int(random.integers(len(OPERATORS)))
        tokens.append(OPERATORS[operation])
        values = []
        for _ in range(int(random.integers(2, self.max_arguments + 1))):
            if len(tokens) > self.max_length:
                break  # it will be thrown away
            if depth + 1 < self.max_depth and random.random() < 0.25:
                values.append(self._expression(random, tokens, depth + 1))
            else:
                values.append(int(random.integers(10)))
                tokens.append(DIGITS[values[-1]])
        tokens.append(CLOSE)
        return MEANINGS[operation](values) if values else 0
