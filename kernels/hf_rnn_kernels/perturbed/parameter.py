"""A parameter that stands for many: what modules find in the place of theirs while perturbed copies are evaluated."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_rnn_kernels.perturbed.op import perturbed_embedding, perturbed_linear
from hf_rnn_kernels.perturbed.reference import low_rank


class Perturbed(Tensor):
    """M copies of a parameter W, W + left_m right_m^T or W + offset_m, in place of W (`torch.func.functional_call`).

    Linear layers, embeddings and this package's ops never form the copies: their input's rows belong to the members in
    turn. Norms do what they should. Anything else gets the copies, ready for (rows, time, ...): (R, 1, *shape). With
    one member everything works that works with W, in any model. Shape, dtype and device are W's.

    Attributes:
        left, right: (M, ..., O, K) and (M, ..., I, K) for a matrix, or stack of matrices, (..., O, I); else None.
        offset: gives (M, *shape) when called, where there are no factors.
        members: M.
        rows: batch rows of each member.
    """

    left: Tensor | None
    right: Tensor | None
    offset: Callable[[], Tensor] | None
    members: int
    rows: int

    @staticmethod
    def of_low_rank(weight: Tensor, left: Tensor, right: Tensor, rows: int = 1) -> "Perturbed":
        return Perturbed._make(weight, left, right, None, left.shape[0], rows)

    @staticmethod
    def of_offset(weight: Tensor, offset: Callable[[], Tensor], members: int = 1, rows: int = 1) -> "Perturbed":
        return Perturbed._make(weight, None, None, offset, members, rows)

    @staticmethod
    def _make(weight, left, right, offset, members, rows) -> "Perturbed":
        new = torch.Tensor._make_subclass(Perturbed, weight.detach())
        new.left, new.right, new.offset, new.members, new.rows = left, right, offset, members, rows
        return new

    def base(self) -> Tensor:
        """W."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def copies(self) -> Tensor:
        """(M, *shape), in the dtype of W."""
        base = self.base()
        if self.left is None:
            assert self.offset is not None
            return base + self.offset().to(base.dtype)
        assert self.right is not None
        return (base + self.left @ self.right.transpose(-1, -2)).to(base.dtype)

    def materialize(self) -> Tensor:
        """W's own shape for one member; else (R, 1, *shape), a copy for each row, to meet (R, T, ...)."""
        copies = self.copies()
        return copies[0] if self.members == 1 else copies.repeat_interleave(self.rows, 0)[:, None]

    def over(self, y: Tensor) -> Tensor:
        """A vector W's copies, to be multiplied with or added to y (R, ..., D)."""
        if self.members == 1:
            return self.materialize()
        return self.copies().repeat_interleave(self.rows, 0).view(-1, *(1,) * (y.dim() - 2), self.shape[-1])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _KEPT:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in _HANDLED:
            return _HANDLED[function](*args, **kwargs)  # type: ignore[operator]
        if function not in _BY_ROW and any(p.members > 1 for p in _perturbed((args, tuple(kwargs.values())))):
            raise TypeError(f"{function}: no function that evaluates several members of a perturbed weight")
        return function(*map(_materialized, args), **{name: _materialized(x) for name, x in kwargs.items()})


# What is asked about a parameter rather than done with it
_KEPT = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda", "layout")
} | {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.__repr__}


# What works for (R, 1, *shape), a copy for each row, as it does for (*shape): elementwise, or in the last dimensions
_BY_ROW = {torch.addcmul, torch.add, torch.mul, Tensor.add, Tensor.mul, Tensor.__rmul__, Tensor.__radd__, Tensor.unbind}


def _perturbed(x) -> Iterator[Perturbed]:
    if isinstance(x, Perturbed):
        yield x
    elif type(x) in (list, tuple):
        for element in x:
            yield from _perturbed(element)


def _materialized(x):
    if isinstance(x, Perturbed):
        return x.materialize()
    return type(x)(map(_materialized, x)) if type(x) in (list, tuple) else x


def _linear(input, weight, bias=None):
    if torch.is_autocast_enabled(input.device.type):
        input = input.to(torch.get_autocast_dtype(input.device.type))
    if not isinstance(weight, Perturbed):  # a bias alone
        return F.linear(input, weight.to(input.dtype)) + _over(bias, input).to(input.dtype)
    if isinstance(bias, Perturbed):
        bias = bias.copies()
    bias = None if bias is None else bias.to(input.dtype)
    if weight.left is not None:
        return perturbed_linear(input, weight.base().to(input.dtype), weight.left, weight.right, bias)  # type: ignore
    copies = weight.copies().to(input.dtype)
    if weight.members == 1:
        return F.linear(input, copies[0], None if bias is None else bias.view(-1))
    x = input.reshape(weight.members, -1, input.shape[-1])
    y = torch.bmm(x, copies.transpose(1, 2))
    y = y if bias is None else y + (bias if bias.dim() == 1 else bias[:, None])
    return y.view(*input.shape[:-1], -1)


def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None:
        raise ValueError("max_norm: expected None; such an embedding changes its weight in the forward pass")
    if weight.left is not None:
        return perturbed_embedding(input, weight.base(), weight.left, weight.right)
    copies = weight.copies()
    ids = input.reshape(weight.members, -1)
    return copies[torch.arange(weight.members, device=ids.device)[:, None], ids].view(*input.shape, -1)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    y = F.layer_norm(input, normalized_shape, None, None, eps) * _over(weight, input)
    return y if bias is None else y + _over(bias, input)


def _rms_norm(input, normalized_shape, weight=None, eps=None):
    return F.rms_norm(input, normalized_shape, None, eps) * _over(weight, input)


def _over(x, y: Tensor) -> Tensor:
    return x.over(y) if isinstance(x, Perturbed) else x


def _einsum(equation, *operands):
    """Block-diagonal matrices: x (R, T, G, I) and weight (G, O, I), the only product of this kind in the package."""
    x, weight = operands
    if weight.members == 1 or weight.left is None or equation != "...gi,goi->...go":
        return torch.einsum(equation, x, _materialized(weight))
    members, blocks = weight.members, weight.shape[0]

    def by_block(factor: Tensor) -> Tensor:
        return factor.flatten(0, 1)

    y = torch.einsum(equation, x, weight.base())
    rows = x.reshape(members, -1, *x.shape[-2:]).transpose(1, 2).flatten(0, 1)  # (M * G, N, I)
    more = low_rank(rows, by_block(weight.left), by_block(weight.right)).unflatten(0, (members, blocks))
    return y + more.transpose(1, 2).reshape(y.shape)


_HANDLED = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.einsum: _einsum,
}
