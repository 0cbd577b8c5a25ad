"""Checkpoints that load through `trust_remote_code=True` where nobody has said `import hf_rnn`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig

FILE_NAME = "modeling_hf_rnn.py"

_TEMPLATE = '''"""Loads this checkpoint through the hf_rnn package: `pip install hf-rnn`."""

from hf_rnn import (
{names})

__all__ = [
{quoted}]
'''


def write_remote_code(config: "RecurrentConfig", folder: str | Path) -> Path:
    """Write the module that `config.auto_map` names.

    It imports the package, absolutely: transformers checks such imports first and, where the package is missing, says
    what to install.
    """
    names = [type(config).__name__, *config.auto_classes().values()]
    path = Path(folder) / FILE_NAME
    imported, quoted = "".join(f"    {name},\n" for name in names), "".join(f'    "{name}",\n' for name in names)
    path.write_text(_TEMPLATE.format(names=imported, quoted=quoted))
    return path
