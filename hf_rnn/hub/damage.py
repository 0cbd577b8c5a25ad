"""Which file of a checkpoint is broken."""

from pathlib import Path

from safetensors import SafetensorError, safe_open


def find_damaged_file(folder: str | Path) -> Path | str:
    """The first weights file in `folder` that is no whole safetensors file; `folder` itself if it is not local."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return path
    return folder
