"""What takes the place of the package's functions of the same names in a bundle (see `hf_rnn.remote_code.bundle`)."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def gated_norm(h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = sigmoid(gate) * weight * norm(h), each head normalised: (..., H, P) to (..., H * P)."""
    return torch.sigmoid(gate) * (torch.nn.functional.layer_norm(h, h.shape[-1:], eps=eps).flatten(-2) * weight)


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) * up, the halves of the last dimension of x."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def available() -> bool:
    """Whether there are compiled loops: not here."""
    return False


class Perturbed(Tensor):
    """The package's weights under zero-order training; here no parameter is one."""


def _perturbation(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """As they are."""
    return weight, bias, []


def write_remote_code(config: Any, folder: str | Path) -> None:
    """This file goes with the checkpoint."""
    shutil.copyfile(__file__, Path(folder) / "modeling_hf_rnn.py")
