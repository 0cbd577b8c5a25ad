"""What a token costs, written down: the instructions that a compiled loop runs, and where they find their operands."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_rnn_kernels.packed_linear import PackedLinear, PackedMatrix

# Columns of an instruction: its code, whole numbers, then space, offset in bytes and row stride of each operand
NUMBERS, OPERANDS = 6, 7
FIRST = 1 + NUMBERS
COLUMNS = FIRST + 3 * OPERANDS
SCRATCH, WEIGHTS, IDS, LOGITS, STATES = range(5)  # spaces; the last and those after it: a state tensor each

MLSTM_EPS = 1e-6  # as `mlstm_scan`'s default


class Op(IntEnum):
    """Products first: their outputs are shared out among threads."""

    LINEAR_ONE, LINEAR, PACKED_ONE, PACKED = range(4)
    EMBED, RMS_NORM, CENTRED_NORM, CONV, LSTM, GRU, SLSTM, MIN_GRU, MIN_LSTM, MLSTM = range(4, 14)
    COPY, ADD, MULTIPLY, SILU, GELU, SILU_MULTIPLY, GELU_MULTIPLY, SIGMOID_MULTIPLY, SOFT_CAP = range(14, 23)


_ONE_ROW = {Op.LINEAR: Op.LINEAR_ONE, Op.PACKED: Op.PACKED_ONE}


class NotFusable(ValueError):
    """Why a model's token cannot be one compiled call."""


