"""Tokenizers of checkpoints."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def read_tokenizer(checkpoint: str | Path) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`, with an error that names the file where one is damaged.

    Raises:
        ValueError: a file cannot be read; the tokenizer itself raises whatever it stumbles over.
        OSError: there is no such checkpoint.
    """
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{checkpoint}: {_damaged(Path(checkpoint))} cannot be read ({error}); copy or download it again"
        ) from error


def _damaged(folder: Path) -> str:
    """The file that is no JSON object; tokenizer.json, which holds most, where all are."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            if (folder / name).is_file() and not isinstance(json.loads((folder / name).read_bytes()), dict):
                return name
        except (ValueError, RecursionError):
            return name
    return "tokenizer.json"
