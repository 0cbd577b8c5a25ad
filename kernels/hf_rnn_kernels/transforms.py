"""torch.func's `grad`, `vmap` and what is made of them."""

import torch
from torch import Tensor


def transforming() -> bool:
    """Whether one of torch.func's transforms is running."""
    return torch._C._are_functorch_transforms_active()


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow. Under transforms a tensor need not know: always."""
    return torch.is_grad_enabled() and (transforming() or any(x is not None and x.requires_grad for x in tensors))
