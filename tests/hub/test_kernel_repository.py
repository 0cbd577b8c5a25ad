"""The ops as a kernel repository: its layout, and what it computes where the package is not."""

import ast
import base64
import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file

import hf_rnn_kernels
from hf_rnn.hub.kernel_repository import build

VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda", "torch-rocm": "rocm"}
# As the `kernels` library loads a variant: a package under its id, wherever it lies
COMPUTE = """
import importlib.util, json, sys, torch
from pathlib import Path
from safetensors.torch import save_file

def load_kernel(variant):
    unique = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(unique, variant / "__init__.py")
    sys.modules[unique] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def compute(k):
    torch.manual_seed(0)
    B, T, D, H = 3, 11, 6, 2
    x = [torch.randn(B, T, 4 * D, requires_grad=True) for _ in range(3)]
    weight = torch.randn(H, 4 * D // H, D // H, requires_grad=True)
    q, key, v = (y[..., :D].unflatten(-1, (H, -1)) for y in x)
    i, f = x[0][..., :H], x[1][..., :H]
    mask = torch.ones(B, T).bool()
    mask[1, :4] = False
    results = {
        "min_gru": k.min_gru_scan(*x[:2], layout=k.SequenceLayout(mask))[0],
        "min_lstm": k.min_lstm_scan(*x)[0],
        "linear": k.linear_scan(x[0].sigmoid(), x[1])[0],
        "lstm": k.lstm_scan(x[0], weight)[0],
        "gru": k.gru_scan(x[1][..., : 3 * D], weight[:, : 3 * D // H])[0],
        "slstm": k.slstm_scan(x[2], weight, layout=k.SequenceLayout(mask))[0],
        "mlstm": k.mlstm_scan(q, key, v, i, f)[0],
        "rms_norm": k.rms_norm(x[0], torch.linspace(1, 2, 4 * D), 1e-6),
        "gated_norm": k.gated_norm(q, x[1][..., :D], torch.ones(D), 1e-6),
        "silu_gate": k.silu_gate(x[0], x[0]),
        "swiglu": k.swiglu(x[0]),
        "causal_conv": k.causal_conv(x[0], x[1][:, :2], weight.flatten(0, 1), weight.flatten(0, 1)[:, 0])[0],
    }
    sum(y.square().sum() for y in results.values()).backward()
    results |= {f"gradient {n}": y.grad for n, y in enumerate([*x, weight])}
    return {name: y.detach().contiguous() for name, y in results.items()}
"""
ALONE = """
kernel = load_kernel(Path({folder!r}) / "build" / "torch-cpu")
save_file(compute(kernel), "alone.safetensors")
assert kernel.__all__ == {names!r}
unique = kernel.__name__
assert hasattr(getattr(torch.ops, unique), "gated_scan") and not hasattr(torch.ops.hf_rnn, "gated_scan")
assert not any(n.startswith("hf_rnn") or n == "numba" for n in sys.modules)
if {triton!r}:
    for op in ("gated_scan", "mlstm_scan", "recurrent_scan", "perturbed"):
        importlib.import_module(f"{{unique}}.{{op}}.triton")
old = importlib.util.spec_from_file_location("old", Path({folder!r}) / "build/torch-cpu/hf_rnn_kernels/__init__.py")
module = importlib.util.module_from_spec(old)
old.loader.exec_module(module)
assert module.lstm_scan is kernel.lstm_scan
"""
namespace: dict = {}
exec(COMPUTE, namespace)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    build(folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_layout(variant, repository):
    """What the `kernels` library asks of a repository (its docs/source/kernel-requirements.md)."""
    assert {path.name for path in (repository / "build").iterdir()} == set(VARIANTS)
    folder = repository / "build" / variant
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["id"].isidentifier() and metadata["name"].replace("-", "_") == "hf_rnn_kernels"
    assert metadata["backend"]["type"] == VARIANTS[variant] and ("archs" in metadata["backend"]) == (
        variant[6:] != "cpu"
    )
    assert metadata["version"] == 0 and metadata["license"] == "Apache-2.0"
    assert (folder / "__init__.py").is_file() and (folder / "hf_rnn_kernels" / "__init__.py").is_file()
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    hashes = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in files.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": hashes}
    for name, data in files.items():
        check_imports(folder / name, folder)
        assert b'"hf_rnn::' not in data and b"torch.ops.hf_rnn" not in data, name


def check_imports(path: Path, root: Path) -> None:
    """Only torch, triton and the standard library, and relative ones that lead to a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & {"hf_rnn_kernels", "numba", "numpy"}, path
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert str(node.module).split(".")[0] not in ("hf_rnn_kernels", "hf_rnn", "numba", "transformers"), path
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            assert base.is_relative_to(root) and (base.is_dir() or base.with_suffix(".py").is_file()), (
                path,
                node.module,
            )


def test_same_as_the_package(repository, bare_python, tmp_path):
    names, triton = hf_rnn_kernels.__all__, find_spec("triton") is not None
    result = bare_python(COMPUTE + ALONE.format(folder=str(repository), names=names, triton=triton), tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    alone, package = load_file(tmp_path / "alone.safetensors"), namespace["compute"](hf_rnn_kernels)
    assert alone.keys() == package.keys()
    for name in package:
        assert relative_error(alone[name], package[name]) < 1e-5, name


def test_beside_the_package(repository):
    """Both register their operators in one process."""
    kernel = namespace["load_kernel"](repository / "build" / "torch-cuda")
    x = torch.randn(2, 5, 3)
    assert relative_error(kernel.min_gru_scan(x, x)[0], hf_rnn_kernels.min_gru_scan(x, x)[0]) < 1e-6
    assert hasattr(getattr(torch.ops, kernel.__name__), "gated_scan") and hasattr(torch.ops.hf_rnn, "gated_scan")


def test_refuses_a_folder_in_use(repository):
    with pytest.raises(ValueError, match="not empty"):
        build(repository)
