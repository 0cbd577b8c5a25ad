"""The checkpoint that a model was fine-tuned from: what differences are coded against."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging


def fingerprint(x: Tensor) -> str:
    """Half a SHA-256 of a tensor's dtype, shape and bytes, in hex."""
    found = hashlib.sha256(f"{x.dtype} {tuple(x.shape)} ".encode())
    found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def base_tensors(model: PreTrainedModel, base: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that a model has too, by the model's names, in the dtype they are stored in.

    The checkpoint may have another head, be in shards, or coded: it is read as a model of the same class.

    Args:
        model: its class, names and shapes are looked at; it may be on the meta device.
        base: a folder, or a name on the Hub.

    Raises:
        OSError, ValueError: of `from_pretrained`.
    """
    found: PreTrainedModel
    info: dict
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a head that is not there is nothing to warn of
    try:
        found, info = type(model).from_pretrained(
            base, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(verbosity)
    # Old names of mismatched tensors come as (name, shape, shape)
    new = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    return {name: x for name, x in found.state_dict().items() if name not in new and x.shape == shapes.get(name)}


def relative_to(base: str | Path, folder: str | Path) -> str:
    """How a checkpoint in `folder` names its base: a folder as seen from there, so that both can move together."""
    if not Path(base).is_dir():
        return str(base)
    return Path(os.path.relpath(Path(base).resolve(), Path(folder).resolve())).as_posix()


def seen_from(base: str, folder: str | Path) -> str:
    """The base that a checkpoint in `folder` names: the folder, where there is one, else a name on the Hub."""
    path = Path(folder) / base
    return str(path) if path.is_dir() else base
