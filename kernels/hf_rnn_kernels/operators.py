"""How an op is registered with torch, and which of its backends computes."""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hf_rnn_kernels import threads
from hf_rnn_kernels.transforms import transforming

HAS_TRITON = importlib.util.find_spec("triton") is not None


def backend(package: str, x: Tensor) -> ModuleType:
    """The module of an op's package that computes for this tensor's device and dtype, imported when first used.

    `cpu` (numba), `triton`, which "cuda" means, as PyTorch calls AMD's GPUs, too; `reference`, the equations in plain
    torch, in float64 and where neither is installed.
    """
    return importlib.import_module(f"{package}.{backend_name(x)}")


def backend_name(x: Tensor) -> str:
    if x.dtype == torch.float64 or x.numel() == 0:
        return "reference"
    if x.device.type == "cpu":
        return "cpu" if threads.available() else _slow("numba", "cpu")
    if x.device.type == "cuda":
        return "triton" if HAS_TRITON else _slow("triton", "triton")
    return "reference"


@functools.cache  # once a process
def _slow(library: str, extra: str) -> str:
    warnings.warn(
        f"{library} is missing, or cannot be used in this process: recurrences run as loops over time in plain torch, "
        f"hundreds of times slower than compiled ones; pip install 'hf-rnn[{extra}]'",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


class Operator:
    """A custom operator and its autograd formula as torch.func's transforms take them, too.

    The formula that torch makes an operator's own is none for them: under a transform it comes as an
    `autograd.Function`. vmap runs the operator once for each of its elements.
    """

    def __init__(self, operator: Any, backward: Callable | None, save: Callable | None):
        self.operator = operator
        self.function = _function(operator, backward, save or (lambda *_: None))
        operator.register_vmap(self._each)

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


def operator(
    name: str,
    fake: Callable,
    backward: Callable | None = None,
    save: Callable | None = None,
    device: str | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable], Operator]:
    """Decorator that registers a function as `hf_rnn::name`: one operator for torch.compile, torch.export, autograd and
    torch.func, whatever backend then computes.

    Args:
        fake: the function's arguments to empty results, for the compiler.
        backward: a context and the gradients of the results to those of the arguments; None: no gradients.
        save: a context, the arguments as a tuple and the results, to what `backward` finds in the context.
        device: the only one that it runs on; None: any.
        mutates: arguments that it writes to.
    """

    def register(function: Callable) -> Operator:
        custom = torch.library.custom_op(f"hf_rnn::{name}", function, mutates_args=mutates, device_types=device)
        custom.register_fake(fake)
        if backward is not None:
            custom.register_autograd(backward, setup_context=save)
        return Operator(custom, backward, save)

    return register


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
