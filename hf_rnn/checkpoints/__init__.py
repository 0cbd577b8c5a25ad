"""Small trained models that come with the package: each a folder here, which `from_pretrained` reads."""

from pathlib import Path
from typing import overload

_FOLDER = Path(__file__).parent
DEFAULT = "mingru-python-docs"  # what `hf-rnn generate` takes where no checkpoint is named


@overload
def pretrained() -> list[str]: ...
@overload
def pretrained(name: str) -> str: ...
def pretrained(name: str | None = None) -> list[str] | str:
    """The trained models that come with the package, all of bytes: each one's folder has a card, README.md.

    Args:
        name: one of them; None: list them.

    Returns:
        Their names; or the folder of the one named, for `from_pretrained` of a model or tokenizer.

    Raises:
        ValueError: there is none of this name; the message says which there are.
    """
    names = sorted(path.parent.name for path in _FOLDER.glob("*/config.json"))
    if name is None:
        return names
    if name not in names:
        raise ValueError(f"name: expected one of {names}, got {name!r}")
    return str(_FOLDER / name)


def find_checkpoint(checkpoint: str) -> str:
    """What a command calls a checkpoint: a folder, else the name of one that comes with the package, else one of the
    Hub's."""
    if not Path(checkpoint).is_dir() and checkpoint in pretrained():
        return pretrained(checkpoint)
    return checkpoint
