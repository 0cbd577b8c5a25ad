"""What takes the place of the package's functions of the same names in a bundle (see `hf_rnn.remote_code.bundle`)."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor


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


def plain(weight):
    """A parameter's numbers: here none is packed."""
    return weight


def decode_fused(model, input_ids, cache):
    """Tokens take the ordinary path here."""
    return


def packed_room(model):
    """As it is: packed weights are read by the package alone."""
    return model


def packed_from_coded(model_class, source, kwargs):
    """Coded checkpoints are read by the package alone."""
    return None, kwargs
