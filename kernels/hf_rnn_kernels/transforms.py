"""Operators under torch.func: `grad`, `vmap` and what is made of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def transforming() -> bool:
    """Whether one of torch.func's transforms is running."""
    return torch._C._are_functorch_transforms_active()


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow. Under transforms a tensor need not know: always."""
    return torch.is_grad_enabled() and (transforming() or any(x is not None and x.requires_grad for x in tensors))


class transformable:
    """A custom operator and its autograd formula as the transforms take them, too.

    The formula that torch makes an operator's own is none for them: under a transform it comes as an
    `autograd.Function`. vmap runs the operator once for each of its elements.
    """

    def __init__(self, operator: Any):
        self.operator = operator
        self.register_fake = operator.register_fake
        self.function = _function(operator, None, lambda *_: None)
        operator.register_vmap(self._each)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        self.operator.register_autograd(backward, setup_context=setup_context)
        self.function = _function(self.operator, backward, setup_context)

    def __call__(self, *arguments) -> Any:
        # Outside a transform nothing but this check is added.
        if not transforming() or not torch.is_grad_enabled():
            return self.operator(*arguments)
        # An `autograd.Function` sees tensors among its arguments, not those in lists.
        leaves, structure = pytree.tree_flatten(arguments)
        return self.function.apply(structure, *leaves)

    def _each(self, info, in_dims: tuple, *arguments) -> tuple[Any, Any]:
        leaves, structure = pytree.tree_flatten(arguments)
        dims = pytree.tree_leaves(in_dims)
        results = []
        # One after another, because the kernels know no further dimension.
        for n in range(info.batch_size):
            element = [x if d is None else x.select(d, n) for x, d in zip(leaves, dims, strict=True)]
            results.append(self.operator(*pytree.tree_unflatten(element, structure)))
        stacked = pytree.tree_map(lambda *x: torch.stack(x), *results)
        return stacked, pytree.tree_map(lambda _: 0, stacked)


def _function(operator: Any, formula: Callable | None, save: Callable) -> Any:
    class Function(torch.autograd.Function):
        # vmap then goes through forward and backward, and meets the operators' `_each`.
        generate_vmap_rule = True

        @staticmethod
        def forward(structure, *leaves):
            return operator(*pytree.tree_unflatten(leaves, structure))

        @staticmethod
        def setup_context(ctx, inputs, output):
            structure, *leaves = inputs
            save(ctx, pytree.tree_unflatten(leaves, structure), output)

        @staticmethod
        def backward(ctx, *grads):
            if formula is None:
                # The backward operators have no formula of their own.
                raise RuntimeError(f"{operator}: no second derivatives")
            return None, *pytree.tree_leaves(formula(ctx, *grads))

    return Function
