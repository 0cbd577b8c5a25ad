"""The directions in which weights are perturbed: a function of (seed, step, direction, tensor, element).

Whoever knows these five has the same numbers: any process, any chunk, a run that is resumed, a log that is replayed.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from hf_rnn_trainers.zo.philox import normals, philox, signs, sparse_signs

KINDS = ("low_rank", "rademacher", "gaussian", "sparse")
_BLOCK = 128  # random bits of a counter


class Directions:
    """Directions delta_j for the trainable parameters of a model, with unit variance: E[delta delta^T] = I.

    Args:
        model: its parameters are counted in the order of `named_parameters`, frozen ones, too, so that freezing one
            leaves the others' directions as they were; a tied one is one.
        kind: "low_rank": for matrices A B^T / sqrt(rank) with signs for elements of A and B (the covariance of dense
            signs at rank 1, at m + k bits instead of m k), for vectors signs; "rademacher": signs; "gaussian": standard
            normal; "sparse": signs / sqrt(density) with probability `density`, else zero.
        seed: of all directions of a run.
        rank, density: of "low_rank" and "sparse".
    """

    def __init__(self, model: nn.Module, kind: str = "low_rank", seed: int = 0, rank: int = 1, density: float = 0.1):
        self.kind, self.seed, self.rank, self.density = kind, seed, rank, density
        named = enumerate(model.named_parameters())
        self.parameters = {name: (number, p) for number, (name, p) in named if p.requires_grad}
        self._factors = self._layout() if kind == "low_rank" else {}

    @property
    def size(self) -> int:
        """d, the number of trainable parameters."""
        return sum(p.numel() for _, p in self.parameters.values())

    def _layout(self) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
        """Where in a step's bits the pieces of each parameter begin, and their shapes; `_counters` of these bits."""
        layout: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
        blocks, numbers, start = [], [], 0
        for name, (number, p) in self.parameters.items():
            shapes: list[tuple[int, ...]] = [tuple(p.shape)]
            if p.dim() > 1:
                shapes = [(*p.shape[:-1], self.rank), (*p.shape[:-2], p.shape[-1], self.rank)]
            layout[name] = []
            before = start
            for shape in shapes:
                layout[name].append((start * _BLOCK, shape))
                start += -(-math.prod(shape) // _BLOCK)
            blocks.append(torch.arange(start - before))
            numbers.append(torch.full((start - before,), number))
        self._counters = (torch.cat(blocks), torch.cat(numbers))
        return layout

    def factors(self, step: int, directions: Iterable[int], device: torch.device) -> dict[str, list[Tensor]]:
        """Of a "low_rank": int8 signs of several directions at once, N of them, for all parameters.

        Returns:
            Per parameter [A (N, ..., m, rank), B (N, ..., k, rank)] for a (..., m, k) matrix, else [(N, *shape)].
        """
        block, number = (x.to(device) for x in self._counters)
        which = torch.tensor(list(directions), device=device)[:, None]
        words = philox((block, number, which, torch.tensor(step, device=device)), self.seed)
        bits = signs(words.flatten(1))
        return {
            name: [bits[:, at : at + math.prod(shape)].unflatten(1, shape) for at, shape in pieces]
            for name, pieces in self._factors.items()
        }

    def dense(self, name: str, step: int, direction: int) -> Tensor:
        """One direction of one parameter, written out, in float32 (Gaussian: float64) on the parameter's device."""
        number, p = self.parameters[name]
        if self.kind == "low_rank":
            pieces = self.factors(step, [direction], p.device)[name]
            if len(pieces) == 1:
                return pieces[0][0].float()
            a, b = (x[0].float() for x in pieces)
            return a @ b.transpose(-1, -2) / math.sqrt(self.rank)
        per_element = {"rademacher": 1, "sparse": 32, "gaussian": 64}[self.kind]
        block = torch.arange(-(-p.numel() * per_element // _BLOCK), device=p.device)
        rest = (torch.tensor(x, device=p.device) for x in (number, direction, step))
        words = philox((block, *rest), self.seed).flatten()  # type: ignore[arg-type]
        if self.kind == "rademacher":
            elements = signs(words).float()
        elif self.kind == "sparse":
            elements = sparse_signs(words, self.density) / math.sqrt(self.density)
        else:
            elements = normals(words)
        return elements[: p.numel()].view(p.shape)

    def combine(self, step: int, coefficients: Tensor) -> Iterator[tuple[nn.Parameter, tuple[Tensor, ...]]]:
        """sum_j c_j delta_j, parameter by parameter: as (gradient,), or for a matrix and "low_rank" as (left, right),
        (..., m, N * rank) and (..., N * rank, k), whose product it is. In float32, or the parameter's float64.

        Args:
            coefficients: c (N,) of directions 0 to N - 1; those that are zero are passed over.
        """
        used = coefficients.nonzero().flatten().tolist()
        if self.kind == "low_rank":
            yield from self._combine_factors(step, coefficients[used], used)
            return
        for name, (_, p) in self.parameters.items():
            total = torch.zeros_like(p, dtype=_at_least_float32(p))
            for j in used:
                total.add_(self.dense(name, step, j), alpha=float(coefficients[j]))
            yield p, (total,)

    def _combine_factors(self, step: int, coefficients: Tensor, used: list[int]):
        device = next(p.device for _, p in self.parameters.values())
        every = self.factors(step, used, device) if used else None
        for name, (_, p) in self.parameters.items():
            dtype = _at_least_float32(p)
            if every is None:
                yield p, (torch.zeros_like(p, dtype=dtype),)
                continue
            pieces = [x.to(p.device, dtype) for x in every[name]]
            c = coefficients.to(p.device, dtype)
            if len(pieces) == 1:
                yield p, (torch.einsum("n,n...->...", c, pieces[0]),)
                continue
            a, b = pieces
            a = a * (c / math.sqrt(self.rank)).view(-1, *(1,) * (a.dim() - 1))
            # (N, ..., m, rank) to (..., m, N * rank), (N, ..., k, rank) to (..., N * rank, k)
            yield p, (a.movedim(0, -2).flatten(-2), b.movedim(0, -2).flatten(-2).transpose(-1, -2))


def _at_least_float32(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
