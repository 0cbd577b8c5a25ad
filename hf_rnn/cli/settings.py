"""`--config hidden_size=256,num_hidden_layers=4`: the settings of a new model."""

import ast
import re
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING


def read_settings(architecture: str, text: str, fixed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings by name, of `name=value,name=value` or nothing.

    Args:
        architecture: one of `hf_rnn.ARCHITECTURES`' names.
        text: commas inside brackets belong to a list.
        fixed: settings that are not to be chosen.

    Raises:
        ValueError: no setting of its config, or no value.
    """
    names = {field.name for field in fields(CONFIG_MAPPING[f"hf_rnn_{architecture}"])}.difference(fixed)  # type: ignore[arg-type]
    settings = {}
    for item in re.split(r",(?![^\[]*\])", text) if text else []:
        name, _, value = item.partition("=")
        if name not in names or not value:
            raise ValueError(f"config: expected name=value with a setting of a {architecture}, got {item!r}")
        settings[name] = parse(value)
    return settings


def parse(value: str) -> Any:
    """A number, True, False, None or a list of these as Python writes them; else a string."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError):
        return value
