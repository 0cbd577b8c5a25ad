"""A checkpoint's folder made to load without this package."""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from hf_rnn.compression.quantizer import METHOD
from hf_rnn.compression.weight_only import METHOD as PACKED
from hf_rnn.remote_code.bundle import write_bundle


def read_config(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's config.json; ValueError where there is none, or none that can be read."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"checkpoint: expected a folder with a config.json, {folder} has none")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"checkpoint: expected an object in {path}, got a {type(config).__name__}")
    return config


def is_ours(config: dict[str, Any]) -> bool:
    """Whether the model is one of the package's."""
    model_type = str(config.get("model_type"))
    return model_type.startswith("hf_rnn_") and model_type in CONFIG_MAPPING


def is_coded(config: dict[str, Any]) -> bool:
    """Whether the weights are coded by `hf_rnn.save_compressed`, or packed: only the package reads them."""
    return (config.get("quantization_config") or {}).get("quant_method") in (METHOD, PACKED)


def bundle(folder: str | Path) -> Path:
    """Write `modeling_hf_rnn.py` into a checkpoint's folder, so that it loads by `trust_remote_code=True` alone.

    Returns:
        Where.

    Raises:
        ValueError: no checkpoint of this package, or one whose coded weights only the package reads.
        OSError: the folder cannot be read or written.
    """
    config = read_config(folder)
    model_type = config.get("model_type", "")
    if not is_ours(config):
        raise ValueError(f"checkpoint: expected a model of hf_rnn, got model_type {model_type!r}")
    if is_coded(config):
        raise ValueError(
            f"checkpoint: the weights in {folder} are coded or packed, and only hf_rnn reads them: no bundle helps"
        )
    return write_bundle(CONFIG_MAPPING[model_type], folder)  # type: ignore[arg-type]
