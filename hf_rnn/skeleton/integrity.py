"""What is wrong with the files of a checkpoint, so that an error can name the file and the tensor.

Only of folders: of a repository on the Hub, huggingface_hub itself refuses file names that leave its cache.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME


def check_files(folder: Path) -> None:
    """Look at what transformers would trust: the names of shards in the index, and the kind of numbers in them.

    Raises:
        ValueError: an index that is none, or names a file that is not in the folder; integers as weights.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        for name in _shard_names(index):
            parts = PureWindowsPath(name)  # knows both kinds of slashes, and drives
            if parts.is_absolute() or parts.anchor or len(parts.parts) != 1 or ".." in parts.parts:
                raise ValueError(f"{index}: weight_map: expected names of files beside it, got {name!r}")
            if not (folder / name).is_file():
                raise ValueError(f"{index}: weight_map: names {name!r}, which is missing; copy the folder again")
    config = _object(folder / "config.json")
    if config is None or config.get("quantization_config") is not None:
        return  # the former is reported by whoever reads it; quantised weights may be of any dtype
    for path, name, _, dtype in _tensors(folder):
        if not dtype.startswith(("F", "BF")):
            raise ValueError(f"{path}: {name}: expected floating-point weights, got {dtype}")


def _shard_names(index: Path) -> list[str]:
    content = _object(index)
    if content is None or not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index}: expected an object with metadata and weight_map; copy the file again")
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: weight_map: expected names of tensors with those of their files")
    return sorted(set(names.values()))


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _tensors(folder: Path) -> Iterator[tuple[Path, str, list[int], str]]:
    """File, name, shape and dtype of every tensor, from headers alone; files that cannot be read are passed over."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in sorted(file.keys())}
                yield from ((path, name, x.get_shape(), x.get_dtype()) for name, x in slices.items())
        except SafetensorError:
            continue


def find_damaged_file(folder: str | Path) -> Path | str:
    """The first file in `folder` that is not what its name says; `folder` itself where there is none."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return path
    for name in ("config.json", "generation_config.json"):
        if (path := Path(folder) / name).is_file() and _object(path) is None:
            return path
    return folder


def find_wrong_shape(folder: str | Path, model: torch.nn.Module) -> str | None:
    """Of the first tensor whose shape is not the model's: where it is, its name, and both shapes."""
    own, prefix = {name: list(x.shape) for name, x in model.state_dict().items()}, "model."
    # A backbone's file has other names than a model's with a head
    expected = {f"{prefix}{name}": x for name, x in own.items()} | {n.removeprefix(prefix): x for n, x in own.items()}
    expected |= own
    for path, name, shape, _ in _tensors(Path(folder)):
        if expected.get(name, shape) != shape:
            return f"{path}: {name}: expected shape {expected[name]}, got {shape}"
    return None