@dataclass(frozen=True)
class Vector:
    """`width` numbers of each row: columns `column` on of what lies `stride` apart from row to row."""

    space: int
    base: int
    stride: int
    column: int
    width: int

    def __getitem__(self, at: slice) -> "Vector":
        start, stop, _ = at.indices(self.width)
        return replace(self, column=self.column + start, width=stop - start)

    def split(self, *widths: int) -> list["Vector"]:
        ends = np.cumsum(widths).tolist()
        return [self[end - width : end] for end, width in zip(ends, widths, strict=True)]

    def chunk(self, parts: int) -> list["Vector"]:
        return self.split(*[self.width // parts] * parts)


class Program:
    """Instructions of a token, in order. Each method adds one and returns its result.

    Weights are read where they lie: a program holds their addresses, and is good while they stay there.

    Args:
        state_widths: numbers a row of each state tensor.
        vocab_size: numbers a row of the logits.

    Attributes:
        weights: numbers of all matrices, each read once a token.
        num_embeddings: ids are below it.
        bound: by the number of rows and whether they are one text's, what `run` has made of the instructions.
    """

    def __init__(self, state_widths: Sequence[int], vocab_size: int):
        self.states = [Vector(STATES + n, 0, width, 0, width) for n, width in enumerate(state_widths)]
        self.ids = Vector(IDS, 0, 2, 0, 1)  # int64: as wide as two floats
        self.logits = Vector(LOGITS, 0, vocab_size, 0, vocab_size)
        self.weights = self.num_embeddings = 0
        self._code: list[tuple[Op, list[int], list[float], list[Vector]]] = []
        self.bound: dict[tuple[int, bool], tuple[np.ndarray, ...]] = {}
        self._used = self._most = 0

    def vector(self, width: int) -> Vector:
        """A new one in scratch memory, in no defined state."""
        made = Vector(SCRATCH, self._used, width, 0, width)
        self._used += -(-width // 16) * 16
        self._most = max(self._most, self._used)
        return made

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """What is made inside is free again afterwards."""
        used = self._used
        yield
        self._used = used

    def emit(self, op: Op, operands: Sequence[Vector], numbers: Sequence[int] = (), factors: Sequence[float] = ()):
        self._code.append((op, list(numbers), list(factors), list(operands)))

    def weight(self, x: Tensor | None, width: int | None = None) -> Vector:
        """A parameter's numbers, for operands that are the same for all rows; `width`: how many are expected."""
        if x is None:
            return Vector(WEIGHTS, 0, 0, 0, 0)
        if x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous():
            raise NotFusable(f"weights in {x.dtype} on {x.device}; expected dense float32 on a CPU")
        _check(width in (None, x.numel()), "weights", x.numel(), width)
        return Vector(WEIGHTS, x.data_ptr(), 0, 0, x.numel())

    # The parts of a model

    def embed(self, module: nn.Module) -> Vector:
        """The token's row of nn.Embedding's weight."""
        require(module, nn.Embedding)
        if module.max_norm is not None:
            raise NotFusable("an embedding that scales its rows (max_norm)")
        self.num_embeddings = int(module.num_embeddings)  # type: ignore[arg-type]
        y = self.vector(module.embedding_dim)  # type: ignore[arg-type]
        self.emit(Op.EMBED, [self.ids, self.weight(module.weight), y], [y.width])  # type: ignore[arg-type]
        return y

    def linear(self, module: nn.Module, x: Vector, out: Vector | None = None) -> Vector:
        """nn.Linear, or one of packed integers."""
        if isinstance(module, PackedLinear):
            require(module, PackedLinear)
            return self.packed_product(module, (1, module.out_features, module.in_features), module.bias, x, out)
        if isinstance(module, nn.Identity):
            return x
        require(module, nn.Linear)
        return self.product(module.weight[None], module.bias, x, out)  # type: ignore[index, arg-type]

    def product(
        self, weight: Tensor | PackedMatrix, bias: Tensor | None, x: Vector, out: Vector | None = None
    ) -> Vector:
        """weight (G, O, I): each of G groups of I numbers to O."""
        if isinstance(weight, PackedMatrix):
            return self.packed_product(weight, weight.shape, bias, x, out)
        y = self._result_of_product(weight.shape, x, out)
        operands = [x, self.weight(weight), self.weight(bias, y.width), y]
        self.emit(Op.LINEAR, operands, [32, *weight.shape])
        return y

    def _result_of_product(self, shape: Sequence[int], x: Vector, out: Vector | None) -> Vector:
        groups, outputs, inputs = shape
        y = self.vector(groups * outputs) if out is None else out
        _check(x.width == groups * inputs, "inputs", x.width, groups * inputs)
        _check(y.width == groups * outputs, "outputs", groups * outputs, y.width)
        self.weights += groups * outputs * inputs
        return y

    def packed_product(
        self,
        module: PackedLinear | PackedMatrix,
        shape: Sequence[int],
        bias: Tensor | None,
        x: Vector,
        out: Vector | None,
    ) -> Vector:
        y = self._result_of_product(shape, x, out)
        if module.packed.device.type != "cpu" or not module.packed.is_contiguous():
            raise NotFusable("packed weights that are not dense on a CPU")
        packed = Vector(WEIGHTS, module.packed.data_ptr(), 0, 0, module.packed.numel())
        numbers = [module.bits, *shape, module.group_size]
        self.emit(Op.PACKED, [x, packed, self.weight(bias, y.width), y, self.weight(module.scale)], numbers)
        return y

    def norm(
        self,
        x: Vector,
        weight: Tensor | None,
        eps: float,
        heads: int = 1,
        centred: bool = False,
        out: Vector | None = None,
    ) -> Vector:
        """x over the root of its mean square (its deviation if `centred`), each head for itself, times the weight."""
        y = self.vector(x.width) if out is None else out
        _check(y.width == x.width and x.width % heads == 0, "numbers of a norm", y.width, x.width)
        numbers = [x.width // heads, heads, weight is not None]
        self.emit(Op.CENTRED_NORM if centred else Op.RMS_NORM, [x, self.weight(weight, x.width), y], numbers, [eps])
        return y

    def normalized(self, module: nn.Module, x: Vector) -> Vector:
        """nn.RMSNorm or nn.LayerNorm over the last dimension."""
        if isinstance(module, nn.Identity):
            return x
        require(module, nn.RMSNorm, nn.LayerNorm)
        if getattr(module, "bias", None) is not None:
            raise NotFusable("a norm with a bias")
        return self.norm(x, module.weight, module.eps, 1, isinstance(module, nn.LayerNorm))  # type: ignore[arg-type]

    def pointwise(
        self, op: Op, a: Vector, b: Vector | None = None, out: Vector | None = None, cap: float = 0.0
    ) -> Vector:
        """Of each number of a and, where the operation takes two, of b, which may be a `weight`."""
        y, b = self.vector(a.width) if out is None else out, a if b is None else b
        _check(a.width == b.width == y.width, "numbers", b.width, a.width)
        self.emit(op, [a, b, y], [a.width], [cap])
        return y

    def add(self, a: Vector, b: Vector) -> Vector:
        """a + b, over a."""
        return self.pointwise(Op.ADD, a, b, a)

    def conv(self, module: nn.Module, x: Vector, state: Vector) -> Vector:
        """`hf_rnn.layers.CausalConv` with the K - 1 inputs before x, which move on."""
        y, taps = self.vector(x.width), module.weight.shape[1]  # type: ignore[union-attr, index]
        _check(
            bool(taps > 1 and state.width == (taps - 1) * x.width), "inputs before", state.width, (taps - 1) * x.width
        )
        weight = self.weight(module.weight, taps * x.width)  # type: ignore[arg-type, operator]
        operands = [x, weight, self.weight(module.bias, x.width), state, y]  # type: ignore[arg-type]
        self.emit(Op.CONV, operands, [x.width, taps])  # type: ignore[list-item]
        return y

    def cell(self, op: Op, gates: Vector, recurrent: Vector, states: Sequence[Vector], heads: int) -> Vector:
        """LSTM, GRU or sLSTM: pre-activations of x and R h + b, head by head, to h; the states move on."""
        h = self.vector(states[0].width)
        wide = (3 if op is Op.GRU else 4) * h.width
        _check(gates.width == recurrent.width == wide and h.width % heads == 0, "pre-activations", gates.width, wide)
        _check(all(state.width == h.width for state in states), "states", [s.width for s in states], h.width)
        self.emit(op, [gates, recurrent, h, *states], [h.width // heads, heads])
        return h

    def gated(self, op: Op, inputs: Sequence[Vector], state: Vector, *options: bool) -> Vector:
        """minGRU or minLSTM: pre-activations to h, which is the state."""
        h = self.vector(state.width)
        _check(all(x.width == h.width for x in inputs), "pre-activations", [x.width for x in inputs], h.width)
        self.emit(op, [h, state, *inputs], [h.width, *options])
        return h

    def mlstm(self, q: Vector, k: Vector, v: Vector, gates: Vector, states: Sequence[Vector], heads: int) -> Vector:
        """q, k, v and i, f of all heads to h (heads * V); C, n and m move on."""
        h = self.vector(v.width)
        widths = [k.width, gates.width, *(state.width for state in states)]
        expected = [q.width, 2 * heads, q.width * v.width // heads, q.width, heads]
        _check(widths == expected, "numbers of an mLSTM", widths, expected)
        numbers = [heads, q.width // heads, v.width // heads, states[2].space]
        self.emit(Op.MLSTM, [q, k, v, gates, h, states[0], states[1]], numbers, [MLSTM_EPS])
        return h

    # For the loop

    def scratch_floats(self, rows: int) -> int:
        return self._most * rows

    def bind(self, rows: int, one_text: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The instructions for so many rows: (N, COLUMNS) int64, (N, 2) float32 factors and (N,) numbers of rows."""
        steps = self._of_one_text(rows) if one_text else [(n, 0, rows) for n in range(len(self._code))]
        code = np.zeros((len(steps), COLUMNS), np.int64)
        factors = np.zeros((len(steps), 2), np.float32)
        for line, row, (n, first, count) in zip(code, factors, steps, strict=True):
            op, numbers, values, operands = self._code[n] if isinstance(n, int) else n
            line[0], line[1 : 1 + len(numbers)] = _ONE_ROW.get(op, op) if count == 1 else op, numbers
            row[: len(values)] = values
            for k, x in enumerate(operands):
                base = 4 * x.base * rows if x.space == SCRATCH else x.base
                at = base + 4 * (x.column + first * x.stride)
                line[FIRST + 3 * k : FIRST + 3 * k + 3] = x.space, at, x.stride
            if op is Op.MLSTM:  # whose m is no operand
                line[5] = 4 * first * numbers[0]
        return code, factors, np.array([count for _, _, count in steps])

    def _of_one_text(self, time: int) -> list[tuple[Any, int, int]]:
        """Instructions, by number or as they are, with the first row and the number of rows: each for all tokens at
        once, but from the first that touches a state to the last that does, token after token, each beginning with the
        state of the one before."""
        spans: list[tuple[int, int, set[int]]] = []
        for n, (op, numbers, _, operands) in enumerate(self._code):
            touched = {x.space for x in operands if x.space >= STATES} | ({numbers[3]} if op is Op.MLSTM else set())
            start = n
            while touched and spans and any(spans[k][2] & touched for k in range(len(spans))):
                k = next(k for k in range(len(spans)) if spans[k][2] & touched)
                start, touched = min(start, spans[k][0]), touched | spans[k][2]
                spans.pop(k)
            if touched:
                spans.append((start, n, touched))
        steps: list[tuple[Any, int, int]] = []
        n = 0
        while n < len(self._code):
            span = next((s for s in spans if s[0] == n), None)
            if span is None:
                steps.append((n, 0, time))
                n += 1
                continue
            _, last, touched = span
            for t in range(time):
                for state in (self.states[space - STATES] for space in sorted(touched) if t):
                    before = replace(state, column=-state.width)  # a row above
                    steps.append(((Op.COPY, [state.width], [0.0], [before, before, state]), t, 1))
                steps += [(k, t, 1) for k in range(n, last + 1)]
            n = last + 1
        return steps


def _check(fits: bool, what: str, found: object, expected: object) -> None:
    if not fits:
        raise NotFusable(f"{what}: {found} where {expected} are expected")


def require(module: nn.Module, *classes: type) -> None:
    if not isinstance(module, classes):
        raise NotFusable(f"a {type(module).__name__}, which has no instructions")
