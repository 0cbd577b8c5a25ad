"""`python -m hf_rnn.hub.kernel_repository FOLDER`: the ops as a repository for Hugging Face's `kernels` library.

    FOLDER/build/torch-cuda/: __init__.py, metadata.json, gated_scan/..., hf_rnn_kernels/__init__.py
    FOLDER/build/torch-rocm/, FOLDER/build/torch-cpu/: the same

It is `hf_rnn_kernels` for people without it: `get_kernel("owner/hf-rnn-kernels")` has its functions. As that library
asks, imports are relative, operators are registered in a namespace that is unique for these sources, and nothing beyond
torch and triton is needed: numba's loops stay behind, so that a CPU runs the references in plain torch.
"""

import argparse
import base64
import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path

from hf_rnn._version import __version__

PACKAGE, NAME = "hf_rnn_kernels", "hf-rnn-kernels"
# A variant is a folder for a backend; Python-only kernels need no more in its name. CUDA's and ROCm's are the same code
BACKENDS = {"cuda": {"type": "cuda", "archs": ["8.0", "9.0"]}, "rocm": {"type": "rocm", "archs": ["gfx942"]}}
BACKENDS["cpu"] = {"type": "cpu"}
# numba's, and what reads and writes compressed checkpoints
LEFT_OUT = re.compile(r"(^|/)(cpu\w*|vector_math|matrix_product|arrays)\.py$|^(coding|fused_step)/")
THREADS = '''"""No compiled loops on a CPU here: they are in the package (`pip install hf-rnn[cpu]`)."""

import torch


def available() -> bool:
    return False


def worthwhile(x: torch.Tensor) -> bool:
    return False
'''
COMPATIBILITY = '''"""For older versions of the `kernels` library, which look for the kernel here."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("{unique}", Path(__file__).parents[1] / "__init__.py")
_module = sys.modules.get("{unique}") or importlib.util.module_from_spec(_spec)
if "{unique}" not in sys.modules:
    sys.modules["{unique}"] = _module
    _spec.loader.exec_module(_module)
__all__ = _module.__all__
globals().update({{name: getattr(_module, name) for name in __all__}})
'''
CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernel
---

# {name}

Recurrent kernels for PyTorch, in Triton, from hf-rnn {version}: {functions}.

```python
from kernels import get_kernel

rnn = get_kernel("OWNER/{name}", version=0, trust_remote_code=True)
h, last = rnn.min_gru_scan(gate, candidate)  # (B, T, D) each
```

Made by `python -m hf_rnn.hub.kernel_repository`; the functions' docstrings tell shapes, dtypes and equations.
"""


def sources() -> dict[str, str]:
    """The package's files that the kernel has, by path, as they are."""
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    files = {path.relative_to(root).as_posix(): path.read_text() for path in sorted(root.rglob("*.py"))}
    return {name: text for name, text in files.items() if not LEFT_OUT.search(name)} | {"threads.py": THREADS}


def rewritten(name: str, text: str, unique: str) -> str:
    """With relative imports, and operators in the namespace `unique`."""
    dots = "." * (name.count("/") + 1)
    text = re.sub(rf"^from {PACKAGE}\.([\w.]+) import", rf"from {dots}\1 import", text, flags=re.MULTILINE)
    text = re.sub(rf"^from {PACKAGE} import", f"from {dots} import", text, flags=re.MULTILINE)
    text = re.sub(rf'import_module\("{PACKAGE}\.\w+\.(\w+)"\)', r'import_module(".\1", __package__)', text)
    return text.replace('"hf_rnn::', f'"{unique}::').replace("torch.ops.hf_rnn.", f"torch.ops.{unique}.")


def build(folder: str | Path) -> Path:
    """Write the repository; returns the folder of its variants.

    Raises:
        ValueError: the folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: {folder} is not empty; choose a new one")
    files = sources()
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    for backend, about in BACKENDS.items():
        unique = f"_{PACKAGE}_{backend}_{digest}"
        variant = folder / "build" / f"torch-{backend}"
        written = {name: rewritten(name, text, unique) for name, text in files.items()}
        written[f"{PACKAGE}/__init__.py"] = COMPATIBILITY.format(unique=unique)
        for name, text in written.items():
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            (variant / name).write_text(text)
        hashes = {
            name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in written.items()
        }
        metadata = {"name": NAME, "id": unique, "version": 0, "license": "Apache-2.0", "python-depends": []}
        metadata |= {"backend": about, "digest": {"algorithm": "sha256", "files": dict(sorted(hashes.items()))}}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    functions = ", ".join(f"`{name}`" for name in re.findall(r'^    "(\w+)",$', files["__init__.py"], re.MULTILINE))
    (folder / "README.md").write_text(CARD.format(name=NAME, version=__version__, functions=functions))
    return folder / "build"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_rnn.hub.kernel_repository", description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder")
    print(f"wrote {build(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
