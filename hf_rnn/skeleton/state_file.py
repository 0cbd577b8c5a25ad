"""States as files: safetensors with what says whose they are, written whole or not at all."""

import hashlib
import json
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedConfig

STATE_FORMAT = "hf_rnn state 1"
_BESIDE = "beside."
_METADATA = {"model_type", "fingerprint", "layers", "seen_tokens", "ends_inside_patch"}

# Of a backbone: its tensors, what they were like, and the fingerprint
_FINGERPRINTS: weakref.WeakKeyDictionary[nn.Module, tuple[list, list, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: Any) -> str:
    """SHA-256 of all that a state depends on: the backbone's config and its weights, in the order of their names.

    The settings are those that the package's configs have beside `PreTrainedConfig`'s own, which say how a model is
    loaded and shown. All weights are read once, 2 to 8 ms for a million parameters on a CPU (docs/states.md), and
    again only where one has been replaced or written to; a write through `.data` is seen if the tensor's memory is
    another one.
    """
    backbone = model.base_model
    tensors = sorted(backbone.state_dict(keep_vars=True).items())
    known, was, digest = _FINGERPRINTS.get(backbone, ([], [], ""))
    now = [(id(x), *rest) for x, *rest in weights_now(backbone)]
    if now == was and all(ref() is not None for ref in known):  # else an id may be another tensor's by now
        return digest
    names = {field.name for field in fields(backbone.config)} - {field.name for field in fields(PreTrainedConfig)}
    config = {name: getattr(backbone.config, name) for name in sorted(names)}
    digest = _digest(dict(tensors), {"model_type": backbone.config.model_type, "config": repr(config)})
    _FINGERPRINTS[backbone] = ([weakref.ref(x) for _, x in tensors], now, digest)
    return digest


def weights_now(backbone: nn.Module) -> list[tuple[Tensor, int, int]]:
    """Each weight, where it lies, and how often it has been written to."""
    weights = backbone.state_dict(keep_vars=True).values()
    return [(x, x.data_ptr(), 0 if x.is_inference() else x._version) for x in weights]


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of numbers, with the tensors' names, dtypes and shapes."""
    described = [(name, str(x.dtype), list(x.shape)) for name, x in sorted(tensors.items())]
    total = hashlib.sha256(json.dumps([metadata, described], sort_keys=True).encode())
    for _, x in sorted(tensors.items()):
        total.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return total.hexdigest()


def write_state(
    file: str | Path, layers: Sequence[Sequence[Tensor]], beside: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write each layer's tensors, what lies beside, and strings about them (`_METADATA`), so that `file` holds all of
    it or what it held before: to a file beside it, readable by its owner alone, which takes its place when it is on the
    disk.

    Raises:
        ValueError: a folder, or a device, which the file would replace.
        OSError: no such folder, or no room.
    """
    tensors = {f"{n}.{m}": x for n, layer in enumerate(layers) for m, x in enumerate(layer)}
    tensors |= {_BESIDE + name: x for name, x in beside.items()}
    # Copies: states may be views of one tensor, which safetensors does not write
    tensors = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    metadata = metadata | {"format": STATE_FORMAT}
    payload = save(tensors, metadata | {"sha256": _digest(tensors, metadata)})
    path = _regular(file)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as new:
        try:
            new.write(payload)
            new.flush()
            os.fsync(new.fileno())
            new.close()
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise
    if os.name != "nt":  # the name as well
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _regular(file: str | Path) -> Path:
    """Where a link leads to."""
    path = Path(file).resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{file}: expected a state's file, got a folder or a device")
    return path


def read_state(file: str | Path) -> tuple[list[tuple[Tensor, ...]], dict[str, Tensor], dict[str, str]]:
    """What `write_state` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that is cut off or damaged.
    """
    try:
        with safe_open(_regular(file), framework="pt") as opened:
            metadata, names = opened.metadata() or {}, opened.keys()
            tensors = {name: opened.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file}: no state, or one that is cut off ({error})") from error
    if metadata.get("format") != STATE_FORMAT:
        raise ValueError(f"{file}: expected a state, {STATE_FORMAT!r}, got format {metadata.get('format')!r}")
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ValueError(f"{file}: the state is damaged: its SHA-256 is not the one written with it")
    beside = {name.removeprefix(_BESIDE): tensors.pop(name) for name in names if name.startswith(_BESIDE)}
    sizes = Counter(name.partition(".")[0] for name in tensors)
    layers = [[f"{n}.{m}" for m in range(sizes[str(n)])] for n in range(len(sizes))]
    if (
        {name for layer in layers for name in layer} != tensors.keys()
        or not metadata.keys() >= _METADATA
        or metadata["layers"] != str(len(layers))
        or not metadata["seen_tokens"].isdecimal()
    ):
        raise ValueError(f"{file}: no state: expected each layer's tensors and {sorted(_METADATA)}")
    return [tuple(tensors[name] for name in layer) for layer in layers], beside, metadata
